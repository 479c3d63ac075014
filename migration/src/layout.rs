//! Where the guest's RAM is, and the page numbers that the engine counts in.
//!
//! Pages are numbered densely over all regions in order of their guest physical address, so that
//! a bitmap over them has no hole where the address space has one (below 4 GiB).

use crate::bitmap::PageRun;
use crate::message::AddressRun;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// The page size that dirty logging and the wire count in, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// The most regions that a layout may have.
pub const MAX_REGIONS: usize = 512;

/// The most bytes of RAM that a layout may have: 16 TiB.
pub const MAX_RAM: u64 = 1 << 44;

/// Guest memory, mapped. Writes by the VMM through vm-memory's interface are recorded in the
/// regions' bitmaps.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// A run of guest physical memory, in bytes; both are multiples of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The guest physical address.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
}

impl Region {
    /// The number of pages in the region.
    pub fn pages(&self) -> u64 {
        self.len / PAGE_SIZE
    }
}

/// A well-formed memory layout: at least one region, each non-empty and made of whole pages,
/// ascending, without overlap, within the bounds of this module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<Region>,
}

/// Why a list of regions is no layout.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No region at all.
    #[error("the memory layout is empty")]
    Empty,
    /// More regions than [`MAX_REGIONS`].
    #[error("the memory layout has {0} regions; at most {MAX_REGIONS} are supported")]
    TooManyRegions(usize),
    /// More memory than [`MAX_RAM`].
    #[error("the memory layout is larger than {MAX_RAM} bytes")]
    TooLarge,
    /// Not whole pages, empty, or past the end of the address space.
    #[error(
        "memory region {start:#x} of {len:#x} bytes is not made of whole {PAGE_SIZE}-byte pages"
    )]
    Malformed {
        /// The guest physical address.
        start: u64,
        /// The length in bytes.
        len: u64,
    },
    /// Starts before the previous one ends.
    #[error("memory region {start:#x} overlaps the one before it, or is out of order")]
    Disorder {
        /// The guest physical address.
        start: u64,
    },
}

impl Layout {
    /// Checks the regions.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        if regions.len() > MAX_REGIONS {
            return Err(LayoutError::TooManyRegions(regions.len()));
        }
        let mut free_from = 0;
        let mut total = 0u64;
        for &Region { start, len } in &regions {
            let end = start.checked_add(len);
            let (Some(end), true, true, true) = (
                end,
                len > 0,
                start.is_multiple_of(PAGE_SIZE),
                len.is_multiple_of(PAGE_SIZE),
            ) else {
                return Err(LayoutError::Malformed { start, len });
            };
            if start < free_from {
                return Err(LayoutError::Disorder { start });
            }
            free_from = end;
            total = total.saturating_add(len);
        }
        if total > MAX_RAM {
            return Err(LayoutError::TooLarge);
        }
        Ok(Self { regions })
    }

    /// The layout of mapped memory.
    pub fn of(ram: &GuestRam) -> Result<Self, LayoutError> {
        Self::new(
            ram.iter()
                .map(|region| Region {
                    start: region.start_addr().raw_value(),
                    len: region.len(),
                })
                .collect(),
        )
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The number of pages in all regions.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(Region::pages).sum()
    }

    /// The regions, each with the number of its first page.
    fn numbered(&self) -> impl Iterator<Item = (u64, &Region)> {
        let mut next = 0;
        self.regions.iter().map(move |region| {
            let first = next;
            next += region.pages();
            (first, region)
        })
    }

    /// The page numbers of a run of addresses, if it is within one region.
    pub fn page_run(&self, run: AddressRun) -> Option<PageRun> {
        let (first, region) = self.numbered().find(|(_, region)| {
            region.start <= run.address && run.address - region.start < region.len
        })?;
        let offset = run.address - region.start;
        let page = offset / PAGE_SIZE;
        let fits =
            offset.is_multiple_of(PAGE_SIZE) && run.pages > 0 && run.pages <= region.pages() - page;
        fits.then_some(PageRun {
            first: first + page,
            count: run.pages,
        })
    }

    /// The guest physical addresses of a run of pages, if it is within one region.
    pub fn addresses(&self, run: PageRun) -> Option<AddressRun> {
        let (first, region) = self
            .numbered()
            .find(|(first, region)| *first <= run.first && run.end() <= first + region.pages())?;
        Some(AddressRun {
            address: region.start + (run.first - first) * PAGE_SIZE,
            pages: run.count,
        })
    }

    /// Whether that page is the first of a region.
    pub fn begins_region(&self, page: u64) -> bool {
        self.numbered().any(|(first, _)| first == page)
    }

    /// The number of bytes in all regions.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_layouts_are_refused() {
        let region = |start, len| Region { start, len };
        assert_eq!(Layout::new(vec![]), Err(LayoutError::Empty));
        for (start, len) in [
            (0, 0),
            (1, PAGE_SIZE),
            (0, 5),
            (u64::MAX - 4095, 2 * PAGE_SIZE),
        ] {
            assert_eq!(
                Layout::new(vec![region(start, len)]),
                Err(LayoutError::Malformed { start, len })
            );
        }
        assert_eq!(
            Layout::new(vec![region(0, 2 * PAGE_SIZE), region(PAGE_SIZE, PAGE_SIZE)]),
            Err(LayoutError::Disorder { start: PAGE_SIZE })
        );
        assert_eq!(
            Layout::new(vec![region(0, 2 * MAX_RAM)]),
            Err(LayoutError::TooLarge)
        );
        let layout = Layout::new(vec![region(0, PAGE_SIZE), region(1 << 32, 3 * PAGE_SIZE)]);
        let layout = layout.unwrap();
        assert_eq!(layout.pages(), 4);
        let run = |address, pages| AddressRun { address, pages };
        for (address, count, first) in [(0, 1, 0), ((1 << 32) + PAGE_SIZE, 2, 2)] {
            let pages = PageRun { first, count };
            assert_eq!(layout.page_run(run(address, count)), Some(pages));
            assert_eq!(layout.addresses(pages), Some(run(address, count)));
        }
        for (address, count) in [(0, 2), (1, 1), (PAGE_SIZE, 1), (0, 0), (1 << 32, u64::MAX)] {
            assert_eq!(layout.page_run(run(address, count)), None);
        }
        assert_eq!(layout.addresses(PageRun { first: 0, count: 2 }), None);
        assert!(layout.begins_region(1) && !layout.begins_region(2));
    }
}
