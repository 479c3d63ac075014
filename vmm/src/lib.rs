//! Ferry's virtual machine monitor.
//!
//! Start with [`instance`]: one process, its guest and its migrations. It stands on
//!
//! - [`machine`]: one guest's machine, put together from [`memory`], [`kvm`], [`vcpu`], [`cpuid`],
//!   [`clock`] and [`boot`], and the devices of the crate `devices`;
//! - [`control`]: what users and programs may ask of it, over QMP and the human monitor;
//! - [`console`]: the host's end of the serial port, and the terminal.
//!
//! What only a KVM without hardware virtualization needs is in `software_kvm`.

pub mod affinity;
pub mod boot;
pub mod clock;
pub mod console;
pub mod control;
pub mod cpuid;
pub mod host_list;
pub mod instance;
pub mod kvm;
pub mod machine;
pub mod memory;
mod section_body;
mod software_kvm;
#[cfg(test)]
mod test_guest;
pub mod vcpu;
