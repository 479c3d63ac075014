//! Guest memory by page number: the one place where the engine touches it. What is in pages is
//! `contents`' business, what is behind them `backing`'s, and `page_io` moves them between memory and a
//! socket without a copy.
#![allow(
    unsafe_code,
    reason = "guest memory is mapped, and used by its raw addresses as it changes at any moment"
)]

mod backing;
mod contents;
mod page_io;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

pub use self::backing::DiscardError;
pub use self::page_io::{Manner, PageIo};

use crate::bitmap::PageRun;
use crate::layout::{GuestRam, Layout, LayoutError, PAGE_SIZE};
use crate::message::AddressRun;

/// Guest memory, by page number.
#[derive(Debug)]
pub struct GuestPages {
    layout: Layout,
    regions: Vec<Mapped>,
    /// Has the mappings that `regions` points into.
    ram: GuestRam,
}

#[derive(Clone, Copy, Debug)]
struct Mapped {
    first: u64,
    pages: u64,
    address: u64,
    host: *mut u8,
    private: bool,
}

// SAFETY: `host` points into a mapping that `GuestPages` keeps, for as long as it lives, and that
// may be used from any thread. Nothing here makes a reference to it: it is read and written through
// raw pointers and by system calls, as memory that the guest's own threads change at any moment.
unsafe impl Send for Mapped {}
// SAFETY: as above; the fields themselves never change.
unsafe impl Sync for Mapped {}

/// Why guest memory cannot be used, or a run of it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The layout is none.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A region's mapping doesn't begin at a page.
    #[error("guest memory at {0:#x} is not mapped at a page boundary")]
    Unaligned(u64),
    /// A run from the peer that is not RAM.
    #[error(
        "{} pages at {:#x} are not within one region of guest RAM", .0.pages, .0.address
    )]
    Outside(AddressRun),
}

impl GuestPages {
    /// Numbers the pages of `ram`.
    pub fn new(ram: GuestRam) -> Result<Self, MemoryError> {
        let layout = Layout::of(&ram)?;
        let mut first = 0;
        let mut regions = Vec::new();
        for (region, mapping) in layout.regions().iter().zip(ram.iter()) {
            let host = mapping.as_ptr();
            if !(host as u64).is_multiple_of(PAGE_SIZE) || mapping.len() != region.len {
                return Err(MemoryError::Unaligned(region.start));
            }
            let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            regions.push(Mapped {
                first,
                pages: region.pages(),
                address: region.start,
                host,
                private: mapping.flags() & private == private && mapping.file_offset().is_none(),
            });
            first += region.pages();
        }
        Ok(Self {
            layout,
            regions,
            ram,
        })
    }

    /// Where the RAM is.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The page numbers of a run that came from a peer: it must be within one region.
    pub fn resolve(&self, run: AddressRun) -> Result<PageRun, MemoryError> {
        let outside = || MemoryError::Outside(run);
        let index = self.regions.partition_point(|r| r.address <= run.address);
        let region = index
            .checked_sub(1)
            .and_then(|index| self.regions.get(index))
            .ok_or_else(outside)?;
        let offset = run.address - region.address;
        let page = offset / PAGE_SIZE;
        let fits = offset.is_multiple_of(PAGE_SIZE)
            && run.pages > 0
            && page < region.pages
            && run.pages <= region.pages - page;
        fits.then_some(PageRun {
            first: region.first + page,
            count: run.pages,
        })
        .ok_or_else(outside)
    }

    /// The guest physical addresses of a run within one region; see [`Self::within_region`].
    pub fn addresses(&self, run: PageRun) -> AddressRun {
        let region = self.region(run.first);
        AddressRun {
            address: region.address + (run.first - region.first) * PAGE_SIZE,
            pages: run.count,
        }
    }

    /// The beginning of `run` that is within one region; the whole run if it is.
    pub fn within_region(&self, run: PageRun) -> PageRun {
        let region = self.region(run.first);
        let left = region.first + region.pages - run.first;
        PageRun {
            first: run.first,
            count: run.count.min(left),
        }
    }

    /// Whether the page is the first of a region.
    pub(crate) fn begins_region(&self, page: u64) -> bool {
        self.region(page).first == page
    }

    /// The host address of a page.
    pub(crate) fn host_address(&self, page: u64) -> u64 {
        self.host(page) as u64
    }

    /// The page at a host address, if it is guest memory.
    pub(crate) fn page_at_host_address(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let page = address.checked_sub(region.host as u64)? / PAGE_SIZE;
            (page < region.pages).then_some(region.first + page)
        })
    }

    fn region(&self, page: u64) -> &Mapped {
        let index = self.regions.partition_point(|r| r.first <= page) - 1;
        let region = &self.regions[index];
        assert!(page - region.first < region.pages, "no page {page}");
        region
    }

    /// The address of a page, valid for [`PAGE_SIZE`] bytes.
    fn host(&self, page: u64) -> *mut u8 {
        let region = self.region(page);
        // SAFETY: `region` has checked that the page is within the mapping.
        unsafe {
            region
                .host
                .add(((page - region.first) * PAGE_SIZE) as usize)
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    /// Eight pages, and four beyond a gap.
    pub(super) fn memory() -> (GuestRam, GuestPages) {
        let ram: GuestRam = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 8 * PAGE_SIZE as usize),
            (GuestAddress(1 << 32), 4 * PAGE_SIZE as usize),
        ])
        .unwrap();
        (ram.clone(), GuestPages::new(ram).unwrap())
    }

    #[test]
    fn only_runs_within_a_region_are_ram() {
        let (_, pages) = memory();
        let run = |address, pages| AddressRun { address, pages };
        for (address, count, first) in [(0, 8, 0), (7 << 12, 1, 7), ((1 << 32) + 4096, 3, 9)] {
            let resolved = PageRun { first, count };
            assert_eq!(pages.resolve(run(address, count)), Ok(resolved));
            assert_eq!(pages.addresses(resolved), run(address, count));
        }
        for (address, count) in [
            (0, 9),
            (0, 0),
            (1, 1),
            (8 << 12, 1),
            ((1 << 32) - 4096, 2),
            ((1 << 32) + 4096, 4),
            ((1 << 32) + (4 << 12), 1),
            (u64::MAX - 4095, 1),
            (4096, u64::MAX),
        ] {
            assert_eq!(
                pages.resolve(run(address, count)),
                Err(MemoryError::Outside(run(address, count))),
            );
        }
        let across = PageRun { first: 6, count: 4 };
        assert_eq!(pages.within_region(across), PageRun { first: 6, count: 2 });
    }

    #[test]
    fn host_addresses_are_those_of_pages() {
        let (_, pages) = memory();
        for page in 0..pages.layout().pages() {
            let address = pages.host_address(page);
            assert_eq!(pages.page_at_host_address(address), Some(page));
            assert_eq!(pages.page_at_host_address(address + 4095), Some(page));
        }
        for outside in [0, u64::MAX] {
            assert_eq!(pages.page_at_host_address(outside), None);
        }
    }
}
