//! Guest memory at the destination: what has come, and whether it is whole and undamaged.

mod encoded;

pub(crate) use self::encoded::{EncodedError, Unpacker};

use crate::bitmap::{PageBitmap, PageRun};
use crate::channel::Channel;
use crate::destination::DestinationError;
use crate::guest_io::{DiscardError, GuestPages, MemoryError};
use crate::layout::{GuestRam, Layout, PAGE_SIZE};
use crate::message::AddressRun;

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
    /// Pages that never came.
    missing: PageBitmap,
    /// Pages that hold what came, and so may not be zero.
    written: PageBitmap,
    /// Pages whose last copy didn't match its checksum: the guest wrote to it meanwhile, and it
    /// will come again, or it was damaged.
    suspect: PageBitmap,
    runs: Vec<PageRun>,
    counts: Counts,
}

impl Placement {
    /// Memory that is all zero.
    pub(crate) fn new(ram: GuestRam) -> Result<Self, MemoryError> {
        let memory = GuestPages::new(ram)?;
        let pages = memory.layout().pages();
        Ok(Self {
            memory,
            missing: PageBitmap::full(pages),
            written: PageBitmap::new(pages),
            suspect: PageBitmap::new(pages),
            runs: Vec::new(),
            counts: Counts::default(),
        })
    }

    pub(crate) fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    pub(crate) fn missing(&self) -> u64 {
        self.missing.count()
    }

    fn resolve(&mut self, runs: &[AddressRun]) -> Result<(), MemoryError> {
        self.runs.clear();
        for &run in runs {
            self.runs.push(self.memory.resolve(run)?);
        }
        Ok(())
    }

    /// Receives the data of a PAGES frame. All runs are checked before the first byte is placed.
    pub(crate) fn receive(
        &mut self,
        channel: &mut Channel,
        runs: &[AddressRun],
        crcs: &[u32],
    ) -> Result<(), DestinationError> {
        self.resolve(runs)?;
        self.populate();
        channel.receive_pages(&self.memory, &self.runs)?;
        let pages = self.runs.iter().flat_map(|run| run.first..run.end());
        for (page, crc) in pages.zip(crcs) {
            if self.memory.crc(page) == *crc {
                self.suspect.clear(page);
            } else {
                self.suspect.set(page);
            }
        }
        for run in &self.runs {
            self.missing.clear_range(run.first, run.count);
            self.written.set_range(run.first, run.count);
        }
        self.counts.pages += crcs.len() as u64;
        Ok(())
    }

    /// Backs the runs that are to be written for the first time with memory.
    fn populate(&self) {
        for &run in &self.runs {
            if !self.written.test(run.first) && run.count > 1 {
                self.memory.populate(run);
            }
        }
    }

    fn address(&self, page: u64) -> u64 {
        let run = PageRun {
            first: page,
            count: 1,
        };
        self.memory.addresses(run).address
    }

    /// Makes runs zero: what has not been written is so already, and stays untouched.
    pub(crate) fn zero(&mut self, runs: &[AddressRun]) -> Result<(), MemoryError> {
        self.resolve(runs)?;
        for run in &self.runs {
            for written in self.written.runs(run.first, run.count, u64::MAX) {
                self.memory.fill_zero(written);
            }
            self.written.clear_range(run.first, run.count);
            self.suspect.clear_range(run.first, run.count);
            self.missing.clear_range(run.first, run.count);
            self.counts.zero += run.count;
        }
        Ok(())
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &GuestPages {
        &self.memory
    }

    /// Gives all of the memory back to the kernel, before anything is in it: fails if that can't be
    /// done, as with locked memory.
    pub(crate) fn drop_all(&self) -> Result<(), DiscardError> {
        self.memory.discard_all()
    }

    /// The memory, the pages that never came, and those whose last copy was not right.
    pub(crate) fn into_parts(self) -> (GuestPages, PageBitmap, PageBitmap) {
        (self.memory, self.missing, self.suspect)
    }

    /// Whether every page has come and none is damaged.
    pub(crate) fn check_complete(&self) -> Result<(), Incomplete> {
        let first = |set: &PageBitmap| {
            set.next_set(0)
                .map(|page| (set.count(), self.address(page)))
        };
        if let Some((count, address)) = first(&self.missing) {
            return Err(Incomplete::Missing { count, address });
        }
        if let Some((count, address)) = first(&self.suspect) {
            return Err(Incomplete::Damaged { count, address });
        }
        Ok(())
    }
}

const _: () = assert!(
    PAGE_SIZE == 4096,
    "the wire format counts pages of 4096 bytes"
);
