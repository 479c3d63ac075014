//! The guest's RAM: where it is in the guest physical address space, and its mapping.
//!
//! RAM starts at 0. What doesn't fit below 3 GiB continues at 4 GiB: the GiB in between is where
//! a PC has its devices (I/O APIC at 0xfec0_0000, local APICs at 0xfee0_0000, room for
//! memory-mapped devices that a 32-bit address must reach), and where KVM wants a few pages of its
//! own on Intel (see [`crate::kvm::Vm`]). Everything that is loaded for boot lies below the hole.

use migration::layout::{GuestRam, Layout, LayoutError, MAX_RAM, PAGE_SIZE, Region};
use vm_memory::GuestAddress;

/// The least RAM that a guest can have, in bytes: 16 MiB.
pub const MIN_RAM: u64 = 16 << 20;

/// The end of the RAM below 4 GiB, at most: where the hole for devices begins.
pub const HOLE_START: u64 = 3 << 30;

/// Where the RAM that doesn't fit below the hole continues.
pub const HOLE_END: u64 = 4 << 30;

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
        reason: vm_memory::mmap::FromRangesError,
    },
}

/// The RAM of this host in bytes, swap left out.
pub fn of_host() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

/// The layout of a machine with `bytes` of RAM, of [`MIN_RAM`] to [`MAX_RAM`] in whole pages.
pub fn layout(bytes: u64) -> Result<Layout, MemoryError> {
    if bytes < MIN_RAM {
        return Err(MemoryError::TooSmall(bytes));
    }
    if bytes > MAX_RAM {
        return Err(MemoryError::TooLarge(bytes));
    }
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::PartialPage(bytes));
    }
    let low = bytes.min(HOLE_START);
    let mut regions = vec![Region { start: 0, len: low }];
    if bytes > low {
        regions.push(Region {
            start: HOLE_END,
            len: bytes - low,
        });
    }
    Ok(Layout::new(regions)?)
}

/// Maps RAM for `layout`: private anonymous memory that reads as zeroes and takes no space until
/// it is touched (the host is not asked to reserve it).
pub fn map(layout: &Layout) -> Result<GuestRam, MemoryError> {
    let ranges: Vec<_> = layout
        .regions()
        .iter()
        .map(|region| (GuestAddress(region.start), region.len as usize))
        .collect();
    GuestRam::from_ranges(&ranges).map_err(|reason| MemoryError::Map {
        bytes: layout.bytes(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    fn regions(bytes: u64) -> Vec<(u64, u64)> {
        let layout = layout(bytes).unwrap();
        assert_eq!(layout.bytes(), bytes);
        let regions = layout.regions().iter();
        regions.map(|region| (region.start, region.len)).collect()
    }

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        assert_eq!(regions(MIN_RAM), [(0, MIN_RAM)]);
        assert_eq!(
            regions(MIN_RAM + PAGE_SIZE),
            [(0, MIN_RAM + PAGE_SIZE)],
            "any whole number of pages"
        );
        assert_eq!(regions(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(
            regions(HOLE_START + PAGE_SIZE),
            [(0, HOLE_START), (HOLE_END, PAGE_SIZE)]
        );
        assert_eq!(
            regions(8 << 30),
            [(0, HOLE_START), (HOLE_END, (8 << 30) - HOLE_START)]
        );
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for (bytes, expected) in [
            (0, "too small: a guest needs at least 16 MiB"),
            (MIN_RAM - PAGE_SIZE, "too small"),
            (MIN_RAM + 1, "not a multiple of the page size, 4096 bytes"),
            (MAX_RAM + PAGE_SIZE, "too large: at most 16 TiB"),
            (u64::MAX, "too large"),
        ] {
            let error = layout(bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{bytes}: {error}");
        }
    }

    #[test]
    fn mapped_ram_has_the_layout_and_reads_as_zeroes() {
        let layout = layout(HOLE_START + (64 << 20)).unwrap();
        let ram = map(&layout).unwrap();
        assert_eq!(Layout::of(&ram).unwrap(), layout);
        let last = GuestAddress(HOLE_END + (64 << 20) - 8);
        assert_eq!(ram.read_obj::<u64>(last).unwrap(), 0);
        assert!(ram.write_obj(1u8, GuestAddress(HOLE_START)).is_err());
        assert_eq!(ram.num_regions(), 2);
    }
}
