use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::guest_io::{Manner, PageIo};
use crate::layout::{GuestRam, PAGE_SIZE};
use crate::placement::Incomplete;

/// Two regions, so that the last page of one and the first of the next are neighbours only by
/// number.
const FIRST: u64 = 700;
const PAGES: u64 = 1024;
const HIGH: u64 = 1 << 32;

#[derive(Default)]
struct FakeClock(AtomicU64);

impl FakeClock {
    fn set(&self, microseconds: u64) {
        self.0.store(microseconds, Ordering::SeqCst);
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Duration {
        us(self.0.load(Ordering::SeqCst))
    }
}

fn us(microseconds: u64) -> Duration {
    Duration::from_micros(microseconds)
}

struct Guest {
    ram: GuestRam,
    late: LateMemory,
    clock: Arc<FakeClock>,
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun { first, count }
}

fn pages(runs: &[PageRun]) -> PageBitmap {
    let mut set = PageBitmap::new(PAGES);
    for run in runs {
        set.set_range(run.first, run.count);
    }
    set
}

/// What the source has in a page.
fn contents(page: u64) -> Vec<u8> {
    let word = |at: u64| (page << 32 | at).to_le_bytes();
    (0..PAGE_SIZE / 8).flat_map(word).collect()
}

fn frame(runs: &[PageRun]) -> (Vec<u8>, Vec<u32>) {
    let numbers = || runs.iter().flat_map(|run| run.first..run.end());
    let data = numbers().flat_map(contents).collect();
    let crcs = numbers().map(|page| crc32fast::hash(&contents(page)));
    (data, crcs.collect())
}

fn address(page: u64) -> GuestAddress {
    GuestAddress(match page.checked_sub(FIRST) {
        None => page * PAGE_SIZE,
        Some(high) => HIGH + high * PAGE_SIZE,
    })
}

/// Ends the thread that serves faults, also when the test fails.
struct Stop<'a>(&'a OwnedFd);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        rustix::io::write(self.0, &1u64.to_ne_bytes()).unwrap();
    }
}

/// Lets everybody go on if serving faults fails, so that the test does too.
struct Release<'a>(&'a LateMemory);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let memory = &self.0.memory;
            for run in regions(memory, whole(PAGES)) {
                self.0.userfault.unregister(memory, run).unwrap();
            }
        }
    }
}

impl Guest {
    /// Memory of which `missing` never came, and which `fill` has written to.
    fn new(missing: &[PageRun], fill: impl Fn(&GuestRam)) -> Option<Self> {
        if let Err(error) = Userfault::probe() {
            guest_tests::driver::skip(&error.to_string());
            return None;
        }
        let len = |pages: u64| (pages * PAGE_SIZE) as usize;
        let ram = GuestRam::from_ranges(&[
            (GuestAddress(0), len(FIRST)),
            (GuestAddress(HIGH), len(PAGES - FIRST)),
        ])
        .unwrap();
        fill(&ram);
        let clock = Arc::new(FakeClock::default());
        let suspect = Some(PageBitmap::new(PAGES));
        let memory = GuestPages::new(ram.clone()).unwrap();
        let late = LateMemory::new(memory, pages(missing), suspect, &[10, 11], clock.clone());
        Some(Self {
            ram,
            late: late.unwrap(),
            clock,
        })
    }

