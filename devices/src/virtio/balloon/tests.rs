use std::sync::atomic::AtomicUsize;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::saved::SavedBalloon;
use super::*;
use crate::state::{decode, encode};
use crate::virtio::F_EVENT_IDX;
use crate::virtio::test_driver::{MEMORY, TestDriver};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const HINTS: usize = 3;
const REPORTS: usize = 4;
const WRITE: u16 = 2;

const ALL: Options = Options {
    free_page_reporting: true,
    free_page_hint: true,
    deflate_on_oom: true,
};
const ALL_FEATURES: u64 = F_STATS_VQ | F_FREE_PAGE_HINT | F_PAGE_REPORTING | F_PAGE_POISON;

fn balloon() -> Arc<Balloon> {
    Arc::new(Balloon::new(ALL, MEMORY as u64).unwrap())
}

fn running(features: u64) -> (Arc<Balloon>, TestDriver) {
    let balloon = balloon();
    let driver = TestDriver::new(balloon.clone());
    driver.start(features);
    driver.run();
    (balloon, driver)
}

/// The test's pages lie behind the buffers of the driver.
const FIRST: u32 = (15 << 20) / 4096;

fn fill(driver: &TestDriver, pages: std::ops::Range<u32>) {
    for page in pages {
        let address = GuestAddress(u64::from(page) * PAGE);
        driver.memory.write_slice(&[0x5a; 4096], address).unwrap();
    }
    let region = driver.memory.iter().next().unwrap();
    std::ops::Deref::deref(region).bitmap().reset();
}

