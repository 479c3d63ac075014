//! Dropping guest memory: the host gets it back, and it reads as zeroes until it is written.
#![allow(
    unsafe_code,
    reason = "madvise(MADV_DONTNEED) and MADV_REMOVE, which change what memory holds"
)]

use std::ffi::c_void;
use std::io;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::PAGE;
use crate::virtio::GuestRam;

/// Why a range can't be dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiscardError {
    /// Some of it is not RAM; what is RAM was dropped.
    #[error("{len} bytes at {start:#x} are not all RAM")]
    NotRam {
        /// The guest physical address.
        start: u64,
        /// The length in bytes.
        len: u64,
    },
    /// The kernel.
    #[error("the host can't take back {len} bytes at {start:#x}: {source}")]
    Advise {
        /// The guest physical address.
        start: u64,
        /// The length in bytes.
        len: u64,
        /// What the kernel says.
        source: io::Error,
    },
}

/// Drops the whole pages among the `len` bytes at the guest physical address `start`. They are
/// recorded as written, after they have changed, as for every other write of the VMM's.
///
/// Huge pages of the host's pool stay: given back, they would not be reserved any more, and a guest
/// that finds none later can't go on.
pub(super) fn discard(memory: &GuestRam, start: u64, len: u64) -> Result<(), DiscardError> {
    let end = start.saturating_add(len) / PAGE * PAGE;
    let start = start.next_multiple_of(PAGE);
    let len = end.saturating_sub(start);
    let mut found = 0;
    for region in memory.iter() {
        let first = region.start_addr().0;
        let from = start.max(first);
        let to = end.min(first.saturating_add(region.len()));
        if from >= to {
            continue;
        }
        let (offset, count) = ((from - first) as usize, (to - from) as usize);
        found += to - from;
        if region.is_hugetlbfs() == Some(true) {
            continue;
        }
        // Of a shared mapping, MADV_DONTNEED would drop the page tables and keep the contents.
        let advice = match region.file_offset() {
            None => Advice::LinuxDontNeed,
            Some(_) => Advice::LinuxRemove,
        };
        // SAFETY: the range lies within the region's mapping, which `memory` keeps. It is the
        // guest's: no reference to it exists in this process, and whoever reads it through
        // vm-memory expects it to change at any time.
        let advised = unsafe {
            let host = region.as_ptr().add(offset).cast::<c_void>();
            madvise(host, count, advice)
        };
        match advised {
            Ok(()) => {}
            // A file system whose files have no holes: it was only a hint.
            Err(Errno::OPNOTSUPP) => continue,
            Err(source) => {
                return Err(DiscardError::Advise {
                    start: from,
                    len: to - from,
                    source: source.into(),
                });
            }
        }
        GuestMemoryRegion::bitmap(region).mark_dirty(offset, count);
    }
    if found == len {
        Ok(())
    } else {
        Err(DiscardError::NotRam { start, len })
    }
}
