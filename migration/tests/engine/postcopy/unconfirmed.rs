//! A destination that has everything, and a source that was never told.

use std::sync::{Arc, Mutex};

use migration::frame::Kind;
use migration::progress::Status;
use migration::source::Outcome;

use super::{Moving, at_once, busy, require_userfault};
use crate::proxy::{Fate, Frame};

/// A migration of which the frames of that kind are lost, so many times, and the connection with
/// them; both sides are as they are then: the destination's guest is whole.
fn lost(kind: Kind, times: usize) -> Moving {
    let mut left = times;
    let decide = Arc::new(Mutex::new(move |frame: &mut Frame| {
        if frame.kind != Some(kind) || left == 0 {
            return Fate::Pass;
        }
        left -= 1;
        Fate::Cut(0)
    }));
    let moving = Moving::begin_via(busy(600), Some(decide), |job, _| at_once(job), |_| {});
    wait_for_doubt(&moving);
    moving
}

/// Waits until the destination says that the source may not know.
fn wait_for_doubt(moving: &Moving) {
    loop {
        let there = moving.came.snapshot();
        if there.error.is_some_and(|why| why.contains("may not know")) {
            assert_eq!(there.status, Status::Completed);
            return;
        }
        assert!(!moving.arriving.is_finished());
        std::thread::yield_now();
    }
}

fn wait_for_source(moving: &Moving, status: Status) {
    moving.wait(|left, _| (left == status).then_some(()));
}

#[test]
fn a_source_that_was_never_told_comes_back_and_is() {
    require_userfault!();
    let mut moving = lost(Kind::Complete, 3);
    for _ in 0..3 {
        wait_for_source(&moving, Status::PostcopyPaused);
        wait_for_doubt(&moving);
        assert!(moving.coming.pause().is_err());
        assert!(moving.listen() && moving.resume());
    }
    wait_for_source(&moving, Status::Completed);
    let came = Arc::clone(&moving.came);
    // Both end by themselves.
    let (vm, outcome) = moving.source.join().unwrap();
    let (_, arrival) = moving.arriving.join().unwrap();
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert!(!vm.is_running() && arrival.is_ok());
    let there = came.snapshot();
    assert_eq!((there.status, there.error), (Status::Completed, None));
}

#[test]
fn a_source_that_knows_and_whose_word_is_lost_has_ended() {
    require_userfault!();
    let mut moving = lost(Kind::Done, 1);
    wait_for_source(&moving, Status::Completed);
    // Nobody comes any more, which nobody has to wait for.
    assert!(moving.listen());
    moving.coming.end("the process ends");
    moving.finish();
}