/// The pages that read as zeroes among the test's; they must be those that are marked as written.
fn dropped(driver: &TestDriver) -> Vec<u32> {
    let region = driver.memory.iter().next().unwrap();
    (FIRST..FIRST + 16)
        .filter(|page| {
            let mut data = [0; 4096];
            let address = u64::from(*page) * PAGE;
            driver
                .memory
                .read_slice(&mut data, GuestAddress(address))
                .unwrap();
            let zero = data == [0; 4096];
            assert!(zero || data == [0x5a; 4096]);
            let written = GuestMemoryRegion::bitmap(region).dirty_at(address as usize);
            assert_eq!(zero, written, "page {page:#x}");
            zero
        })
        .map(|page| page - FIRST)
        .collect()
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn stats(entries: &[(u16, u64)]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
        .collect()
}

#[test]
fn pages_in_the_balloon_are_dropped_and_recorded() {
    let (_, driver) = running(F_EVENT_IDX);
    fill(&driver, FIRST..FIRST + 16);
    let list = numbers(&[FIRST + 3, FIRST + 2, FIRST + 9, FIRST + 3, FIRST + 10]);
    assert_eq!(driver.request(INFLATE, &[&list], &[]).written, 0);
    assert_eq!(dropped(&driver), [2, 3, 9, 10]);
    // A number may be cut by the end of a buffer.
    let list = numbers(&[FIRST + 15, FIRST]);
    driver.request(INFLATE, &[&list[..3], &list[3..]], &[]);
    assert_eq!(dropped(&driver), [0, 2, 3, 9, 10, 15]);
    driver.request(DEFLATE, &[&list], &[]);
    assert_eq!(dropped(&driver), [0, 2, 3, 9, 10, 15]);
}

#[test]
fn a_list_that_makes_no_sense_does_no_harm() {
    let (_, driver) = running(0);
    fill(&driver, FIRST..FIRST + 16);
    let last = (MEMORY / 4096) as u32 - 1;
    let wild = numbers(&[u32::MAX, last + 1, 1 << 20, FIRST + 1, u32::MAX - 1]);
    driver.request(INFLATE, &[&wild], &[]);
    assert_eq!(dropped(&driver), [1]);
    driver.request(INFLATE, &[&[1, 2, 3]], &[]);
    driver.request(INFLATE, &[], &[4096]);
    driver.request(INFLATE, &[], &[]);
    // All of the RAM is the list, which it is read from first.
    let head = driver.add_descriptors(INFLATE, &[(0, MEMORY as u32 - 8, 0)]);
    driver.notify(INFLATE);
    let mut used = driver.take_used(INFLATE);
    while used.is_empty() {
        // It may be the one about the request before, which was seen in the ring.
        driver.wait_interrupt();
        used = driver.take_used(INFLATE);
    }
    assert_eq!(used, [(head, 0)]);
    assert_eq!(driver.get(0x70), 15, "the device works on");
}

#[test]
fn reported_pages_are_dropped_before_the_guest_has_them_back() {
    let (_, driver) = running(ALL_FEATURES);
    fill(&driver, FIRST..FIRST + 16);
    let at = |page: u32| u64::from(FIRST + page) * PAGE;
    let report = || {
        let buffers = [
            (at(4), 2 * 4096, WRITE),
            // Whole pages only.
            (at(8) + 1, 3 * 4096 - 1, WRITE),
            (at(14) + 5, 4096, WRITE),
        ];
        let head = driver.add_descriptors(REPORTS, &buffers);
        driver.notify(REPORTS);
        driver.wait_interrupt();
        assert_eq!(driver.take_used(REPORTS), [(head, 0)]);
    };
    // A guest that fills free pages with something wants to find it there.
    driver.transport.write(0x10c, &0xaau32.to_le_bytes());
    report();
    assert!(dropped(&driver).is_empty());
    driver.transport.write(0x10c, &0u32.to_le_bytes());
    report();
    assert_eq!(dropped(&driver), [4, 5, 9, 10]);
}

#[test]
fn queues_are_found_with_gaps_and_without() {
    for (features, used, reports) in [
        (F_PAGE_REPORTING, [0, 1, 2], 2),
        (F_PAGE_REPORTING, [0, 1, 4], 4),
        (F_PAGE_REPORTING | F_STATS_VQ, [1, 2, 3], 3),
        (F_PAGE_REPORTING | F_STATS_VQ, [1, 2, 4], 4),
    ] {
        let balloon = balloon();
        let driver = TestDriver::new(balloon.clone());
        driver.start_queues(features, |queue| used.contains(&queue));
        driver.run();
        fill(&driver, FIRST..FIRST + 16);
        let page = u64::from(FIRST) * PAGE;
        driver.add_descriptors(reports, &[(page, 4096, WRITE)]);
        driver.notify(reports);
        driver.wait_interrupt();
        assert_eq!(dropped(&driver), [0], "{used:?}");
    }
}

#[test]
fn the_guest_is_told_the_target_and_tells_the_size() {
    let (balloon, driver) = running(0);
    let changes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&changes);
    balloon.on_change(Box::new(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    }));
    let target = || u32::from_le_bytes(driver.config(0));
    balloon.set_target(12 << 20);
    assert_eq!(driver.wait_interrupt(), 2);
    assert_eq!((target(), driver.get(0xfc)), (1024, 1));
    balloon.set_target(12 << 20);
    assert_eq!(driver.get(0xfc), 1, "nothing new");
    balloon.set_target(u64::MAX);
    assert_eq!(target(), 0, "no more than there is");
    balloon.set_target(0);
    assert_eq!(target(), 4096);
    for (pages, left) in [(100u32, (16 << 20) - 100 * PAGE), (u32::MAX, 0)] {
        driver.transport.write(0x104, &pages.to_le_bytes());
        assert_eq!(balloon.actual(), left);
    }
    driver.transport.write(0x104, &u32::MAX.to_le_bytes());
    assert_eq!(changes.load(Ordering::SeqCst), 2);
    driver.set(0x70, 0);
    assert_eq!(balloon.actual(), 16 << 20, "a new driver has all");
    assert_eq!(target(), 4096, "the target stays");
}