    fn read(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0xee; PAGE_SIZE as usize];
        self.ram.read_slice(&mut bytes, address(page)).unwrap();
        bytes
    }

    fn write(&self, page: u64, value: u64) {
        self.ram.write_obj(value, address(page)).unwrap();
    }

    fn place(&self, runs: &[PageRun], via: Via) -> Result<(), LateError> {
        let (data, crcs) = frame(runs);
        self.late.place(runs, &data, &crcs, via)
    }

    fn told(&self, page: u64, thread: u32, now: u64) -> FaultAction {
        let fault = Fault {
            address: self.late.memory().host_address(page),
            thread: Some(thread),
        };
        self.late.fault(fault, us(now)).unwrap()
    }

    /// Runs `test` while faults are served; `answer` is called with each page that is to be asked
    /// for.
    fn serving<T>(&self, answer: impl Fn(u64) + Sync, test: impl FnOnce() -> T) -> T {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _release = Release(&self.late);
                let mut faults = Vec::new();
                loop {
                    let mut fds = [
                        PollFd::new(&self.late, PollFlags::IN),
                        PollFd::new(&stop, PollFlags::IN),
                    ];
                    poll(&mut fds, None).unwrap();
                    if !fds[1].revents().is_empty() {
                        return;
                    }
                    self.late.read_faults(&mut faults).unwrap();
                    for fault in faults.drain(..) {
                        let action = self.late.fault(fault, self.clock.now()).unwrap();
                        if let FaultAction::Request(page) = action {
                            answer(page);
                        }
                    }
                }
            });
            let _stop = Stop(&stop);
            test()
        })
    }

    fn answer(&self) -> impl Fn(u64) + Sync {
        |page| self.place(&[run(page, 1)], Via::FaultChannel).unwrap()
    }
}

#[test]
fn threads_wait_for_their_pages_while_two_placers_race() {
    let Some(guest) = Guest::new(&[run(0, PAGES)], |_| {}) else {
        return;
    };
    const THREADS: u64 = 4;
    let around = |page: u64| {
        let first = page.saturating_sub(8);
        let runs = [
            run(first, (PAGES - first).min(20)),
            run(page * 7 % PAGES, 1),
        ];
        guest.place(&runs, Via::FaultChannel).unwrap();
    };
    guest.serving(around, || {
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let guest = &guest;
                scope.spawn(move || {
                    for step in 0..PAGES {
                        // All pages, in an order of its own; of each, one thread is the owner.
                        let page = (step * 389 + thread * 97) % PAGES;
                        let owner = page % THREADS;
                        let found = guest.read(page);
                        let sent = contents(page);
                        assert_eq!(found[8..], sent[8..], "page {page}");
                        if owner == thread {
                            assert_eq!(found, sent, "page {page}");
                            guest.write(page, !page);
                        }
                    }
                });
            }
            scope.spawn(|| {
                for first in (0..PAGES).step_by(64) {
                    guest.place(&[run(first, 64)], Via::Stream).unwrap();
                }
            });
        });
        // Who waited is woken a little before the page counts as come.
        assert!(guest.late.wait_complete(Duration::from_secs(3600)));
        // Everything once more: what the threads wrote must stay.
        guest.place(&[run(0, PAGES)], Via::Stream).unwrap();
        for page in 0..PAGES {
            assert_eq!(guest.read(page)[..8], (!page).to_le_bytes(), "page {page}");
        }
    });
    let stats = guest.late.stats();
    assert_eq!(stats.missing, 0);
    assert_eq!(stats.from_stream + stats.from_requests, PAGES);
    assert!(stats.duplicates >= PAGES && stats.latency.faults >= stats.requested);
    assert_eq!(guest.late.outstanding(), []);
    guest.late.finish().unwrap();
}

#[test]
fn a_page_that_comes_again_is_left_alone() {
    let Some(guest) = Guest::new(&[run(0, 4), run(698, 5)], |_| {}) else {
        return;
    };
    guest.place(&[run(1, 1)], Via::FaultChannel).unwrap();
    guest.place(&[run(700, 1)], Via::FaultChannel).unwrap();
    guest.write(1, 99);
    // The guest gives a page up, as with a balloon: its old contents must not come back.
    guest.late.memory().discard(run(700, 1)).unwrap();
    guest.place(&[run(0, 4), run(698, 5)], Via::Stream).unwrap();
    assert_eq!(guest.read(1)[..8], 99u64.to_le_bytes());
    for page in [0, 2, 3, 698, 699, 701, 702] {
        assert_eq!(guest.read(page), contents(page), "page {page}");
    }
    let unasked = |page| panic!("page {page} was to be asked for");
    guest.serving(unasked, || assert_eq!(guest.read(700), [0; 4096]));
    let stats = guest.late.stats();
    assert_eq!((stats.from_requests, stats.from_stream), (2, 7));
    assert_eq!((stats.duplicates, stats.served_here), (2, 1));
}

