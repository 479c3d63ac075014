//! The VMM.

pub mod boot;
pub mod clock;
pub mod cpuid;
pub mod kvm;
pub mod memory;
mod section_body;
mod software_kvm;
#[cfg(test)]
mod test_guest;
pub mod vcpu;
