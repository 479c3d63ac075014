//! What can go wrong with memory that comes late.

use crate::guest_io::DiscardError;
use crate::userfault::UserfaultError;

/// Why memory can't come late, or a piece of it is refused.
#[derive(Debug, thiserror::Error)]
pub enum LateError {
    /// The kernel's part.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// Stale pages can't be dropped.
    #[error(transparent)]
    Discard(#[from] DiscardError),
    /// A page was damaged on the way. Nothing of what came with it was placed.
    #[error("the page at {address:#x} does not match its checksum")]
    Damaged {
        /// The guest physical address.
        address: u64,
    },
    /// Pages, their data and their checksums are not equally many.
    #[error("{pages} pages came with {bytes} bytes and {checksums} checksums")]
    Uneven {
        /// How many pages the runs have.
        pages: u64,
        /// How many bytes of data.
        bytes: usize,
        /// How many checksums.
        checksums: usize,
    },
    /// Pages that there aren't.
    #[error("pages {first} to {end} (excluded) are not among the {pages} of guest memory")]
    Outside {
        /// The first page's number.
        first: u64,
        /// The number of the page after the last.
        end: u64,
        /// How many pages there are.
        pages: u64,
    },
    /// A set of pages that doesn't begin at a word of the whole.
    #[error("a set of pages begins at page {0}, which is not a multiple of 64")]
    Unaligned(u64),
    /// A fault elsewhere.
    #[error("a fault at the host address {0:#x}, which is not guest memory")]
    NotGuestMemory(u64),
    /// Letting go of memory that is not there yet.
    #[error("{0} pages of guest memory have not come yet")]
    Unfinished(u64),
}
