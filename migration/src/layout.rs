//! Where the guest's RAM is, and the page numbers that the engine counts in.
//!
//! Pages are numbered densely over all regions in order of their guest physical address, so that
//! a bitmap over them has no hole where the address space has one (below 4 GiB).

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
        assert_eq!(layout.unwrap().pages(), 4);
    }
}
