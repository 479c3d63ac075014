//! Disks that fail, hang, or never rest: the guest runs on at the source, whose disks are as they
//! were, and the next migration moves it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration::cancel::Cancel;
use migration::frame::Kind;
use migration::progress::{Observer, Progress, Round};
use migration::source::{self, Guest, Outcome, Peer};

use crate::disks::{DiskHook, FakeDisk};
use crate::machine::{Destination, Source, Writes, noise};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{
    BUSY_SMALL, arrive, assert_moved, destination_job, migrate, source_job, unix_pair,
};

const MIB: u64 = 1 << 20;

/// A guest that writes to its disks.
fn busy(disks: Vec<Arc<FakeDisk>>) -> Source {
    let mut vm = Source::with_disks(300, disks);
    vm.run(BUSY_SMALL);
    vm
}

fn two_disks() -> Vec<Arc<FakeDisk>> {
    vec![
        FakeDisk::sparse("vda", 2 * MIB + 512),
        FakeDisk::overlay("vdb", MIB),
    ]
}

fn assert_moves_now(mut vm: Source) {
    assert!(vm.is_running());
    for disk in &vm.disks {
        assert!(!disk.is_logging());
        disk.set_hook(Box::new(|_, _| Ok(())));
    }
    vm.hook = Box::new(|_| Ok(()));
    let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
    assert_moved(&vm, &outcome, &destination, &arrival);
}

/// Fails the `nth` of those calls; `hit` is set then.
fn fail_at(nth: u64, calls: &'static [&'static str], count: &Arc<AtomicU64>) -> DiskHook {
    let count = Arc::clone(count);
    Box::new(move |call, _| {
        if calls.contains(&call) && count.fetch_add(1, Ordering::SeqCst) == nth {
            return Err("No space left on device".into());
        }
        Ok(())
    })
}

