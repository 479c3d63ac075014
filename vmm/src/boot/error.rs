//! Why a guest can't be booted.

use std::io;

/// Why a guest can't be booted. Texts about a file don't name it: the caller knows its path.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is some other kind of file.
    #[error(
        "the kernel is {found}; expected is a kernel for 64-bit x86: an ELF file with a PVH \
         note, a 64-bit Linux ELF file (vmlinux), or a Linux bzImage"
    )]
    NotAKernel {
        /// What the file is, as far as can be told.
        found: String,
    },
    /// The kernel can't be read.
    #[error("cannot read the kernel: {0}")]
    ReadKernel(io::Error),
    /// The kernel's headers contradict each other or the file.
    #[error("the kernel is damaged: {0}")]
    Damaged(String),
    /// The kernel wants memory that isn't RAM, or is the VMM's.
    #[error(
        "the kernel needs the memory from {start:#x} to {end:#x} ({what}), but RAM for it is from \
         0x100000 to {ram_end:#x}{remedy}"
    )]
    KernelPlace {
        /// The first address.
        start: u64,
        /// The end.
        end: u64,
        /// Which part of the kernel.
        what: &'static str,
        /// Where RAM below the hole ends.
        ram_end: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// linux-loader refused the kernel.
    #[error("cannot load the kernel: {0}")]
    Loader(#[from] linux_loader::loader::Error),
    /// The initrd can't be read.
    #[error("cannot read the initrd: {0}")]
    ReadInitrd(io::Error),
    /// The initrd has no bytes.
    #[error("the initrd is empty")]
    EmptyInitrd,
    /// No room between the kernel and the end of low RAM.
    #[error(
        "the initrd of {len} bytes does not fit between the kernel's end ({from:#x}) and {to:#x}; \
         give the guest more memory"
    )]
    InitrdPlace {
        /// Its length.
        len: u64,
        /// The end of the kernel.
        from: u64,
        /// The end of the memory in which it may lie.
        to: u64,
    },
    /// A file got shorter while it was being read.
    #[error("cannot load {what} into guest memory at {addr:#x}: {reason}")]
    Load {
        /// The file.
        what: &'static str,
        /// The guest physical address.
        addr: u64,
        /// What vm-memory said.
        reason: vm_memory::GuestMemoryError,
    },
    /// Longer than the kernel takes.
    #[error(
        "the kernel command line has {len} bytes{}; this kernel takes at most {most}",
        if *devices > 0 {
            format!(", {devices} of them to name the virtio devices")
        } else {
            String::new()
        }
    )]
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// How much of it was added to name the virtio devices.
        devices: usize,
        /// The kernel's limit.
        most: usize,
    },
    /// A zero byte, which would end it.
    #[error("the kernel command line has a zero byte at offset {0}")]
    CommandLineZero(usize),
    /// The VMM's own tables could not be written.
    #[error("cannot write boot data to guest memory at {addr:#x}: {reason}")]
    Write {
        /// The guest physical address.
        addr: u64,
        /// What vm-memory said.
        reason: vm_memory::GuestMemoryError,
    },
}
