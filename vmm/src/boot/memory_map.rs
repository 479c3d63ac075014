//! The memory map that the guest is told: e820, in Linux's and PVH's form the same.

use migration::layout::GuestRam;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::HOLE_START;

/// The end of the conventional memory: the last KiB below 640 KiB is traditionally the BIOS's.
const LOW_MEMORY_END: u64 = 0x9_fc00;

/// What memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// To be used as the guest likes.
    Ram = 1,
    /// Not to be touched, but for what is known to be there.
    Reserved = 2,
}

/// A piece of the guest physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) addr: u64,
    pub(super) size: u64,
    pub(super) kind: Kind,
}

/// The map for `ram`: all of it is RAM except for 0x9_fc00 to 1 MiB, where PCs have video memory
/// and the BIOS, and Ferry the MP table.
pub(super) fn memory_map(ram: &GuestRam) -> Vec<Entry> {
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if start < end {
            let (addr, size) = (start, end - start);
            map.push(Entry { addr, size, kind });
        }
    };
    for region in ram.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        add(start, end.min(LOW_MEMORY_END), Kind::Ram);
        add(
            start.max(LOW_MEMORY_END),
            end.min(super::HIGH_MEMORY),
            Kind::Reserved,
        );
        add(start.max(super::HIGH_MEMORY), end, Kind::Ram);
    }
    map
}

/// The end of the RAM that begins at 0, at most [`HOLE_START`]; 0 if there is none.
pub(super) fn low_ram_end(ram: &GuestRam) -> u64 {
    let mut end = 0;
    for region in ram.iter() {
        if region.start_addr().raw_value() == end {
            end += region.len();
        }
    }
    end.min(HOLE_START)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn all_ram_is_told_but_for_what_a_pc_reserves() {
        let ram = GuestRam::from_ranges(&[
            (GuestAddress(0), 64 << 20),
            (GuestAddress(4 << 30), 1 << 20),
        ])
        .unwrap();
        let map: Vec<_> = memory_map(&ram)
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.kind as u32))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0x6_0400, 2),
                (0x10_0000, 63 << 20, 1),
                (4 << 30, 1 << 20, 1)
            ]
        );
        assert_eq!(low_ram_end(&ram), 64 << 20);
    }
}
