//! Cancelling, in every state; and peers that stand still.

use std::sync::atomic::Ordering;
use std::time::Duration;

use migration::cancel::Cancel;
use migration::frame::Kind;
use migration::progress::Status;
use migration::source::{self, Guest, Outcome, Peer};

use crate::machine::{Destination, Source, Writes};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{
    BUSY_SMALL, arrive, assert_moved, destination_job, migrate, short, source_job, unix_pair,
};

/// Cancels when `vm`'s hook is called for the `nth` time with that name.
fn cancel_at(vm: &mut Source, call: &'static str, nth: usize, cancel: &Cancel) {
    let cancel = cancel.clone();
    let mut left = nth;
    vm.hook = Box::new(move |name| {
        if name == call {
            if left == 0 {
                cancel.cancel("by the user").unwrap();
            }
            left = left.wrapping_sub(1);
        }
        Ok(())
    });
}

#[test]
fn in_every_step() {
    for (call, nth, stopped) in [
        ("offer", 0, false),
        ("start_dirty_log", 0, false),
        ("protect", 0, false),
        ("harvest", 0, false),
        ("harvest", 1, false),
        ("pause", 0, true),
        ("save", 0, true),
        ("release", 0, true),
    ] {
        let mut vm = Source::new(400, 100);
        vm.run(BUSY_SMALL);
        let job = source_job();
        cancel_at(&mut vm, call, nth, &job.cancel);
        let (a, b) = unix_pair();
        let arriving = arrive(Destination::default(), b, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
        let Outcome::Cancelled { reason, guest } = outcome else {
            panic!("{call}: {outcome:?}")
        };
        assert_eq!(reason, "by the user");
        assert_eq!(
            matches!(guest, Guest::Resumed),
            stopped,
            "{call}: {guest:?}"
        );
        assert!(vm.is_running(), "{call}");
        assert_eq!(job.progress.status(), Status::Cancelled);
        if call != "offer" {
            let (destination, arrival) = arriving.join().unwrap();
            assert!(!destination.ran.load(Ordering::SeqCst));
            assert_eq!(
                arrival.unwrap_err().to_string(),
                "the source cancelled: by the user",
                "{call}"
            );
            let calls = vm.calls();
            let resumed = calls.iter().position(|c| c == "resume");
            let cleaned = calls.iter().position(|c| c == "stop_dirty_log");
            assert!(resumed < cleaned || !stopped, "the guest waited: {calls:?}");
        }
        vm.hook = Box::new(|_| Ok(()));
        let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
        assert_moved(&vm, &outcome, &destination, &arrival);
    }
}

#[test]
fn after_go_it_is_refused() {
    let mut vm = Source::new(100, 0);
    vm.run(BUSY_SMALL_100);
    let job = source_job();
    let cancel = job.cancel.clone();
    let mut destination = Destination::default();
    destination.hook = Box::new(move |call| {
        if call == "start" {
            assert!(cancel.cancel("too late").is_err());
        }
        Ok(())
    });
    let (a, b) = unix_pair();
    let arriving = arrive(destination, b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
}

const BUSY_SMALL_100: Writes = Writes {
    pages: 100,
    ..BUSY_SMALL
};

#[test]
fn while_the_network_stands_still() {
    for kind in [Kind::Hello, Kind::Blob, Kind::Pages, Kind::Sync, Kind::End] {
        let mut vm = Source::new(9000, 0);
        vm.run(BUSY_SMALL);
        let job = source_job();
        let cancel = job.cancel.clone();
        let (stream, other) = proxied(move |frame: &mut Frame| {
            if frame.kind == Some(kind) {
                // The source is waiting, or will be soon.
                cancel.cancel("by the user").unwrap();
                return Fate::Hold;
            }
            Fate::Pass
        });
        let arriving = arrive(Destination::default(), other, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(stream), &job);
        assert!(matches!(outcome, Outcome::Cancelled { .. }), "{outcome:?}");
        assert!(vm.is_running());
        assert!(arriving.join().unwrap().1.is_err());
    }
}

#[test]
fn a_peer_that_stands_still_is_given_up() {
    for (kind, guest_stopped) in [
        (Kind::Hello, false),
        (Kind::Pages, false),
        (Kind::Sync, false),
        (Kind::State, true),
        (Kind::End, true),
    ] {
        let mut vm = Source::new(9000, 0);
        vm.run(BUSY_SMALL);
        let mut job = source_job();
        job.deadlines = short();
        let stream = proxied(move |frame: &mut Frame| {
            if frame.kind == Some(kind) {
                return Fate::Hold;
            }
            Fate::Pass
        });
        let arriving = arrive(Destination::default(), stream.1, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &job);
        let Outcome::Failed { guest, .. } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(matches!(guest, Guest::Resumed), guest_stopped);
        assert!(vm.is_running());
        assert!(arriving.join().unwrap().1.is_err());
    }
}

#[test]
fn a_guest_that_never_converges_runs_on_until_cancelled() {
    use migration::progress::{Observer, Progress, Round};
    use std::sync::Arc;
    struct CancelAfter(Cancel, u64);
    impl Observer for CancelAfter {
        fn round_ended(&self, round: &Round) {
            if round.number == self.1 {
                self.0.cancel("enough").unwrap();
            }
        }
    }
    let mut vm = Source::new(4000, 0);
    vm.run(Writes {
        pages: 4000,
        batch: 2000,
        blocks: 0,
        rest: Duration::from_micros(50),
    });
    let mut job = source_job();
    job.parameters.set_downtime_limit_ms(0).unwrap();
    let observer = CancelAfter(job.cancel.clone(), 5);
    job.progress = Arc::new(Progress::new(
        Arc::new(migration::clock::MonotonicClock),
        Some(Box::new(observer)),
    ));
    let (a, b) = unix_pair();
    let arriving = arrive(Destination::default(), b, destination_job());
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
    assert!(vm.is_running());
    let snapshot = job.progress.snapshot();
    assert!(snapshot.rounds.len() >= 5 && snapshot.expected_downtime.is_some());
    assert!(snapshot.ram.dirty_pages_rate > 0);
    assert!(arriving.join().unwrap().1.is_err());
    // The limit is raised: it moves.
    let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
    assert_moved(&vm, &outcome, &destination, &arrival);
}