#[test]
fn a_page_that_turned_up_elsewhere_does_not_end_its_run() {
    let Some(guest) = Guest::new(&[run(0, 16)], |_| {}) else {
        return;
    };
    // Behind the engine's back.
    let data = vec![7; PAGE_SIZE as usize];
    let userfault = &guest.late.userfault;
    userfault
        .copy(&guest.late.memory, run(5, 1), &data)
        .unwrap();
    guest.place(&[run(0, 16)], Via::Stream).unwrap();
    for page in (0..16).filter(|&page| page != 5) {
        assert_eq!(guest.read(page), contents(page), "page {page}");
    }
    assert_eq!(guest.read(5), data);
    let stats = guest.late.stats();
    assert_eq!((stats.from_stream, stats.duplicates), (15, 1));
    assert!(guest.late.is_complete());
}

#[test]
fn zero_pages_need_nothing_from_the_source() {
    let Some(guest) = Guest::new(&[run(600, 200)], |_| {}) else {
        return;
    };
    guest.late.zero(&[run(650, 100)]).unwrap();
    let unasked = |page| panic!("page {page} was to be asked for");
    guest.serving(unasked, || {
        for page in (0..600).chain(650..750).chain(800..PAGES) {
            assert_eq!(guest.read(page), [0; 4096], "page {page}");
        }
    });
    let stats = guest.late.stats();
    assert_eq!((stats.zero, stats.missing), (100, 100));
    assert_eq!(stats.served_here, PAGES - 200);
    assert_eq!(stats.latency, Latency::default());

    // Zeroes for a page that somebody waits for.
    let zero = |page| guest.late.zero(&[run(page, 1)]).unwrap();
    guest.serving(zero, || assert_eq!(guest.read(760), [0; 4096]));
    assert_eq!(guest.late.stats().latency.faults, 1);
}

#[test]
fn stale_pages_are_dropped_and_come_again() {
    let stale = [3u64, 64, 65, 70, 128, 699, 700, 1023];
    let Some(guest) = Guest::new(&[run(66, 2)], |ram| {
        for page in (0..66).chain(68..PAGES) {
            ram.write_slice(&[1; 4096], address(page)).unwrap();
        }
    }) else {
        return;
    };
    let mut set = pages(&[run(66, 1)]);
    for page in stale {
        set.set(page);
    }
    let drop_pages = |first, count| {
        let words = set.words(first, count).unwrap();
        guest.late.drop_pages(first, words).unwrap();
    };
    drop_pages(0, 128);
    drop_pages(128, PAGES - 128);
    // It is told again what changed since.
    drop_pages(640, 128);
    assert_eq!(guest.late.missing(), 2 + stale.len() as u64);
    for page in 0..PAGES {
        let absent = stale.contains(&page) || (66..68).contains(&page);
        assert_eq!(guest.late.arrived().test(page), !absent, "page {page}");
    }
    guest.serving(guest.answer(), || {
        for page in 0..PAGES {
            let come_late = stale.contains(&page) || (66..68).contains(&page);
            let expected = match come_late {
                true => contents(page),
                false => vec![1; 4096],
            };
            assert_eq!(guest.read(page), expected, "page {page}");
        }
    });
    assert!(guest.late.is_complete());
}