/// Every call of a disk fails in turn, until there are no more.
#[test]
fn each_operation_fails_at_the_source() {
    let mut failures = 0;
    for nth in 0.. {
        let mut vm = busy(two_disks());
        let count = Arc::default();
        for disk in &vm.disks {
            disk.set_hook(fail_at(nth, &["start_log", "extent", "read"], &count));
        }
        let destination = Destination::of(&vm);
        let (a, b) = unix_pair();
        let arriving = arrive(destination, b, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
        let (destination, arrival) = arriving.join().unwrap();
        if count.load(Ordering::SeqCst) <= nth {
            assert_moved(&vm, &outcome, &destination, &arrival);
            break;
        }
        failures += 1;
        let Outcome::Failed { error, .. } = &outcome else {
            panic!("{nth}: {outcome:?}")
        };
        let text = error.to_string();
        assert!(text.contains("No space left"), "{text}");
        assert!(
            text.contains("switching the log of a disk on failed")
                || text.starts_with("cannot read the disk 'vd") && text.contains("' at offset "),
            "{text}"
        );
        assert_eq!(
            arrival.unwrap_err().to_string(),
            format!("the source cancelled: {text}")
        );
        assert!(!destination.ran.load(Ordering::SeqCst));
        assert_moves_now(vm);
    }
    assert!(failures > 20, "{failures}");
}

#[test]
fn each_operation_fails_at_the_destination() {
    let mut failures = 0;
    for nth in 0.. {
        let mut vm = busy(two_disks());
        let destination = Destination::of(&vm);
        let count = Arc::default();
        for disk in &destination.disks {
            disk.set_hook(fail_at(nth, &["write", "zero", "flush"], &count));
        }
        let (a, b) = unix_pair();
        let arriving = arrive(destination, b, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
        let (destination, arrival) = arriving.join().unwrap();
        if count.load(Ordering::SeqCst) <= nth {
            assert_moved(&vm, &outcome, &destination, &arrival);
            break;
        }
        failures += 1;
        let Outcome::Failed { error, .. } = &outcome else {
            panic!("{nth}: {outcome:?}")
        };
        let text = arrival.unwrap_err().to_string();
        assert_eq!(error.to_string(), format!("the destination failed: {text}"));
        assert!(
            text.starts_with("cannot write ") && text.contains(" of the disk 'vd")
                || text.starts_with("cannot flush the disk 'vd"),
            "{text}"
        );
        assert!(text.ends_with("No space left on device"), "{text}");
        assert!(!destination.ran.load(Ordering::SeqCst));
        assert_moves_now(vm);
    }
    assert!(failures > 20, "{failures}");
}

#[test]
fn a_disk_that_is_not_there_is_refused() {
    let mut vm = busy(two_disks());
    let mut destination = Destination::of(&vm);
    destination.disks.pop();
    let (a, b) = unix_pair();
    let arriving = arrive(destination, b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
    let Outcome::Failed { error, guest } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        error.to_string(),
        "the destination refused: opening a disk failed: no such disk here"
    );
    assert!(matches!(guest, Guest::Untouched));
    assert!(arriving.join().unwrap().1.is_err());
    assert_moves_now(vm);
}

#[test]
fn an_extent_of_nothing_is_an_error_and_no_endless_loop() {
    use migration::bitmap::BlockBitmap;
    use migration::disk::{Extent, ExtentKind, SourceDisk};
    use migration::vm::VmError;
    struct Odd(u64);
    impl SourceDisk for Odd {
        fn start_log(&self) -> Result<(), VmError> {
            Ok(())
        }
        fn harvest_dirty(&self, _: &mut BlockBitmap) {}
        fn stop_log(&self) {}
        fn extent(&self, _: u64) -> Result<Extent, VmError> {
            Ok(Extent {
                kind: ExtentKind::Data,
                len: self.0,
            })
        }
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), VmError> {
            Ok(())
        }
    }
    for len in [0, 100, 513] {
        let mut vm = Source::with_disks(30, vec![]);
        vm.other_disks = vec![(MIB, Arc::new(Odd(len)))];
        let mut destination = Destination::default();
        destination.disks = vec![FakeDisk::empty("other", MIB)];
        let (a, b) = unix_pair();
        let arriving = arrive(destination, b, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
        let Outcome::Failed { error, .. } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(
            error.to_string(),
            format!("the disk 'other' tells an extent of {len} bytes at offset 0")
        );
        assert!(arriving.join().unwrap().1.is_err());
    }
}

/// A disk whose reads hang from the `nth` on, and what lets them go on; `hung` is called once.
fn hang(disk: &FakeDisk, nth: u64, mut hung: impl FnMut() + Send + 'static) -> Sender<()> {
    let (release, wait) = channel();
    let mut reads = 0;
    disk.set_hook(Box::new(move |call, _| {
        if call == "read" {
            reads += 1;
            if reads == nth + 1 {
                hung();
            }
            if reads > nth {
                // Until the test is over.
                let _ = wait.recv();
                return Err("gone".into());
            }
        }
        Ok(())
    }));
    release
}

#[test]
fn cancelled_while_a_read_hangs() {
    for nth in 0..3 {
        let disk = FakeDisk::empty("vda", 8 * MIB);
        disk.guest_write(0, &noise(2, 8 << 20));
        let job = source_job();
        let cancel = job.cancel.clone();
        let release = hang(&disk, nth, move || cancel.cancel("by the user").unwrap());
        let mut vm = Source::with_disks(300, vec![disk]);
        vm.run(Writes {
            blocks: 0,
            ..BUSY_SMALL
        });
        let (a, b) = unix_pair();
        let arriving = arrive(Destination::of(&vm), b, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
        assert!(
            matches!(
                outcome,
                Outcome::Cancelled {
                    guest: Guest::Untouched,
                    ..
                }
            ),
            "{outcome:?}"
        );
        assert!(arriving.join().unwrap().1.is_err());
        drop(release);
        assert_moves_now(vm);
    }
}

/// The destination dies while the source's disk hangs.
#[test]
fn a_broken_connection_is_noticed_while_a_read_hangs() {
    let disk = FakeDisk::empty("vda", 8 * MIB);
    disk.guest_write(0, &noise(2, 8 << 20));
    let cancel = destination_job().cancel;
    let peer = cancel.clone();
    let release = hang(&disk, 2, move || peer.cancel("dead").unwrap());
    let mut vm = Source::with_disks(300, vec![disk]);
    vm.run(Writes {
        blocks: 0,
        ..BUSY_SMALL
    });
    let (a, b) = unix_pair();
    let mut job = destination_job();
    job.cancel = cancel;
    let arriving = arrive(Destination::of(&vm), b, job);
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
    let Outcome::Failed { error, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(error.to_string(), "the destination failed: dead");
    assert!(arriving.join().unwrap().1.is_err());
    drop(release);
    assert_moves_now(vm);
}

/// With the guest stopped, a disk that hangs costs a bounded time.
#[test]
fn a_read_that_hangs_in_the_downtime_lets_the_guest_go_on() {
    let disk = FakeDisk::sparse("vda", 2 * MIB);
    let mut vm = Source::with_disks(300, vec![Arc::clone(&disk)]);
    vm.run(Writes {
        blocks: 0,
        ..BUSY_SMALL
    });
    let release = Arc::new(Mutex::new(None));
    let (hangs, releasing) = (Arc::clone(&disk), Arc::clone(&release));
    vm.hook = Box::new(move |call| {
        if call == "pause" {
            hangs.guest_write(MIB, &noise(4, 512));
            *releasing.lock().unwrap() = Some(hang(&hangs, 0, || {}));
        }
        Ok(())
    });
    let mut job = source_job();
    job.deadlines.stop_margin = Duration::from_millis(300);
    job.parameters.set_downtime_limit_ms(100).unwrap();
    let (a, b) = unix_pair();
    let arriving = arrive(Destination::of(&vm), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let Outcome::Failed { error, guest } = outcome else {
        panic!("{outcome:?}")
    };
    assert!(matches!(guest, Guest::Resumed));
    assert_eq!(
        error.to_string(),
        "reading the last blocks of the disks took too long"
    );
    assert!(arriving.join().unwrap().1.is_err());
    drop(release.lock().unwrap().take());
    assert_moves_now(vm);
}

/// The source's disk is slower than the peer's patience: marks show that the source lives.
#[test]
fn a_slow_disk_is_no_dead_peer() {
    let disk = FakeDisk::sparse("vda", MIB);
    let (sender, marks) = channel();
    let mut armed = true;
    disk.set_hook(Box::new(move |call, _| {
        if call == "read" && std::mem::take(&mut armed) {
            // As long as it takes for two marks, more than a second apart from all else.
            marks.try_iter().for_each(drop);
            marks.recv()?;
            marks.recv()?;
        }
        Ok(())
    }));
    let mut vm = Source::with_disks(300, vec![disk]);
    let stream = proxied(move |frame: &mut Frame| {
        if frame.kind == Some(Kind::Sync) {
            let _ = sender.send(());
        }
        Fate::Pass
    });
    let arriving = arrive(Destination::of(&vm), stream.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &source_job());
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
}

/// A flush may take longer than anything else may be silent.
#[test]
fn a_slow_flush_is_no_dead_peer_but_one_that_hangs_is() {
    let second = Duration::from_secs(1);
    for (patience, moves) in [(30 * second, true), (second, false)] {
        let mut vm = busy(vec![FakeDisk::sparse("vda", MIB)]);
        let destination = Destination::of(&vm);
        let mut job = source_job();
        job.deadlines.progress = second;
        job.deadlines.flush = patience;
        let mut first = true;
        destination.disks[0].set_hook(Box::new(move |call, _| {
            if call == "flush" && std::mem::take(&mut first) {
                // The disk takes its time.
                std::thread::sleep(5 * second / 2);
            }
            Ok(())
        }));
        let (a, b) = unix_pair();
        let arriving = arrive(destination, b, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
        let (destination, arrival) = arriving.join().unwrap();
        if moves {
            assert_moved(&vm, &outcome, &destination, &arrival);
        } else {
            assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
            assert!(arrival.is_err());
            assert_moves_now(vm);
        }
    }
}

struct CancelAfter(Cancel, u64);

impl Observer for CancelAfter {
    fn round_ended(&self, round: &Round) {
        if round.number == self.1 {
            self.0.cancel("enough").unwrap();
        }
    }
}

#[test]
fn a_guest_that_never_stops_writing_to_its_disk_runs_on_until_cancelled() {
    let disk = FakeDisk::sparse("vda", 16 * MIB);
    let mut vm = Source::with_disks(300, vec![Arc::clone(&disk)]);
    // Even if the thread of the guest gets no time.
    vm.hook = Box::new(move |call| {
        if call == "harvest" {
            disk.guest_write(MIB, &[1; 512]);
        }
        Ok(())
    });
    vm.run(Writes {
        pages: 300,
        batch: 0,
        blocks: 200,
        rest: Duration::from_micros(50),
    });
    let mut job = source_job();
    job.parameters.set_downtime_limit_ms(5).unwrap();
    // Some 10 MiB a second: what is written in a round is much more than what fits.
    job.parameters.set_avail_switchover_bandwidth(10 << 20);
    let observer = CancelAfter(job.cancel.clone(), 4);
    job.progress = Arc::new(Progress::new(
        Arc::new(migration::clock::MonotonicClock),
        Some(Box::new(observer)),
    ));
    let (a, b) = unix_pair();
    let arriving = arrive(Destination::of(&vm), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    assert!(
        matches!(
            &outcome,
            Outcome::Cancelled {
                guest: Guest::Untouched,
                ..
            }
        ),
        "{outcome:?}"
    );
    assert!(arriving.join().unwrap().1.is_err());
    let snapshot = job.progress.snapshot();
    assert!(
        snapshot
            .rounds
            .iter()
            .all(|round| round.dirty_block_bytes > 0)
    );
    assert!(snapshot.expected_downtime.unwrap() > Duration::from_millis(5));
    assert!(snapshot.disk.unwrap().dirty_bytes_rate > 0);
    assert_moves_now(vm);
}

/// The disk is written up to the stop, in which the last blocks go.
#[test]
fn the_last_blocks_go_while_the_guest_is_stopped() {
    let disk = FakeDisk::sparse("vda", 4 * MIB);
    let mut vm = Source::with_disks(300, vec![Arc::clone(&disk)]);
    let stopped = Arc::new(AtomicBool::new(false));
    let stopping = Arc::clone(&stopped);
    vm.hook = Box::new(move |call| {
        if call == "pause" {
            disk.guest_write(3 * MIB + 512, &noise(8, 70_000 / 512 * 512));
            stopping.store(true, Ordering::SeqCst);
        }
        Ok(())
    });
    let last = Arc::new(Mutex::new(vec![]));
    let seen = Arc::clone(&last);
    let stream = proxied(move |frame: &mut Frame| {
        if frame.from_source && stopped.load(Ordering::SeqCst) {
            seen.lock().unwrap().push(frame.kind.unwrap());
        }
        Fate::Pass
    });
    let job = source_job();
    let arriving = arrive(Destination::of(&vm), stream.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    let last = last.lock().unwrap();
    let at = |kind| last.iter().position(|&k| k == kind).unwrap();
    assert!(at(Kind::Blocks) < at(Kind::State), "{last:?}");
    let disk = job.progress.snapshot().disk.unwrap();
    assert!((2..=3).contains(&(disk.downtime_bytes >> 16)), "{disk:?}");
}

/// Cancelled, or broken off, at any of the source's calls.
#[test]
fn cancelled_at_each_call_of_a_disk() {
    for nth in (0..).step_by(3) {
        let mut vm = busy(two_disks());
        let job = source_job();
        let count = Arc::new(AtomicU64::new(0));
        for disk in &vm.disks {
            let (count, cancel) = (Arc::clone(&count), job.cancel.clone());
            disk.set_hook(Box::new(move |_, _| {
                if count.fetch_add(1, Ordering::SeqCst) == nth {
                    cancel.cancel("by the user")?;
                }
                Ok(())
            }));
        }
        let (a, b) = unix_pair();
        let arriving = arrive(Destination::of(&vm), b, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
        let (destination, arrival) = arriving.join().unwrap();
        if count.load(Ordering::SeqCst) <= nth {
            assert_moved(&vm, &outcome, &destination, &arrival);
            break;
        }
        assert!(matches!(outcome, Outcome::Cancelled { .. }), "{outcome:?}");
        assert!(!destination.ran.load(Ordering::SeqCst));
        assert_moves_now(vm);
    }
}
