//! What can go wrong with userfaultfd.

use std::io;

use crate::layout::PAGE_SIZE;

/// Why there is no userfaultfd, or what it refuses.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// Neither way to get one works.
    #[error(
        "no userfaultfd that serves KVM's faults: /dev/userfaultfd: {device}; the system call: {call}. Allow this user to open /dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1, or run with CAP_SYS_PTRACE, on a kernel built with CONFIG_USERFAULTFD"
    )]
    Unavailable {
        /// What the device said.
        device: io::Error,
        /// What the system call said.
        call: io::Error,
    },
    /// The kernel speaks another version of the interface.
    #[error("the kernel's userfaultfd doesn't know this interface: {0}")]
    Handshake(io::Error),
    /// Memory of a kind whose pages can't be put in place one by one, such as huge pages.
    #[error(
        "the kernel can't put single pages into this memory: post-copy needs anonymous or shared memory of {PAGE_SIZE}-byte pages"
    )]
    Unsupported,
    /// An operation on guest memory.
    #[error("userfaultfd: {doing} {pages} pages at guest address {address:#x}: {error}")]
    Pages {
        /// What was being done.
        doing: &'static str,
        /// How many pages.
        pages: u64,
        /// The guest physical address of the first.
        address: u64,
        /// What the kernel says.
        error: io::Error,
    },
    /// The faults can't be read.
    #[error("cannot read the faults of guest memory: {0}")]
    Read(io::Error),
    /// [`Userfault::probe`] put a page in place, and it isn't there.
    #[error("userfaultfd doesn't work here: a page put in place does not hold what it should")]
    Broken,
    /// No page of memory to try it with.
    #[error("cannot map a page to try userfaultfd with: {0}")]
    Probe(String),
}