#[test]
fn sets_of_pages_that_there_are_not_are_refused() {
    let Some(guest) = Guest::new(&[], |_| {}) else {
        return;
    };
    let drop_pages = |first, words: &[u64]| guest.late.drop_pages(first, words);
    assert!(matches!(drop_pages(1, &[1]), Err(LateError::Unaligned(1))));
    for (first, words) in [(960, &[0, 1][..]), (1024, &[1]), (u64::MAX - 63, &[1])] {
        let result = drop_pages(first, words);
        assert!(matches!(result, Err(LateError::Outside { .. })), "{first}");
    }
    let result = guest.late.zero(&[run(1000, 25)]);
    assert!(matches!(result, Err(LateError::Outside { .. })));
    let result = guest
        .late
        .place(&[run(0, 2)], &contents(0), &[0], Via::Stream);
    assert!(matches!(result, Err(LateError::Uneven { pages: 2, .. })));
    let result = guest.late.fault(
        Fault {
            address: 4096,
            thread: None,
        },
        us(0),
    );
    assert!(matches!(result, Err(LateError::NotGuestMemory(4096))));
    assert!(guest.late.is_complete());
}

#[test]
fn suspect_pages_must_be_dropped() {
    if let Err(error) = Userfault::probe() {
        return guest_tests::driver::skip(&error.to_string());
    }
    let len = 128 * PAGE_SIZE as usize;
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), len)]).unwrap();
    let memory = GuestPages::new(ram).unwrap();
    let mut suspect = PageBitmap::new(128);
    suspect.set(70);
    suspect.set(90);
    let clock = Arc::new(FakeClock::default());
    let late = LateMemory::new(memory, PageBitmap::new(128), Some(suspect), &[], clock).unwrap();
    late.drop_pages(64, &[1 << 6]).unwrap();
    let damaged = Incomplete::Damaged {
        count: 1,
        address: 90 * PAGE_SIZE,
    };
    assert_eq!(late.check_suspects(), Err(damaged));
    late.drop_pages(64, &[1 << 26]).unwrap();
    assert_eq!(late.check_suspects(), Ok(()));
}

#[test]
fn a_damaged_page_lets_nothing_of_its_frame_in() {
    let Some(guest) = Guest::new(&[run(690, 20)], |_| {}) else {
        return;
    };
    let runs = [run(690, 3), run(701, 2)];
    let (mut data, crcs) = frame(&runs);
    data[4 * 4096 + 17] ^= 1;
    let error = guest.late.place(&runs, &data, &crcs, Via::Stream);
    assert!(matches!(
        error,
        Err(LateError::Damaged { address }) if address == HIGH + 2 * PAGE_SIZE
    ));
    assert_eq!(guest.late.missing(), 20);
    guest.place(&runs, Via::Stream).unwrap();
    assert_eq!(guest.read(702), contents(702));
}

#[test]
fn system_calls_wait_for_their_pages_too() {
    let Some(guest) = Guest::new(&[run(0, PAGES)], |_| {}) else {
        return;
    };
    let mut file: File = tempfile::tempfile().unwrap();
    file.write_all(&[0x77; 3 * 4096]).unwrap();
    file.rewind().unwrap();
    let (a, mut b) = UnixStream::pair().unwrap();
    b.write_all(&[0x55; 2 * 4096]).unwrap();
    guest.serving(guest.answer(), || {
        // read(2) from the middle of one page to the middle of another.
        let start = address(3).0 + 2048;
        guest
            .ram
            .read_exact_volatile_from(GuestAddress(start), &mut file, 2 * 4096)
            .unwrap();
        assert_eq!(guest.read(3)[..2048], contents(3)[..2048]);
        assert_eq!(guest.read(3)[2048..], [0x77; 2048]);
        assert_eq!(guest.read(4), [0x77; 4096]);
        assert_eq!(guest.read(5)[..2048], [0x77; 2048]);
        assert_eq!(guest.read(5)[2048..], contents(5)[2048..]);
        // readv(2) into two regions.
        let mut io = PageIo::default();
        let runs = [run(699, 1), run(700, 1)];
        let mut received = 0;
        while received < 2 * PAGE_SIZE {
            let memory = guest.late.memory();
            received += io.receive(a.as_fd(), memory, &runs, received).unwrap() as u64;
        }
        assert_eq!(guest.read(699), [0x55; 4096]);
        assert_eq!(guest.read(700), [0x55; 4096]);
        // sendmsg(2).
        let memory = Some(guest.late.memory());
        let sent = io.send(a.as_fd(), &[], memory, &[run(9, 1)], 0, Manner::Copied);
        assert_eq!(sent.unwrap(), 4096);
        let mut page = vec![0; 4096];
        std::io::Read::read_exact(&mut b, &mut page).unwrap();
        assert_eq!(page, contents(9));
    });
    assert_eq!(guest.late.stats().requested, 6);
}

