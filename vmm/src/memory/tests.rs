//! The layout of guest memory, and what stands behind it.

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
    let ram = map(&layout, &Backing::default()).unwrap();
    assert_eq!(Layout::of(&ram).unwrap(), layout);
    let last = GuestAddress(HOLE_END + (64 << 20) - 8);
    assert_eq!(ram.read_obj::<u64>(last).unwrap(), 0);
    assert!(ram.write_obj(1u8, GuestAddress(HOLE_START)).is_err());
    assert_eq!(ram.num_regions(), 2);
}
