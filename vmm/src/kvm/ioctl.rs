//! The ioctls and the parts of `struct kvm_run` that kvm-ioctls doesn't offer, or offers only
//! with an allocation each time or as unsafe. All of the KVM core's unsafe calls are here.

#![allow(
    unsafe_code,
    reason = "ioctls with pointers, and the union in struct kvm_run"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::slice;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_EXIT_IO_IN, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    KVMIO, Msrs, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr,
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_ioapic_state, kvm_irqchip, kvm_msrs,
    kvm_pic_state, kvm_run, kvm_sregs2, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::IoctlError;
use super::slots::Slot;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_io_nr!(KVM_KVMCLOCK_CTRL, KVMIO, 0xad);
ioctl_io_nr!(KVM_SET_TSC_KHZ, KVMIO, 0xa2);
ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);
ioctl_iowr_nr!(KVM_GET_MSRS, KVMIO, 0x88, kvm_msrs);
ioctl_iow_nr!(KVM_SET_MSRS, KVMIO, 0x89, kvm_msrs);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);

/// The result of an ioctl that returns a negative number with errno on failure.
fn checked(name: &'static str, result: libc::c_int) -> Result<libc::c_int, IoctlError> {
    if result < 0 {
        Err(IoctlError::named(name)(errno::Error::last()))
    } else {
        Ok(result)
    }
}

/// Takes over an open `/dev/kvm`.
pub(super) fn kvm_from_fd(fd: RawFd) -> kvm_ioctls::Kvm {
    // SAFETY: the only caller has just got the descriptor from `into_raw_fd` and gives it away.
    // Whether it is KVM is checked next, by its API version; until then only ioctls without
    // arguments are made on it.
    unsafe { kvm_ioctls::Kvm::from_raw_fd(fd) }
}

/// Registers, or with other flags changes, a slot of guest memory.
///
/// The caller keeps the memory behind `slot.host_addr` mapped for as long as the VM exists.
pub(super) fn set_memory_region(vm: &VmFd, slot: &Slot, flags: u32) -> Result<(), IoctlError> {
    let region = kvm_userspace_memory_region {
        slot: slot.id,
        flags,
        guest_phys_addr: slot.guest_addr,
        memory_size: slot.len(),
        userspace_addr: slot.host_addr,
    };
    // SAFETY: `Slot`s are only made from mapped guest memory, of which `Vm` holds a reference.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(IoctlError::named("KVM_SET_USER_MEMORY_REGION"))
}

/// Reads the dirty log of a slot into `words`, one bit a page. `words` has a bit for each page.
pub(super) fn get_dirty_log(vm: &VmFd, slot: &Slot, words: &mut [u64]) -> Result<(), IoctlError> {
    assert!(words.len() as u64 >= slot.words(), "buffer too short");
    let log = kvm_dirty_log {
        slot: slot.id,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: KVM writes one bit for each page of the slot, in whole words of 64 bits; the
    // assertion above makes sure that they fit.
    let result = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) };
    checked("KVM_GET_DIRTY_LOG", result).map(drop)
}

/// Arms the log again for the pages set in `words`, which start at page `first` of the slot.
/// `first` is a multiple of 64, and so is `pages` unless it reaches the slot's end.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: &Slot,
    first: u64,
    pages: u32,
    words: &mut [u64],
) -> Result<(), IoctlError> {
    assert!(
        words.len() as u64 * 64 >= u64::from(pages),
        "buffer too short"
    );
    let log = kvm_clear_dirty_log {
        slot: slot.id,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: KVM reads one bit for each of `pages`, in whole words of 64 bits; the assertion
    // above makes sure that they are there.
    let result = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) };
    checked("KVM_CLEAR_DIRTY_LOG", result).map(drop)
}

/// `KVM_GET_SREGS2`.
pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, IoctlError> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: KVM fills the struct, which has the type that the ioctl's number tells.
    let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) };
    checked("KVM_GET_SREGS2", result).map(|_| sregs)
}

/// `KVM_SET_SREGS2`.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), IoctlError> {
    // SAFETY: KVM reads the struct, which has the type that the ioctl's number tells.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) };
    checked("KVM_SET_SREGS2", result).map(drop)
}

/// The guest's XSAVE area. `size` is what `KVM_CAP_XSAVE2` told, or `None` without it.
pub(crate) fn get_xsave(vcpu: &VcpuFd, size: Option<usize>) -> Result<Vec<u32>, IoctlError> {
    const LEGACY: usize = size_of::<kvm_xsave>();
    let mut area = vec![0u32; size.unwrap_or(LEGACY).max(LEGACY).div_ceil(4)];
    let (name, request) = match size {
        Some(_) => ("KVM_GET_XSAVE2", KVM_GET_XSAVE2()),
        None => ("KVM_GET_XSAVE", KVM_GET_XSAVE()),
    };
    // SAFETY: KVM writes as many bytes as `KVM_CAP_XSAVE2` tells (4096 without it), and the
    // buffer has that many.
    let result = unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) };
    checked(name, result).map(|_| area)
}