#[test]
fn statistics_come_when_they_are_wanted() {
    let (balloon, driver) = running(F_STATS_VQ | F_EVENT_IDX);
    let figures = |balloon: &Balloon| loop {
        if let Some(stats) = *lock(&balloon.shared.stats) {
            return stats.iter().collect::<Vec<_>>();
        }
        std::thread::yield_now();
    };
    let first = driver.add(
        STATS,
        &[&stats(&[(4, 100), (5, 200), (77, 1), (4, 101)])],
        &[],
    );
    driver.notify(STATS);
    assert_eq!(
        figures(&balloon),
        [("stat-free-memory", 101), ("stat-total-memory", 200)]
    );
    assert!(driver.take_used(STATS).is_empty(), "the buffer is kept");
    assert!(balloon.guest_stats().is_some());
    assert_eq!(driver.wait_for(STATS, &first).written, 0);

    // Across a pause and a move: what is in the queue is neither lost nor used twice.
    let second = driver.add(STATS, &[&stats(&[(0, 7)])], &[]);
    driver.notify(STATS);
    while figures(&balloon) != [("stat-swap-in", 7)] {
        std::thread::yield_now();
    }
    let at = || lock(&balloon.shared.stats).unwrap().at();
    let came = at();
    driver.pause();
    driver.run();
    assert!(balloon.guest_stats().is_some());
    driver.wait_for(STATS, &second);
    assert_eq!(at(), came, "these were known");
    driver.pause();
    driver.add(STATS, &[&stats(&[(2, 8)])], &[]);
    let there = self::balloon();
    let moved = driver.migrate_to(there.clone());
    moved.run();
    assert_eq!(figures(&there), [("stat-major-faults", 8)]);
    moved.pause();
    assert_eq!(
        moved.transport.save().unwrap(),
        driver.transport.save().unwrap(),
        "the buffer is back in the queue"
    );
}

#[test]
fn a_second_statistics_buffer_gives_the_first_back() {
    let (_, driver) = running(F_STATS_VQ);
    let heads: Vec<u16> = (0..20)
        .map(|value| driver.add(STATS, &[&stats(&[(0, value)])], &[]).head)
        .collect();
    driver.notify(STATS);
    let mut used = Vec::new();
    while used.len() < 19 {
        driver.wait_interrupt();
        used.extend(driver.take_used(STATS).into_iter().map(|(head, _)| head));
    }
    assert_eq!(used, heads[..19]);
}

#[test]
fn hints_count_only_in_answer_to_the_last_request() {
    let (balloon, driver) = running(ALL_FEATURES);
    let command = || u32::from_le_bytes(driver.config(8));
    let say = |number: u32| {
        driver.request(HINTS, &[&number.to_le_bytes()], &[]);
    };
    let name = |page: u64, pages: u32| {
        driver.add_descriptors(HINTS, &[(page * PAGE, pages * 4096, WRITE)]);
        driver.notify(HINTS);
        while driver.take_used(HINTS).is_empty() {
            driver.wait_interrupt();
        }
    };
    fill(&driver, FIRST..FIRST + 16);
    assert_eq!(command(), 0);
    name(3, 1);
    assert!(balloon.start_hints());
    let first = command();
    assert!(first >= hints::FIRST, "{first:#x}");
    name(4, 1);
    say(first - 1);
    name(5, 1);
    say(first);
    name(6, 2);
    name(u64::from(FIRST), 16);
    let free = |page, pages| FreePages {
        address: page * PAGE,
        len: pages * PAGE,
    };
    assert_eq!(
        balloon.take_hints(),
        [free(6, 2), free(u64::from(FIRST), 16)]
    );
    assert!(balloon.take_hints().is_empty());
    assert!(dropped(&driver).is_empty(), "a hint drops nothing");
    say(0);
    name(7, 1);
    assert!(balloon.take_hints().is_empty(), "the driver has ended");
    say(first);
    name(8, 1);
    balloon.stop_hints();
    assert_eq!(command(), 1);
    name(9, 1);
    assert!(balloon.take_hints().is_empty());
    assert!(balloon.start_hints());
    assert_ne!(command(), first);
    name(10, 1);
    assert!(balloon.take_hints().is_empty(), "an answer to the last one");

    balloon.stop_hints();
    driver.transport.write(0x10c, &1u32.to_le_bytes());
    assert!(
        !balloon.start_hints(),
        "free pages must keep their contents"
    );
    let (without, _driver) = running(F_STATS_VQ);
    assert!(!without.start_hints());
}

