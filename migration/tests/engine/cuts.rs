//! The connection ends, at every frame.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use migration::frame::{HEADER_LEN, Kind};
use migration::source::{self, Guest, Outcome, Peer};

use crate::disks::FakeDisk;
use crate::machine::{Destination, Source};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{
    BUSY_SMALL, arrive, assert_moved, destination_job, migrate, source_job, unix_pair,
};

/// Where a frame is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Before,
    InHeader,
    InBody,
    After,
}

/// Which frame is cut.
#[derive(Clone, Copy, Debug)]
enum Which {
    /// That of one direction, counted from 0.
    Index { from_source: bool, index: usize },
    /// The first of its kind.
    First(Kind),
}

/// Cuts at a frame; returns its kind, `None` if there was no such frame.
fn cut(which: Which, at: At) -> Option<Option<Kind>> {
    let mut vm = Source::new(400, 100);
    vm.disks = vec![
        FakeDisk::sparse("vda", (3 << 20) + 512),
        FakeDisk::overlay("vdb", 1 << 20),
    ];
    vm.run(BUSY_SMALL);
    let hit = Arc::new(Mutex::new(None));
    let stream = proxied({
        let hit = Arc::clone(&hit);
        move |frame: &mut Frame| {
            let hits = match which {
                Which::Index { from_source, index } => {
                    (frame.from_source, frame.index) == (from_source, index)
                }
                Which::First(kind) => frame.kind == Some(kind),
            };
            if !hits {
                return Fate::Pass;
            }
            *hit.lock().unwrap() = Some(frame.kind);
            match at {
                At::Before => Fate::Cut(0),
                At::InHeader => Fate::Cut(HEADER_LEN / 2),
                At::InBody => Fate::Cut(frame.bytes.len() - 1),
                At::After => Fate::PassAndCut,
            }
        }
    });
    let arriving = arrive(Destination::of(&vm), stream.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &source_job());
    let hit = *hit.lock().unwrap();
    let (destination, arrival) = arriving.join().unwrap();
    let what = format!("{hit:?} {at:?}: {outcome:?}, {arrival:?}");
    let ran = destination.ran.load(Ordering::SeqCst);
    assert!(!(ran && vm.is_running()), "runs twice: {what}");
    match (hit, &outcome) {
        (None, Outcome::Completed(_)) => {
            assert_moved(&vm, &outcome, &destination, &arrival);
            return None;
        }
        (Some(Some(Kind::Running)), Outcome::HandoverUnknown { .. }) => assert!(ran, "{what}"),
        (Some(Some(Kind::Go)), Outcome::HandoverUnknown { .. }) if at != At::After => {
            assert!(!ran, "{what}");
        }
        // A frame that has passed is answered, and its answer too, perhaps before the cut.
        (Some(Some(_)), Outcome::Completed(_)) if at == At::After => assert!(ran, "{what}"),
        (Some(Some(Kind::Ready | Kind::Go)), Outcome::HandoverUnknown { .. }) => {
            assert!(at == At::After && !vm.is_running(), "{what}");
        }
        (
            Some(Some(_)),
            Outcome::Failed {
                guest: Guest::Untouched | Guest::Resumed,
                ..
            },
        ) => {
            assert!(vm.is_running() && !ran, "{what}");
            assert!(arrival.is_err(), "{what}");
            assert!(vm.disks.iter().all(|disk| !disk.is_logging()), "{what}");
            // As if nothing had happened: the next one is complete.
            let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
            assert_moved(&vm, &outcome, &destination, &arrival);
        }
        _ => panic!("{what}"),
    }
    hit
}

const POSITIONS: [At; 4] = [At::Before, At::InHeader, At::InBody, At::After];

/// Every frame in turn, as many as there are: that varies, as the guest is busy.
fn cut_everywhere(from_source: bool) {
    for at in POSITIONS {
        // Without its preamble a source is a stranger, which the listener's tests are about.
        let indexes = usize::from(from_source)..;
        let cuts = indexes
            .map_while(|index| cut(Which::Index { from_source, index }, at))
            .count();
        assert!(cuts > 3, "only {cuts} frames at {at:?}");
    }
}

#[test]
fn the_sources_frames() {
    cut_everywhere(true);
}

#[test]
fn the_destinations_frames() {
    cut_everywhere(false);
}

#[test]
fn the_first_of_each_kind() {
    for kind in Kind::ALL {
        // Those are said only when something is wrong.
        if matches!(kind, Kind::Cancel | Kind::Refuse | Kind::Failed) {
            continue;
        }
        // And those in post-copy only.
        if matches!(
            kind,
            Kind::Missing
                | Kind::Late
                | Kind::Pushed
                | Kind::Done
                | Kind::Join
                | Kind::Resume
                | Kind::Continue
                | Kind::Request
                | Kind::Complete
                | Kind::Gone
                | Kind::Arrived
                | Kind::Left
        ) {
            continue;
        }
        // And those are used only if asked for: see `encoded` and `channels`.
        if matches!(
            kind,
            Kind::Compressed | Kind::Xbzrle | Kind::Channel | Kind::Barrier
        ) {
            continue;
        }
        for at in POSITIONS {
            assert_eq!(cut(Which::First(kind), at), Some(Some(kind)), "{at:?}");
        }
    }
}