/// Loads an XSAVE area. `size` is what this host's `KVM_CAP_XSAVE2` told, or `None`; the area is
/// as long as that, or shorter: the rest is taken as zeroes.
pub(crate) fn set_xsave(
    vcpu: &VcpuFd,
    size: Option<usize>,
    area: &[u32],
) -> Result<(), IoctlError> {
    let len = size.unwrap_or(0).max(size_of::<kvm_xsave>()).div_ceil(4);
    let mut whole = vec![0u32; len.max(area.len())];
    whole
        .iter_mut()
        .zip(area)
        .for_each(|(to, from)| *to = *from);
    // SAFETY: KVM reads as many bytes as its `KVM_CAP_XSAVE2` tells (4096 without it), and the
    // buffer has at least that many.
    let result = unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), whole.as_ptr()) };
    checked("KVM_SET_XSAVE", result).map(drop)
}

/// A second descriptor of a vCPU, for its clocks alone: it is used from the machine's thread while
/// the vCPU's own thread has the vCPU paused.
#[derive(Debug)]
pub struct VcpuClockFd {
    fd: OwnedFd,
    host_tsc_khz: u32,
    /// The frequency of the guest's TSC, once it is known; only this sets another. 0 if it is not.
    tsc_khz: AtomicU32,
}

impl VcpuClockFd {
    /// `host_tsc_khz` is the frequency that the vCPU had when it was made.
    pub(crate) fn of(vcpu: &VcpuFd, host_tsc_khz: u32) -> io::Result<Self> {
        // SAFETY: the descriptor is open for as long as `vcpu`, which outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        Ok(Self {
            fd: fd.try_clone_to_owned()?,
            host_tsc_khz,
            tsc_khz: AtomicU32::new(0),
        })
    }

    /// The frequency of the host's own TSC in kHz.
    pub(crate) fn host_tsc_khz(&self) -> u32 {
        self.host_tsc_khz
    }

    /// The frequency of the guest's TSC in kHz.
    pub(crate) fn tsc_khz(&self) -> Result<u32, IoctlError> {
        let known = self.tsc_khz.load(Ordering::Relaxed);
        if known != 0 {
            return Ok(known);
        }
        // SAFETY: the ioctl has no argument.
        let result = unsafe { ioctl(&self.fd, KVM_GET_TSC_KHZ()) };
        let khz = checked("KVM_GET_TSC_KHZ", result)? as u32;
        self.tsc_khz.store(khz, Ordering::Relaxed);
        Ok(khz)
    }

    /// Sets the frequency of the guest's TSC.
    pub(crate) fn set_tsc_khz(&self, khz: u32) -> Result<(), IoctlError> {
        // SAFETY: the argument is a number.
        let result = unsafe { ioctl_with_val(&self.fd, KVM_SET_TSC_KHZ(), khz.into()) };
        self.tsc_khz.store(0, Ordering::Relaxed);
        checked("KVM_SET_TSC_KHZ", result).map(drop)
    }

    /// The guest's TSC offset: what is added to the (scaled) TSC of the host, modulo 2^64.
    pub(crate) fn tsc_offset(&self) -> Result<u64, IoctlError> {
        let mut offset = 0u64;
        let attr = tsc_offset_attr(&raw mut offset);
        // SAFETY: KVM writes 8 bytes to the address in the attribute, which is `offset`'s.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_GET_DEVICE_ATTR(), &attr) };
        checked("KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)", result).map(|_| offset)
    }

    /// Sets the TSC offset.
    pub(crate) fn set_tsc_offset(&self, mut offset: u64) -> Result<(), IoctlError> {
        let attr = tsc_offset_attr(&raw mut offset);
        // SAFETY: KVM reads 8 bytes at the address in the attribute, which is `offset`'s.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &attr) };
        checked("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)", result).map(drop)
    }

    /// Reads one MSR.
    pub(crate) fn msr(&self, index: u32) -> Result<Option<u64>, IoctlError> {
        let mut msrs = one_msr(index, 0)?;
        let list = msrs.as_mut_fam_struct_ptr();
        // SAFETY: the wrapper allocates as many entries as its header counts.
        let result = unsafe { ioctl_with_mut_ptr(&self.fd, KVM_GET_MSRS(), list) };
        let read = checked("KVM_GET_MSRS", result)?;
        Ok((read == 1).then(|| msrs.as_slice().first().map_or(0, |entry| entry.data)))
    }

    /// Writes one MSR; whether KVM took it.
    pub(crate) fn set_msr(&self, index: u32, data: u64) -> Result<bool, IoctlError> {
        let msrs = one_msr(index, data)?;
        // SAFETY: the wrapper allocates as many entries as its header counts.
        let result = unsafe { ioctl_with_ptr(&self.fd, KVM_SET_MSRS(), msrs.as_fam_struct_ptr()) };
        checked("KVM_SET_MSRS", result).map(|written| written == 1)
    }

    /// Tells the guest, through kvmclock, that it was stopped. EINVAL if it doesn't use kvmclock.
    pub(crate) fn kvmclock_ctrl(&self) -> Result<(), IoctlError> {
        // SAFETY: the ioctl has no argument.
        let result = unsafe { ioctl(&self.fd, KVM_KVMCLOCK_CTRL()) };
        checked("KVM_KVMCLOCK_CTRL", result).map(drop)
    }
}

