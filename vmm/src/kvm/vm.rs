//! The VM: its memory slots and the devices that KVM itself emulates.

use std::collections::TryReserveError;
use std::io;

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_PIT_SPEAKER_DUMMY,
    kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};
use migration::layout::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use super::slots::{self, Slot};
use super::{Capabilities, DirtyLog, IoctlError, Kvm, KvmError, ManualProtect, ioctl};

/// On Intel without unrestricted guests KVM needs a page table of one page that maps addresses to
/// themselves, and on every Intel a TSS of three pages, at guest addresses that are not RAM. They
/// lie in the hole, above the local APICs and below the place of a firmware.
const IDENTITY_MAP_ADDR: u64 = 0xfeff_c000;
const TSS_ADDR: usize = 0xfeff_d000;

/// The most vCPUs: xAPIC IDs go up to 254, and 255 means all.
pub const MAX_VCPUS: u32 = 254;

/// A VM with its memory registered, its interrupt controllers and its PIT, but no vCPU yet.
#[derive(Debug)]
pub struct Vm {
    // Before `ram`: fields are dropped in order, and the slots refer to the memory.
    fd: VmFd,
    capabilities: Capabilities,
    slots: Vec<Slot>,
    ram: GuestRam,
}

impl Vm {
    /// Makes a VM with this RAM. Memory is registered with no log of writes.
    pub fn new(kvm: &Kvm, ram: GuestRam) -> Result<Self, KvmError> {
        Self::with_limits(kvm, ram, slots::MAX_SLOT_PAGES, None)
    }

    /// As [`Self::new`], with slots of at most `max_pages` pages, a multiple of 64, and with a
    /// dirty log that works in another way than the best that KVM has.
    pub(super) fn with_limits(
        kvm: &Kvm,
        ram: GuestRam,
        max_pages: u64,
        manual_protect: Option<ManualProtect>,
    ) -> Result<Self, KvmError> {
        let fd = kvm.create_vm()?;
        let mut capabilities = Capabilities::probe(&fd);
        if let Some(less) = manual_protect {
            capabilities.manual_protect = less;
        }
        let slots = slots::slots_of(&ram, max_pages);
        if slots.len() > capabilities.max_slots {
            return Err(KvmError::Slots {
                needed: slots.len(),
                most: capabilities.max_slots,
            });
        }
        let vm = Self {
            fd,
            capabilities,
            slots,
            ram,
        };
        vm.set_up()?;
        Ok(vm)
    }

    fn set_up(&self) -> Result<(), IoctlError> {
        // Before any slot logs writes: how the log works can't change while one does.
        let manual = match self.capabilities.manual_protect {
            ManualProtect::No => 0,
            ManualProtect::Yes => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            ManualProtect::YesInitiallySet => {
                KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
            }
        };
        if manual != 0 {
            self.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, manual.into())?;
        }
        // Without these, saved vCPU events would lose what a pending exception brings with it.
        if self.capabilities.exception_payload {
            self.enable(KVM_CAP_EXCEPTION_PAYLOAD, 1)?;
        }
        if self.capabilities.triple_fault_event {
            self.enable(KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)?;
        }
        self.fd
            .set_identity_map_address(IDENTITY_MAP_ADDR)
            .map_err(IoctlError::named("KVM_SET_IDENTITY_MAP_ADDR"))?;
        self.fd
            .set_tss_address(TSS_ADDR)
            .map_err(IoctlError::named("KVM_SET_TSS_ADDR"))?;
        for slot in &self.slots {
            ioctl::set_memory_region(&self.fd, slot, 0)?;
        }
        // Before the vCPUs, which get their local APICs from it, and before the PIT.
        self.fd
            .create_irq_chip()
            .map_err(IoctlError::named("KVM_CREATE_IRQCHIP"))?;
        // The speaker's port, 0x61, shows the state of PIT channel 2: KVM answers there too.
        self.fd
            .create_pit2(kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            })
            .map_err(IoctlError::named("KVM_CREATE_PIT2"))
    }

    fn enable(&self, cap: u32, argument: u64) -> Result<(), IoctlError> {
        self.fd
            .enable_cap(&kvm_enable_cap {
                cap,
                args: [argument, 0, 0, 0],
                ..Default::default()
            })
            .map_err(IoctlError::named("KVM_ENABLE_CAP"))
    }

    /// Checks a number of vCPUs against this host's and Ferry's limits.
    pub fn check_vcpus(&self, asked: u32) -> Result<(), KvmError> {
        let most = self.capabilities.max_vcpus.min(MAX_VCPUS);
        if (1..=most).contains(&asked) {
            Ok(())
        } else {
            Err(KvmError::Vcpus { asked, most })
        }
    }

    /// Makes the vCPU of that index, which is its APIC ID.
    pub(crate) fn create_vcpu(&self, index: u32) -> Result<VcpuFd, IoctlError> {
        self.fd
            .create_vcpu(index.into())
            .map_err(IoctlError::named("KVM_CREATE_VCPU"))
    }

    /// What this VM's KVM can do.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The VM's descriptor, for interrupt lines, irqfds and ioeventfds.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Makes writes to `irqfd` pulse the interrupt line `gsi`. KVM may do so a little later, from
    /// a work queue.
    pub fn register_irqfd(&self, irqfd: &EventFd, gsi: u32) -> Result<(), IoctlError> {
        self.fd
            .register_irqfd(irqfd, gsi)
            .map_err(IoctlError::named("KVM_IRQFD"))
    }

    /// Makes a 32-bit write of `value` by the guest at `addr` notify `fd` instead of leaving the
    /// guest.
    pub fn register_ioeventfd(
        &self,
        fd: &EventFd,
        addr: u64,
        value: u32,
    ) -> Result<(), IoctlError> {
        self.fd
            .register_ioevent(fd, &IoEventAddress::Mmio(addr), value)
            .map_err(IoctlError::named("KVM_IOEVENTFD"))
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The memory slots, in the order of their addresses.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The buffers for logging this VM's writes; the log is not on yet.
    pub fn dirty_log(&self) -> Result<DirtyLog, IoctlError> {
        DirtyLog::new(self).map_err(|_: TryReserveError| IoctlError {
            name: "KVM_GET_DIRTY_LOG",
            source: io::Error::from_raw_os_error(libc::ENOMEM),
        })
    }
}
