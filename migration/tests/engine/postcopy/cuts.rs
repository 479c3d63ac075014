//! A connection ends, at each kind of frame: before GO the guest goes on at the source, after it
//! at the destination.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use migration::frame::{HEADER_LEN, Kind};
use migration::layout::Layout;
use migration::link::Deadlines;
use migration::source::Outcome;

use super::{Moving, at_once, busy, require_userfault};
use crate::machine::page;
use crate::proxy::Fate;
use crate::whole::short;

const PAGES: u64 = 600;

/// What happens to a frame.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Before,
    InHeader,
    InBody,
    After,
    /// The connection stays, and nothing moves any more.
    Held,
}

const CUTS: [At; 4] = [At::Before, At::InHeader, At::InBody, At::After];

/// The first frame of a kind, on one of the two connections.
#[derive(Clone, Copy, Debug)]
struct Which {
    kind: Kind,
    fault_channel: bool,
}

fn main(kind: Kind) -> Which {
    Which {
        kind,
        fault_channel: false,
    }
}

fn faults(kind: Kind) -> Which {
    Which {
        kind,
        fault_channel: true,
    }
}

/// Cuts there, once; `load_reads` whether memory is needed before the guest runs.
fn cut(which: Which, at: At, load_reads: bool) -> super::Ended {
    let (hit, was_hit) = mpsc::channel();
    let mut hit = Some(hit);
    let decide = Arc::new(Mutex::new(move |frame: &mut crate::proxy::Frame| {
        let hits = (frame.kind, frame.fault_channel) == (Some(which.kind), which.fault_channel);
        let Some(hit) = hit.take_if(|_| hits) else {
            return Fate::Pass;
        };
        hit.send(()).unwrap();
        match at {
            At::Before => Fate::Cut(0),
            At::InHeader => Fate::Cut(HEADER_LEN / 2),
            At::InBody => Fate::Cut(frame.bytes.len() - 1),
            At::After => Fate::PassAndCut,
            At::Held => Fate::Hold,
        }
    }));
    let moving = Moving::begin_via(
        busy(PAGES),
        Some(decide),
        |job, their_job| {
            at_once(job);
            // Slow enough for the guest to ask for some.
            job.parameters.set_max_postcopy_bandwidth(30_000_000);
            // The source does not see that it is lost.
            if which.kind == Kind::Join {
                their_job.deadlines.handshake = Duration::from_secs(1);
            }
            if at == At::Held {
                // Long enough for all that is not held, also where many tests run at once.
                let soon = Duration::from_secs(4);
                let deadlines = Deadlines {
                    handshake: soon,
                    progress: soon,
                    resume: soon,
                    go: soon,
                    running: soon,
                    ..short()
                };
                (job.deadlines, their_job.deadlines) = (deadlines.clone(), deadlines);
            }
        },
        |there| {
            if load_reads {
                there.on_load = Some(Box::new(|ram| {
                    let layout = Layout::of(ram).unwrap();
                    for number in 0..40 {
                        page(ram, &layout, number);
                    }
                }));
            }
        },
    );
    let ended = moving.check(&format!("{which:?} {at:?}"));
    // The last frames may still be on their way; without connections there are no more.
    assert!(was_hit.recv().is_ok(), "there was no {which:?}");
    ended
}

fn before_go() -> Vec<Which> {
    let on_main = [
        Kind::Hello,
        Kind::Accept,
        Kind::Sync,
        Kind::SyncAck,
        Kind::Missing,
        Kind::Late,
        Kind::State,
        Kind::End,
        Kind::Ready,
    ];
    let on_faults = [Kind::Join, Kind::Request, Kind::Pages];
    let all = on_main.map(main).into_iter();
    all.chain(on_faults.map(faults)).collect()
}

fn after_go() -> Vec<Which> {
    let on_main = [
        Kind::Go,
        Kind::Running,
        Kind::Pages,
        Kind::Zero,
        Kind::Pushed,
        Kind::Complete,
        Kind::Done,
    ];
    let all = on_main.map(main).into_iter();
    all.chain([Kind::Request, Kind::Pages].map(faults))
        .collect()
}

/// Nothing has moved, and as if nothing had happened the next one is complete.
fn assert_unmoved(ended: super::Ended, what: &str) {
    assert!(
        matches!(ended.outcome, Outcome::Failed { .. }),
        "{what}: {:?}",
        ended.outcome
    );
    Moving::begin(ended.vm, |job, _| at_once(job)).finish();
}

#[test]
fn before_go_the_guest_stays() {
    require_userfault!();
    for which in before_go() {
        for at in CUTS {
            let ended = cut(which, at, true);
            // What has passed is answered, perhaps by GO.
            if at != At::After {
                assert_unmoved(ended, &format!("{which:?} {at:?}"));
            }
        }
    }
}

#[test]
fn after_go_it_goes_on_at_the_destination() {
    require_userfault!();
    for which in after_go() {
        for at in CUTS {
            let ended = cut(which, at, false);
            let completed = matches!(ended.outcome, Outcome::Completed(_));
            match which.kind {
                // Torn: it cannot be known here that the guest has not run there.
                Kind::Go if at != At::After => assert!(!completed),
                _ => assert!(completed, "{which:?} {at:?}: {:?}", ended.outcome),
            }
        }
    }
}

#[test]
fn silence_is_noticed_everywhere() {
    require_userfault!();
    std::thread::scope(|scope| {
        for which in before_go() {
            scope.spawn(move || {
                let ended = cut(which, At::Held, true);
                if which.kind != Kind::Ready {
                    assert_unmoved(ended, &format!("{which:?} held"));
                }
            });
        }
        for which in after_go() {
            scope.spawn(move || cut(which, At::Held, false));
        }
    });
}
