//! Virtual CPUs: their threads, the exits from the guest, and their state.
//!
//! A [`Vcpu`] is the KVM object; [`VcpuThread`] runs it on a thread of its own. What the guest
//! does to devices goes to an [`IoBus`], what ends a run to an [`EventSink`].

mod io;
mod kick;
mod msrs;
mod registers;
mod run;
mod saved;
mod state;
mod thread;
mod throttle;

use std::time::{Duration, Instant};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use migration::layout::GuestRam;

pub use io::{EventSink, IoBus, IoOutcome, VcpuEvent};
pub(crate) use msrs::{MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE};
pub(crate) use saved::CpuidEntry;
pub use state::{StateError, VERSION, VcpuState};
pub use thread::{Pending, VcpuEnded, VcpuStatus, VcpuThread};
pub use throttle::MAX_SHARE;

use crate::boot::BootState;
use crate::cpuid::{self, Cpuid};
use crate::kvm::{Capabilities, IoctlError, Kvm, Vm};

/// A virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    index: u32,
    /// The size of the mapping of `kvm_run`.
    run_size: usize,
    capabilities: Capabilities,
    ram: GuestRam,
    /// What the guest sees, as read back from KVM.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// The frequency of its TSC before anybody set one: the host's.
    host_tsc_khz: u32,
    /// The MSRs of its state.
    msr_indices: Vec<u32>,
    /// Its state before it was first run, for a reset.
    power_on: Option<VcpuState>,
    /// How long KVM took to tell it.
    save_time: Duration,
}

/// How a vCPU left the guest.
struct Left {
    /// When, on [`migration::clock::MonotonicClock`].
    at: Duration,
    /// Why, if not because of a pause.
    event: Option<VcpuEvent>,
}

impl Vcpu {
    /// Makes the vCPU of that index, which is its APIC ID, of `vcpus` in all. Vcpu 0 is the one
    /// that boots; the others wait for it to send them INIT and SIPI.
    pub fn new(
        kvm: &Kvm,
        vm: &Vm,
        index: u32,
        vcpus: u32,
        cpuid: &Cpuid,
    ) -> Result<Self, StateError> {
        let fd = vm.create_vcpu(index)?;
        let host_tsc_khz = fd
            .get_tsc_khz()
            .map_err(IoctlError::named("KVM_GET_TSC_KHZ"))?;
        let mut vcpu = Self {
            fd,
            index,
            run_size: vm.fd().run_size(),
            capabilities: vm.capabilities().clone(),
            ram: vm.ram().clone(),
            cpuid: Vec::new(),
            host_tsc_khz,
            msr_indices: Vec::new(),
            power_on: None,
            save_time: Duration::ZERO,
        };
        vcpu.set_cpuid(&cpuid.for_vcpu(index, vcpus).to_kvm())?;
        // After CPUID, on which it depends what there is.
        vcpu.msr_indices = msrs::list(kvm, &vcpu.fd)?;
        vcpu.power_on = Some(vcpu.save()?);
        // Once more, as the first time is longer.
        let began = Instant::now();
        vcpu.save()?;
        vcpu.save_time = began.elapsed();
        tracing::debug!(
            vcpu = index,
            msrs = vcpu.msr_indices.len(),
            "vCPU created, power-on state saved"
        );
        Ok(vcpu)
    }

    /// The index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// How long it takes to read the whole state.
    pub fn save_time(&self) -> Duration {
        self.save_time
    }

    /// The KVM object.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// What the guest really sees, which can be more than it was given: see [`cpuid`].
    pub fn cpuid(&self) -> Cpuid {
        Cpuid::from_kvm(&self.cpuid)
    }

    /// The frequency of its TSC in kHz.
    pub fn tsc_khz(&self) -> Result<u32, IoctlError> {
        self.fd
            .get_tsc_khz()
            .map_err(IoctlError::named("KVM_GET_TSC_KHZ"))
    }

    /// Sets the registers to those at a kernel's entry. For vCPU 0, in its power-on state.
    pub fn set_boot_state(&mut self, boot: &BootState) -> Result<(), StateError> {
        let mut regs = self
            .fd
            .get_regs()
            .map_err(IoctlError::named("KVM_GET_REGS"))?;
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(IoctlError::named("KVM_GET_SREGS"))?;
        boot.apply(&mut regs, &mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(IoctlError::named("KVM_SET_SREGS"))?;
        self.fd
            .set_regs(&regs)
            .map_err(IoctlError::named("KVM_SET_REGS"))?;
        msrs::set_write_back(&self.fd)
    }

    fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<(), IoctlError> {
        self.cpuid = cpuid::set(&self.fd, entries)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
