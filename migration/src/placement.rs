//! Guest memory at the destination: what has come, and whether it is whole and undamaged. Several
//! connections place into it at once.
//!
//! The lock is held over the sets of pages only, briefly for each frame, and never while data is
//! received, checked, decompressed or written. So two connections that bring the same page at the
//! same time leave it in one state or the other, or in a mixture; which frames may not overtake each
//! other is BARRIER's business.

mod encoded;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use self::encoded::{EncodedError, Unpacker};

use crate::bitmap::{PageBitmap, PageRun};
use crate::guest_io::{DiscardError, GuestPages, MemoryError};
use crate::layout::{GuestRam, Layout, PAGE_SIZE};

/// What is wrong with the memory when all should be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Incomplete {
    /// Pages that never came.
    #[error("{count} pages of guest memory never came, the first at {address:#x}")]
    Missing {
        /// How many.
        count: u64,
        /// The guest physical address of the first.
        address: u64,
    },
    /// Pages whose last copy doesn't match its checksum.
    #[error("{count} pages of guest memory were damaged on the way, the first at {address:#x}")]
    Damaged {
        /// How many.
        count: u64,
        /// The guest physical address of the first.
        address: u64,
    },
}

/// How many pages have come, each time counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// With their data.
    pub(crate) pages: u64,
    /// As zeroes.
    pub(crate) zero: u64,
}

/// The memory of the arriving guest.
pub(crate) struct Placement {
    memory: GuestPages,
    checked: bool,
    came: Mutex<Came>,
}

struct Came {
    /// Pages that never came.
    missing: PageBitmap,
    /// Pages that hold what came, and so may not be zero.
    written: PageBitmap,
    /// Pages whose last copy didn't match its checksum: the guest wrote to it meanwhile, and it
    /// will come again, or it was damaged. `None` if pages come without checksums.
    suspect: Option<PageBitmap>,
    counts: Counts,
}

impl Placement {
    /// Memory that is all zero. Pages that are `checked` come with their checksums.
    pub(crate) fn new(ram: GuestRam, checked: bool) -> Result<Self, MemoryError> {
        let memory = GuestPages::new(ram)?;
        let pages = memory.layout().pages();
        Ok(Self {
            memory,
            checked,
            came: Mutex::new(Came {
                missing: PageBitmap::full(pages),
                written: PageBitmap::new(pages),
                suspect: checked.then(|| PageBitmap::new(pages)),
                counts: Counts::default(),
            }),
        })
    }

    fn came(&self) -> MutexGuard<'_, Came> {
        self.came.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory itself. What is written there has to be [told](Self::arrived) afterwards.
    pub(crate) fn memory(&self) -> &GuestPages {
        &self.memory
    }

    /// Whether pages come with their checksums.
    pub(crate) fn is_checked(&self) -> bool {
        self.checked
    }

    pub(crate) fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    pub(crate) fn counts(&self) -> Counts {
        self.came().counts
    }

    pub(crate) fn missing(&self) -> u64 {
        self.came().missing.count()
    }

    /// Backs the runs that are to be written for the first time with memory.
    pub(crate) fn populate(&self, runs: &[PageRun]) {
        let fresh: Vec<_> = {
            let came = self.came();
            let fresh = |run: &&PageRun| run.count > 1 && !came.written.test(run.first);
            runs.iter().filter(fresh).copied().collect()
        };
        for run in fresh {
            self.memory.populate(run);
        }
    }

    /// The pages of `runs` have come, and those that are not `wrong` were placed. Those that are
    /// didn't match their checksums.
    pub(crate) fn arrived(&self, runs: &[PageRun], wrong: &[u64]) {
        let mut came = self.came();
        for run in runs {
            came.missing.clear_range(run.first, run.count);
            came.written.set_range(run.first, run.count);
            came.counts.pages += run.count;
        }
        if let Some(suspect) = &mut came.suspect {
            for run in runs {
                suspect.clear_range(run.first, run.count);
            }
            for page in wrong {
                suspect.set(*page);
            }
        }
    }

    /// Makes runs zero: what has not been written is so already, and stays untouched.
    pub(crate) fn zero(&self, runs: &[PageRun]) {
        let mut written = Vec::new();
        {
            let mut came = self.came();
            for run in runs {
                written.extend(came.written.runs(run.first, run.count, u64::MAX));
                came.written.clear_range(run.first, run.count);
                came.missing.clear_range(run.first, run.count);
                came.counts.zero += run.count;
                if let Some(suspect) = &mut came.suspect {
                    suspect.clear_range(run.first, run.count);
                }
            }
        }
        for run in written {
            self.memory.fill_zero(run);
        }
    }

    /// The first page of `runs` that never came, if there is one.
    fn never_came(&self, runs: &[PageRun]) -> Option<u64> {
        let came = self.came();
        let mut missing = runs
            .iter()
            .map(|run| came.missing.next_set_before(run.first, run.end()));
        missing.find_map(|page| page)
    }

    /// The guest physical address of a page.
    fn address(&self, page: u64) -> u64 {
        let run = PageRun {
            first: page,
            count: 1,
        };
        self.memory.addresses(run).address
    }

    /// Gives all of the memory back to the kernel, before anything is in it: fails if that can't be
    /// done, as with locked memory.
    pub(crate) fn drop_all(&self) -> Result<(), DiscardError> {
        self.memory.discard_all()
    }

    /// The memory, the pages that never came, and those whose last copy was not right, if that is
    /// known.
    pub(crate) fn into_parts(self) -> (GuestPages, PageBitmap, Option<PageBitmap>) {
        let came = self
            .came
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        (self.memory, came.missing, came.suspect)
    }

    /// Whether every page has come and none is damaged.
    pub(crate) fn check_complete(&self) -> Result<(), Incomplete> {
        let came = self.came();
        let first = |set: &PageBitmap| {
            set.next_set(0)
                .map(|page| (set.count(), self.address(page)))
        };
        if let Some((count, address)) = first(&came.missing) {
            return Err(Incomplete::Missing { count, address });
        }
        if let Some((count, address)) = came.suspect.as_ref().and_then(first) {
            return Err(Incomplete::Damaged { count, address });
        }
        Ok(())
    }
}

const _: () = assert!(
    PAGE_SIZE == 4096,
    "the wire format counts pages of 4096 bytes"
);

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn a_page_is_suspect_only_where_pages_have_checksums() {
        let all = PageRun { first: 0, count: 4 };
        for checked in [true, false] {
            let ranges = [(GuestAddress(0), 4 * PAGE_SIZE as usize)];
            let ram = GuestRam::from_ranges(&ranges).unwrap();
            let placement = Placement::new(ram, checked).unwrap();
            placement.arrived(&[all], &[2]);
            let damaged = Incomplete::Damaged {
                count: 1,
                address: 2 * PAGE_SIZE,
            };
            let expected = if checked { Err(damaged) } else { Ok(()) };
            assert_eq!(placement.check_complete(), expected);
            placement.arrived(&[all], &[]);
            assert_eq!(placement.check_complete(), Ok(()));
            assert_eq!(placement.into_parts().2.is_some(), checked);
        }
    }
}
