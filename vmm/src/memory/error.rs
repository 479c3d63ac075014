//! What can be wrong with guest memory.

use std::io;
use std::path::PathBuf;

use migration::layout::{LayoutError, MAX_RAM, PAGE_SIZE};

use super::MIN_RAM;
use super::hugetlb::list;
use crate::control::size::format_size;
use crate::host_list::format_list;

/// Why a guest can't have the RAM that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Less than [`MIN_RAM`].
    #[error("memory of {0} bytes is too small: a guest needs at least {min} MiB", min = MIN_RAM >> 20)]
    TooSmall(u64),
    /// More than [`MAX_RAM`].
    #[error("memory of {0} bytes is too large: at most {max} TiB are supported", max = MAX_RAM >> 40)]
    TooLarge(u64),
    /// Not a whole number of pages.
    #[error("memory of {0} bytes is not a multiple of the page size, {PAGE_SIZE} bytes")]
    PartialPage(u64),
    /// A layout that no machine can have.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The address space or the commit limit of this process is used up.
    #[error(
        "cannot map {bytes} bytes of guest memory: {reason} (check `ulimit -v`, the container's \
         memory limit and vm.overcommit_memory)"
    )]
    Map {
        /// The size of the RAM.
        bytes: u64,
        /// What vm-memory said.
        reason: String,
    },
    /// The kernel has no huge pages.
    #[error("this host has no huge pages (its kernel was built without hugetlbfs)")]
    NoHugePages,
    /// No pool of that size.
    #[error(
        "this host has no huge pages of {}: there are {} (hugepage-size=)",
        format_size(*.size), list(.sizes)
    )]
    NoSuchHugePages {
        /// Bytes of a huge page.
        size: u64,
        /// Those that there are.
        sizes: Vec<u64>,
    },
    /// Not a whole number of huge pages.
    #[error(
        "memory of {bytes} bytes is not a multiple of the size of a huge page, {}: change the \
         memory's size, or use other huge pages (hugepage-size=) or none",
        format_size(*.size)
    )]
    PartialHugePage {
        /// The size of the RAM.
        bytes: u64,
        /// Bytes of a huge page.
        size: u64,
    },
    /// The pool hasn't enough.
    #[error(
        "guest memory takes {needed} huge pages of {}, but {free} are free: reserve more (write \
         their number to {pool}; for the default size: sysctl vm.nr_hugepages=N)",
        format_size(*.size)
    )]
    TooFewHugePages {
        /// Bytes of a huge page.
        size: u64,
        /// How many the memory takes.
        needed: u64,
        /// How many nobody has or is promised.
        free: u64,
        /// The file that says how many there are.
        pool: String,
    },
    /// MADV_HUGEPAGE.
    #[error(
        "transparent huge pages can't be used: {0} (the kernel may have been built without; \
         see /sys/kernel/mm/transparent_hugepage)"
    )]
    Transparent(io::Error),
    /// No shared memory.
    #[error("cannot create shared memory: {0}")]
    Memfd(io::Error),
    /// The directory for the memory's file can't be used.
    #[error("cannot create the file of guest memory in {path}: {error}", path = .path.display())]
    Path {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The file can't be that long.
    #[error("cannot make the file of guest memory {bytes} bytes long: {error}")]
    File {
        /// The size of the RAM.
        bytes: u64,
        /// Why.
        error: io::Error,
    },
    /// The file system hasn't enough.
    #[error(
        "guest memory takes {bytes} bytes, but {path} has only {free} free",
        path = .path.display()
    )]
    NoRoom {
        /// The directory.
        path: PathBuf,
        /// The size of the RAM.
        bytes: u64,
        /// What is free.
        free: u64,
    },
    /// Huge pages were asked for in a directory that hasn't any.
    #[error(
        "{path} has no huge pages: give the mount point of a hugetlbfs, or hugepages=on without \
         path=",
        path = .0.display()
    )]
    NoHugetlbfs(PathBuf),
    /// Its huge pages are of another size.
    #[error(
        "the huge pages of {path} are of {}, not of {} (hugepage-size=)",
        format_size(*.there), format_size(*.wanted), path = .path.display()
    )]
    OtherHugetlbfs {
        /// The directory.
        path: PathBuf,
        /// Bytes of a huge page that was asked for.
        wanted: u64,
        /// Bytes of one that is there.
        there: u64,
    },
    /// Transparent huge pages of a hugetlbfs.
    #[error("{path} has huge pages of its own: hugepages=transparent is for other memory", path = .0.display())]
    TransparentHugetlbfs(PathBuf),
    /// Preallocated memory that isn't there.
    #[error(
        "prealloc=on: guest memory takes {bytes} bytes, but the host has only {available} available"
    )]
    NotAvailable {
        /// The size of the RAM.
        bytes: u64,
        /// What the host has.
        available: u64,
    },
    /// The kernel couldn't allocate all of it.
    #[error(
        "prealloc=on: the host can't give {bytes} bytes of guest memory: {error} (check what is \
         free on the nodes, in the pool of huge pages or in path=, and the container's memory \
         limit; it needs Linux 5.14)"
    )]
    Populate {
        /// The size of the RAM.
        bytes: u64,
        /// Why.
        error: io::Error,
    },
    /// The host doesn't tell which nodes it has.
    #[error("host-nodes: cannot read which nodes this host has: {0}")]
    Nodes(io::Error),
    /// A node that the host doesn't have.
    #[error("host-nodes: this host has no node {node} with memory, only {}", format_list(.nodes))]
    NoNode {
        /// It.
        node: usize,
        /// Those with memory.
        nodes: Vec<usize>,
    },
    /// mbind.
    #[error("guest memory can't be bound to the nodes of host-nodes: {0}")]
    Bind(io::Error),
}
