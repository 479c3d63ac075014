//! KVM: opening it, what it can do, the VM, and its log of dirty pages.
//!
//! Start at [`Kvm::open`], then [`Vm`]. Nothing here assumes a particular KVM: what not every KVM
//! has is a field of [`Capabilities`].

mod capabilities;
mod dirty_log;
pub(crate) mod ioctl;
mod slots;
mod stats;
mod vm;
mod vm_state;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;

use kvm_bindings::KVM_API_VERSION;
use vmm_sys_util::errno;

pub use capabilities::{Capabilities, ManualProtect};
pub use dirty_log::DirtyLog;
pub use ioctl::VcpuClockFd;
pub use slots::Slot;
pub use stats::{VcpuStats, logs_without_faults};
pub use vm::{MAX_VCPUS, Vm};
pub use vm_state::{IRQCHIP_SECTION, PIT_SECTION, VM_STATE_VERSION, VmState, VmStateError};

/// An ioctl that failed.
#[derive(Debug, thiserror::Error)]
#[error("{name} failed: {source}")]
pub struct IoctlError {
    /// The ioctl, as KVM's documentation calls it, with its argument where that helps.
    pub name: &'static str,
    /// The reason.
    pub source: io::Error,
}

impl IoctlError {
    /// For `map_err`: names the ioctl.
    pub(crate) fn named(name: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |error| Self {
            name,
            source: error.into(),
        }
    }
}

/// Why KVM can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device file.
    #[error(
        "/dev/kvm does not exist: load the module (modprobe kvm_intel or kvm_amd), switch \
         virtualization on in the firmware's setup, or enable nested virtualization for this VM"
    )]
    Missing,
    /// Not allowed to open it.
    #[error(
        "no permission to open /dev/kvm: add the user to the group kvm (usermod -aG kvm USER, \
         then log in again), or give the container the device"
    )]
    Permission,
    /// There, but not usable.
    #[error("cannot open /dev/kvm: {0}")]
    Open(io::Error),
    /// Not KVM, or one from before 2007.
    #[error("/dev/kvm has API version {0}; version {KVM_API_VERSION} is required")]
    ApiVersion(i32),
    /// Too old a kernel, or a KVM built without something.
    #[error("this KVM lacks what every guest needs: {}; use a newer kernel", .0.join(", "))]
    Capabilities(Vec<&'static str>),
    /// More vCPUs than this KVM, or Ferry, supports.
    #[error("{asked} vCPUs were asked for, but this host supports 1 to {most}")]
    Vcpus {
        /// The number asked for.
        asked: u32,
        /// The largest number possible.
        most: u32,
    },
    /// More pieces of memory than KVM can register.
    #[error("the memory needs {needed} slots, but this KVM has {most}")]
    Slots {
        /// Slots that the memory needs.
        needed: usize,
        /// Slots that KVM has.
        most: usize,
    },
    /// Something that should work doesn't.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
}

/// The open `/dev/kvm`, checked for everything that Ferry can't do without.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm`. Errors say what to do about them.
    pub fn open() -> Result<Self, KvmError> {
        Self::open_at("/dev/kvm")
    }

    fn open_at(path: &str) -> Result<Self, KvmError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| match error.raw_os_error() {
                // ENODEV, ENXIO: the file is there, its module is not.
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => KvmError::Missing,
                Some(libc::EACCES | libc::EPERM) => KvmError::Permission,
                _ => KvmError::Open(error),
            })?;
        let fd = ioctl::kvm_from_fd(file.into_raw_fd());
        let version = fd.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion(version));
        }
        let missing = capabilities::missing(&fd);
        if !missing.is_empty() {
            return Err(KvmError::Capabilities(missing));
        }
        Ok(Self { fd })
    }

    /// Makes a VM with nothing in it.
    pub(crate) fn create_vm(&self) -> Result<kvm_ioctls::VmFd, IoctlError> {
        loop {
            match self.fd.create_vm() {
                // Creation waits for other CPUs and gives up when a signal comes.
                Err(error) if error.errno() == libc::EINTR => {}
                result => return result.map_err(IoctlError::named("KVM_CREATE_VM")),
            }
        }
    }

    /// The system-wide file descriptor.
    pub fn fd(&self) -> &kvm_ioctls::Kvm {
        &self.fd
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// KVM, or a loud notice that the test is skipped.
    pub(crate) fn kvm_or_skip() -> Option<Kvm> {
        match Kvm::open() {
            Ok(kvm) => Some(kvm),
            Err(error) => {
                guest_tests::driver::skip(&format!("needs KVM: {error}"));
                None
            }
        }
    }

    #[test]
    fn what_is_not_kvm_is_refused_with_a_remedy() {
        let error = Kvm::open_at("/nonexistent").unwrap_err();
        assert!(error.to_string().contains("modprobe"), "{error}");
        let error = Kvm::open_at("/dev/null").unwrap_err();
        assert!(matches!(error, KvmError::ApiVersion(-1)), "{error}");
        assert!(matches!(
            Kvm::open_at("/").unwrap_err(),
            KvmError::Open(_) | KvmError::Permission
        ));
    }
}