fn tsc_offset_attr(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset as u64,
    }
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, IoctlError> {
    let entry = kvm_bindings::kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).map_err(|_| IoctlError {
        name: "KVM_GET_MSRS",
        source: io::Error::from_raw_os_error(libc::ENOMEM),
    })
}

/// The file of a vCPU's statistics; `None` where KVM has none (before Linux 5.14).
pub(crate) fn stats_fd(vcpu: &VcpuFd) -> Result<Option<OwnedFd>, IoctlError> {
    // SAFETY: the ioctl has no argument.
    let result = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
    match checked("KVM_GET_STATS_FD", result) {
        // SAFETY: KVM has just made the descriptor, for the caller.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Err(error) if error.source.raw_os_error() == Some(libc::ENOTTY) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The port access that a vCPU left the guest for. The data are `count` items of `size` bytes.
pub(crate) struct PortAccess<'a> {
    pub(crate) port: u16,
    pub(crate) size: usize,
    pub(crate) is_read: bool,
    pub(crate) data: &'a mut [u8],
}

/// The port access in `vcpu`'s `kvm_run`, whose exit reason is `KVM_EXIT_IO` and whose mapping is
/// `run_size` bytes long. `None` if KVM wrote something impossible there.
pub(crate) fn port_access(vcpu: &mut VcpuFd, run_size: usize) -> Option<PortAccess<'_>> {
    let run: *mut kvm_run = vcpu.get_kvm_run();
    // SAFETY: `run` comes from a reference; every bit pattern is a valid `io`.
    let io = unsafe { (*run).__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let len = size.checked_mul(io.count as usize)?;
    let offset = usize::try_from(io.data_offset).ok()?;
    if !matches!(size, 1 | 2 | 4) || offset.checked_add(len)? > run_size {
        return None;
    }
    // SAFETY: kvm-ioctls has mapped `run_size` bytes at `run` (checked above to hold the data) for
    // as long as the vCPU's descriptor, which stays borrowed; the kernel writes there only in
    // KVM_RUN, which needs that borrow too.
    let data = unsafe { slice::from_raw_parts_mut(run.cast::<u8>().add(offset), len) };
    Some(PortAccess {
        port: io.port,
        size,
        is_read: u32::from(io.direction) == KVM_EXIT_IO_IN,
        data,
    })
}

/// What KVM says of an internal error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct InternalError {
    /// `KVM_INTERNAL_ERROR_*`.
    pub suberror: u32,
    /// The bytes at RIP, where KVM gives them (it read up to 15).
    pub instruction: Vec<u8>,
    /// Other data, whose meaning depends on the suberror.
    pub data: Vec<u64>,
}

/// The details in `run`, whose exit reason is `KVM_EXIT_INTERNAL_ERROR`.
pub(crate) fn internal_error(run: &kvm_run) -> InternalError {
    // SAFETY: every bit pattern is a valid `internal`.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let known = internal.data.len().min(internal.ndata as usize);
    let mut error = InternalError {
        suberror: internal.suberror,
        instruction: Vec::new(),
        data: internal.data.iter().take(known).copied().collect(),
    };
    // Flags and instruction are there only if there is data, and the flag says so.
    if error.suberror == KVM_INTERNAL_ERROR_EMULATION && known >= 1 {
        // SAFETY: every bit pattern is a valid `emulation_failure`.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        if failure.flags & flag != 0 {
            // SAFETY: as above; the inner union has a single member.
            let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let len = usize::from(bytes.insn_size);
            error.instruction = bytes.insn_bytes.iter().take(len).copied().collect();
        }
    }
    error
}

/// The two shapes of `struct kvm_irqchip`.
pub(super) fn pic_of(chip: &kvm_irqchip) -> kvm_pic_state {
    // SAFETY: every bit pattern is a valid `pic`.
    unsafe { chip.chip.pic }
}

/// See [`pic_of`].
pub(super) fn ioapic_of(chip: &kvm_irqchip) -> kvm_ioapic_state {
    // SAFETY: every bit pattern is a valid `ioapic`.
    unsafe { chip.chip.ioapic }
}

/// The entries of an I/O APIC's redirection table as numbers.
pub(super) fn redirections(ioapic: &kvm_ioapic_state) -> [u64; 24] {
    // SAFETY: every bit pattern is a valid u64.
    ioapic.redirtbl.map(|entry| unsafe { entry.bits })
}

/// The TSC of the host.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets processes use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}