#[test]
fn what_was_asked_for_is_remembered_until_it_comes() {
    let Some(guest) = Guest::new(&[run(0, 100)], |_| {}) else {
        return;
    };
    assert_eq!(guest.told(7, 10, 0), FaultAction::Request(7));
    assert_eq!(guest.told(7, 11, 0), FaultAction::Nothing);
    assert_eq!(guest.told(8, 99, 0), FaultAction::Request(8));
    assert_eq!(guest.told(50, 99, 0), FaultAction::Request(50));
    assert_eq!(guest.told(200, 99, 0), FaultAction::Served);
    assert_eq!(guest.late.outstanding(), [run(7, 2), run(50, 1)]);
    guest.place(&[run(8, 20)], Via::Stream).unwrap();
    assert_eq!(guest.late.outstanding(), [run(7, 1), run(50, 1)]);
    assert_eq!(guest.told(8, 99, 0), FaultAction::Served);
    let arrived = guest.late.arrived();
    assert_eq!(arrived.count(), PAGES - 80);
    assert!(!arrived.test(7) && arrived.test(8) && arrived.test(27) && !arrived.test(28));
}

#[test]
fn statistics_add_up() {
    let Some(guest) = Guest::new(&[run(0, 100)], |_| {}) else {
        return;
    };
    guest.told(1, 10, 1000);
    guest.told(2, 11, 1100);
    guest.told(1, 12, 1150);
    guest.clock.set(1200);
    let stats = guest.late.stats();
    assert_eq!(stats.vcpu_block_time, [us(200), us(100)]);
    assert_eq!(stats.block_time, us(100));
    assert_eq!(stats.latency, Latency::default());
    guest.clock.set(1300);
    guest.place(&[run(0, 2)], Via::FaultChannel).unwrap();
    guest.clock.set(1900);
    guest.place(&[run(0, 10)], Via::Stream).unwrap();
    guest.late.zero(&[run(8, 4)]).unwrap();
    guest.clock.set(9999);
    let mut latency = Latency {
        faults: 3,
        total: us(300 + 150 + 800),
        longest: us(800),
        ..Latency::default()
    };
    latency.distribution[7] = 1; // 128 to 255: the 150
    latency.distribution[8] = 1; // 256 to 511: the 300
    latency.distribution[9] = 1; // 512 to 1023: the 800
    assert_eq!(
        guest.late.stats(),
        LateStats {
            missing: 88,
            requested: 2,
            from_stream: 8,
            from_requests: 2,
            zero: 2,
            duplicates: 4,
            served_here: 0,
            latency,
            vcpu_block_time: vec![us(300), us(800)],
            block_time: us(200),
        }
    );
}

#[test]
fn memory_that_has_come_is_like_any_other() {
    let Some(guest) = Guest::new(&[run(0, 2)], |_| {}) else {
        return;
    };
    guest.place(&[run(0, 1)], Via::Stream).unwrap();
    assert!(!guest.late.wait_complete(Duration::ZERO));
    assert!(matches!(guest.late.finish(), Err(LateError::Unfinished(1))));
    thread::scope(|scope| {
        scope.spawn(|| guest.place(&[run(1, 1)], Via::Stream).unwrap());
        assert!(guest.late.wait_complete(Duration::from_secs(3600)));
    });
    guest.late.finish().unwrap();
    // Nobody serves faults, and none is raised.
    guest.late.memory().discard(run(1, 1)).unwrap();
    assert_eq!(guest.read(0), contents(0));
    assert_eq!(guest.read(1), [0; 4096]);
    // One that was read too late.
    assert_eq!(guest.told(PAGES - 1, 10, 0), FaultAction::Served);
}
