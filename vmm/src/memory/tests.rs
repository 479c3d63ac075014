//! The layout of guest memory, and what stands behind it.

use super::*;
use guest_tests::driver::hugepages::HugePages;
use migration::layout::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

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

const MIB: u64 = 1 << 20;

/// Memory with one region below the hole that reads as zeroes, can be written, and has the layout.
fn mapped(bytes: u64, backing: &Backing) -> GuestRam {
    let layout = layout(bytes).unwrap();
    let ram = map(&layout, backing).unwrap();
    assert_eq!(Layout::of(&ram).unwrap(), layout, "{backing:?}");
    let last = GuestAddress(bytes - 8);
    assert_eq!(ram.read_obj::<u64>(last).unwrap(), 0, "{backing:?}");
    ram.write_obj(7u64, last).unwrap();
    assert_eq!(ram.read_obj::<u64>(last).unwrap(), 7);
    ram
}

/// How much of the process's memory at these host addresses is there, and what the kernel says of
/// it: /proc/self/smaps.
fn smaps(ram: &GuestRam, name: &str) -> u64 {
    let start = ram.iter().next().unwrap().as_ptr() as u64;
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines().skip_while(|line| {
        let range = line
            .split_once(' ')
            .and_then(|(range, _)| range.split_once('-'));
        // Neighbours may have become one mapping.
        range.is_none_or(|(from, to)| {
            let number = |text: &str| u64::from_str_radix(text, 16).ok();
            let (from, to) = (number(from), number(to));
            !(from.is_some_and(|from| from <= start) && to.is_some_and(|to| to > start))
        })
    });
    let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() << 10
}

#[test]
fn only_preallocated_memory_is_there_before_it_is_touched() {
    for shared in [false, true] {
        let backing = |prealloc| Backing {
            shared,
            prealloc,
            ..Backing::default()
        };
        let ram = mapped(128 * MIB, &backing(false));
        assert!(smaps(&ram, "Rss") < 32 * MIB);
        let ram = mapped(128 * MIB, &backing(true));
        assert!(smaps(&ram, "Rss") >= 128 * MIB);
        assert_eq!(ram.iter().next().unwrap().file_offset().is_some(), shared);
    }
}

#[test]
fn more_than_the_host_has_is_not_preallocated() {
    let backing = Backing {
        prealloc: true,
        ..Backing::default()
    };
    let error = map(&layout(1 << 43).unwrap(), &backing).unwrap_err();
    assert!(error.to_string().contains("the host has only"), "{error}");
}

#[test]
fn transparent_huge_pages_begin_where_the_guests_do() {
    let backing = Backing {
        pages: Pages::Transparent,
        ..Backing::default()
    };
    // Sizes that leave the next one's place odd.
    let all: Vec<_> = [65, 64, 33]
        .map(|pages| map(&layout(64 * MIB + pages * PAGE_SIZE).unwrap(), &backing))
        .into_iter()
        .collect();
    for ram in all {
        match ram {
            Ok(ram) => {
                let start = ram.iter().next().unwrap().as_ptr() as u64;
                assert!(start.is_multiple_of(2 * MIB), "{start:#x}");
            }
            Err(error @ MemoryError::Transparent(_)) => {
                return guest_tests::driver::skip(&error.to_string());
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn memory_is_in_a_file_without_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let backing = Backing {
        path: Some(dir.path().to_owned()),
        shared: true,
        ..Backing::default()
    };
    let ram = mapped(16 * MIB, &backing);
    let file = ram.iter().next().unwrap().file_offset().unwrap();
    assert_eq!(file.file().metadata().unwrap().len(), 16 * MIB);
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    let huge = Backing {
        pages: Pages::Huge(None),
        ..backing.clone()
    };
    let error = map(&layout(16 * MIB).unwrap(), &huge).unwrap_err();
    assert!(
        error.to_string().contains("mount point of a hugetlbfs"),
        "{error}"
    );
    let error = map(&layout(1 << 43).unwrap(), &backing).unwrap_err();
    assert!(error.to_string().contains("free"), "{error}");
}

#[test]
fn huge_pages_are_reserved_at_once_or_refused() {
    let huge = |size, shared| Backing {
        pages: Pages::Huge(size),
        shared,
        ..Backing::default()
    };
    let refusal = |bytes, backing: &Backing| {
        let error = map(&layout(bytes).unwrap(), backing).unwrap_err();
        error.to_string()
    };
    let pages = match HugePages::reserve(16) {
        Ok(pages) => pages,
        Err(error) => return guest_tests::driver::skip(&format!("huge pages: {error}")),
    };
    let size = Some(2 * MIB);
    for shared in [false, true] {
        let all = pages.free() * 2 * MIB;
        let ram = mapped(all, &huge(size, shared));
        // Nobody has touched more than one of them.
        let error = refusal(16 * MIB, &huge(size, shared));
        assert!(
            error.contains("takes 8 huge pages of 2.0 MiB, but 0 are free"),
            "{error}"
        );
        assert!(error.contains("vm.nr_hugepages"), "{error}");
        assert_eq!(smaps(&ram, "KernelPageSize"), 2 * MIB);
    }
    let error = refusal(17 * MIB, &huge(size, false));
    assert!(
        error.contains("not a multiple of the size of a huge page"),
        "{error}"
    );
    let error = refusal(16 * MIB, &huge(Some(4 * MIB), false));
    assert!(
        error.contains("no huge pages of 4.0 MiB: there are "),
        "{error}"
    );
    let preallocated = Backing {
        prealloc: true,
        ..huge(size, false)
    };
    let free = pages.free();
    let ram = mapped(16 * MIB, &preallocated);
    assert_eq!(pages.free(), free - 8);
    drop(ram);
}

#[test]
fn nodes_that_are_not_there_are_refused() {
    let backing = |policy, node| Backing {
        numa: Some(Numa {
            policy,
            nodes: vec![node],
        }),
        ..Backing::default()
    };
    let error = map(&layout(MIN_RAM).unwrap(), &backing(Policy::Bind, 999));
    match error.unwrap_err() {
        error @ MemoryError::NoNode { .. } => {
            assert!(
                error.to_string().contains("no node 999 with memory"),
                "{error}"
            );
        }
        error => return guest_tests::driver::skip(&error.to_string()),
    }
    for policy in [Policy::Preferred, Policy::Bind, Policy::Interleave] {
        let ram = mapped(MIN_RAM, &backing(policy, 0));
        let start = ram.iter().next().unwrap().as_ptr() as u64;
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let line = maps
            .lines()
            .find(|line| line.starts_with(&format!("{start:x} ")));
        let expected = match policy {
            Policy::Preferred => "prefer",
            Policy::Bind => "bind:0",
            Policy::Interleave => "interleave:0",
        };
        assert!(line.is_some_and(|line| line.contains(expected)), "{line:?}");
    }
}