/// A driver that names pages without end costs the migration no more than one that names all once.
#[test]
fn a_flood_of_hints_is_listened_to_up_to_the_size_of_the_ram() {
    let (balloon, driver) = running(ALL_FEATURES);
    let command = || u32::from_le_bytes(driver.config(8));
    let pages = MEMORY as u64 / PAGE;
    for _ in 0..2 {
        assert!(balloon.start_hints());
        driver.request(HINTS, &[&command().to_le_bytes()], &[]);
        let mut listened = 0;
        for _ in 0..40 {
            let buffers: Vec<_> = (0..32).map(|i| (i * PAGE, 512 << 10, WRITE)).collect();
            driver.add_descriptors(HINTS, &buffers);
            driver.notify(HINTS);
            while driver.take_used(HINTS).is_empty() {
                driver.wait_interrupt();
            }
            let hints = balloon.take_hints();
            listened += hints.iter().map(|hint| hint.len / PAGE).sum::<u64>();
        }
        assert_eq!(listened, pages);
        balloon.stop_hints();
    }
}

#[test]
fn only_what_was_asked_for_is_offered() {
    let plain = Balloon::new(Options::default(), MEMORY as u64).unwrap();
    assert_eq!(plain.features(), F_STATS_VQ | F_PAGE_POISON);
    assert_eq!(balloon().features(), ALL_FEATURES | F_DEFLATE_ON_OOM);
}

fn saved(balloon: &Balloon) -> SavedBalloon {
    decode(NAME, &balloon.save().unwrap()).unwrap()
}

#[test]
fn it_goes_on_after_a_migration_as_it_was() {
    let (balloon, driver) = running(ALL_FEATURES);
    balloon.set_target(8 << 20);
    driver.transport.write(0x104, &77u32.to_le_bytes());
    driver.transport.write(0x10c, &0u32.to_le_bytes());
    balloon.start_hints();
    balloon.stop_hints();
    driver.pause();
    let there = self::balloon();
    let moved = driver.migrate_to(there.clone());
    assert_eq!(saved(&there), saved(&balloon));
    assert_eq!(moved.config::<16>(0), driver.config::<16>(0));
    assert_eq!(there.actual(), balloon.actual());
    moved.run();
    fill(&moved, FIRST..FIRST + 16);
    moved.request(INFLATE, &[&numbers(&[FIRST])], &[]);
    assert_eq!(dropped(&moved), [0]);
}

#[test]
fn nothing_is_dropped_before_the_machine_runs() {
    let (_, driver) = running(ALL_FEATURES);
    driver.pause();
    fill(&driver, FIRST..FIRST + 16);
    driver.add(INFLATE, &[&numbers(&[FIRST])], &[]);
    driver.notify(INFLATE);
    let moved = driver.migrate_to(balloon());
    moved.pause();
    let page = GuestAddress(u64::from(FIRST) * PAGE);
    assert_eq!(moved.memory.read_obj::<u8>(page).unwrap(), 0x5a);
    moved.run();
    moved.wait_interrupt();
    assert_eq!(moved.memory.read_obj::<u8>(page).unwrap(), 0);
}

/// The first version's bytes: they must load for ever.
#[test]
fn version_1_still_loads() {
    let golden = include_bytes!("../../../golden/virtio-balloon-1.bin");
    let balloon = balloon();
    balloon.restore(1, golden).unwrap();
    assert_eq!(balloon.save().unwrap(), golden);
    assert_eq!(
        saved(&balloon),
        SavedBalloon {
            target_pages: 0x123,
            actual_pages: 0x45,
            poison: 0xaaaa_aaaa,
            hint_command: 1,
            last_hint_request: 0x8000_0007,
        }
    );
}

#[test]
fn every_field_is_checked() {
    let balloon = balloon();
    let good = saved(&balloon);
    type Corrupt = fn(&mut SavedBalloon);
    let ways: [(&str, Corrupt); 5] = [
        ("target_pages", |s| s.target_pages = 4097),
        ("actual_pages", |s| s.actual_pages = u32::MAX),
        ("hint_command", |s| s.hint_command = 2),
        ("hint_command", |s| s.hint_command = 0x8000_0000),
        ("last_hint_request", |s| s.last_hint_request = 0x7fff_ffff),
    ];
    for (field, corrupt) in ways {
        let mut bad = good.clone();
        corrupt(&mut bad);
        let error = balloon
            .restore(1, &encode(NAME, &bad).unwrap())
            .unwrap_err();
        let expected = format!("virtio-balloon: saved field '{field}' is ");
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert_eq!(saved(&balloon), good, "after an error it is as it was");
    }
    let mut short = encode(NAME, &good).unwrap();
    short.pop();
    assert!(balloon.restore(1, &short).is_err());
}
