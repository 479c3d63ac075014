//! Going on after a break: cuts in the middle of that, strangers who come first, and users who
//! pause and end at any moment.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use migration::frame::{HEADER_LEN, Header, Kind};
use migration::message::{Id, Preamble, Return};
use migration::progress::Status;
use migration::source::Outcome;

use super::{Decide, Ended, Moving, at_once, busy, require_userfault};
use crate::proxy::{Fate, Frame, socket_address};

/// A migration in post-copy that takes long: the guest waits for its last page.
fn slow(decide: Option<Decide>) -> Moving {
    Moving::begin_via(
        busy(600),
        decide,
        |job, _| {
            at_once(job);
            // All of it takes a second.
            job.parameters.set_max_postcopy_bandwidth(2_000_000);
        },
        |there| there.on_load = None,
    )
}

const HANDSHAKE: [Kind; 5] = [
    Kind::Resume,
    Kind::Arrived,
    Kind::Left,
    Kind::Join,
    Kind::Continue,
];

#[test]
fn every_frame_of_a_recovery_can_be_lost() {
    require_userfault!();
    let mut cuts = vec![];
    for kind in HANDSHAKE {
        cuts.extend([0, HEADER_LEN / 2, HEADER_LEN + 1, usize::MAX].map(|at| (kind, at)));
    }
    let left = Arc::new(Mutex::new(cuts));
    let decide = Arc::new(Mutex::new({
        let left = Arc::clone(&left);
        move |frame: &mut Frame| {
            let mut left = left.lock().unwrap();
            // The first connections, in which JOIN is no recovery.
            let Some(&(kind, at)) = left.last() else {
                return Fate::Pass;
            };
            let recovery = frame.kind != Some(Kind::Join) || !is_first(frame);
            if frame.kind != Some(kind) || !recovery {
                return Fate::Pass;
            }
            left.pop();
            match at {
                usize::MAX => Fate::PassAndCut,
                at => Fate::Cut(at),
            }
        }
    }));
    let moving = slow(Some(decide));
    assert!(moving.wait_for_both(Status::PostcopyActive));
    moving.leaving.pause().unwrap();
    moving.finish();
    assert!(left.lock().unwrap().is_empty());
}

/// Whether the attempt that a JOIN is about is 0.
fn is_first(frame: &Frame) -> bool {
    frame.bytes[HEADER_LEN + 16..] == [0; 4]
}

/// A preamble and the first frame of a connection.
fn first_words(kind: Kind, id: Id, attempt: u32) -> Vec<u8> {
    let mut body = vec![];
    Return { id, attempt }.encode(&mut body);
    let header = Header {
        kind,
        sequence: 0,
        body_len: body.len() as u32,
        payload_len: 0,
        body_crc: crc32fast::hash(&body),
    };
    [&Preamble::OURS.encode()[..], &header.encode(), &body].concat()
}

#[test]
fn strangers_never_get_in_and_never_delay() {
    require_userfault!();
    let id = Arc::new(Mutex::new(None));
    let decide = Arc::new(Mutex::new({
        let id = Arc::clone(&id);
        move |frame: &mut Frame| {
            if frame.kind == Some(Kind::Join) {
                let bytes = &frame.bytes[HEADER_LEN..HEADER_LEN + 16];
                *id.lock().unwrap() = Some(Id(bytes.try_into().unwrap()));
            }
            Fate::Pass
        }
    }));
    let mut moving = slow(Some(decide));
    assert!(moving.wait_for_both(Status::PostcopyActive));
    moving.coming.pause().unwrap();
    // One recovery, so that there is an attempt that is over.
    assert!(moving.recover());
    assert!(moving.wait_for_both(Status::PostcopyActive));
    moving.leaving.pause().unwrap();
    assert!(moving.wait_for_both(Status::PostcopyPaused));
    let id = id.lock().unwrap().unwrap();
    moving.decide = None;
    assert!(moving.listen());
    let address = socket_address(&moving.uri);
    let connect = || TcpStream::connect(&address).unwrap();
    let strangers: Vec<Vec<u8>> = vec![
        vec![0x55; 4096],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        first_words(Kind::Resume, Id([9; 16]), 2),
        first_words(Kind::Resume, id, 1),
        first_words(Kind::Resume, id, 0),
        first_words(Kind::Join, id, 2),
        [&Preamble::OURS.encode()[..], &[0xff; 64]].concat(),
    ];
    for said in strangers {
        let mut stream = connect();
        let _ = stream.write_all(&said);
        let mut answer = vec![];
        // It may be reset for what was not read.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{said:?} was answered");
    }
    let silent = Preamble::OURS.encode();
    let waiting: Vec<TcpStream> = (0..70)
        .map(|number| {
            let mut stream = connect();
            stream.write_all(&silent[..number % 17]).unwrap();
            stream
        })
        .collect();
    moving.leaving.recover(moving.uri.clone()).unwrap();
    moving.finish();
    drop(waiting);
}

/// Ends it once all are over by themselves.
fn join(moving: Moving) -> Ended {
    let (vm, outcome) = moving.source.join().unwrap();
    let (there, arrival) = moving.arriving.join().unwrap();
    assert!(!vm.is_running());
    Ended {
        vm,
        outcome,
        there,
        arrival,
    }
}

#[test]
fn the_source_is_told_when_the_guest_ends() {
    require_userfault!();
    for recovered in [false, true] {
        let mut moving = slow(None);
        assert!(moving.wait_for_both(Status::PostcopyActive));
        if recovered {
            moving.coming.pause().unwrap();
            assert!(moving.recover() && moving.wait_for_both(Status::PostcopyActive));
        }
        moving.coming.end("the guest was reset");
        moving.coming.end("again");
        let (left, came) = (Arc::clone(&moving.left), Arc::clone(&moving.came));
        let ended = join(moving);
        assert!(matches!(ended.outcome, Outcome::Completed(_)));
        assert!(ended.arrival.is_ok());
        let reason = |error: Option<String>| error.unwrap();
        assert_eq!(reason(left.snapshot().error), "the guest was reset");
        assert_eq!(reason(came.snapshot().error), "the guest was reset");
        assert_eq!(came.status(), Status::Failed);
    }
}

/// Right after GO, before the source has looked at RUNNING.
#[test]
fn a_guest_that_ends_at_once_is_told_too() {
    require_userfault!();
    let held = Arc::new(Mutex::new(Vec::new()));
    // RUNNING goes on together with what follows it.
    let decide = Arc::new(Mutex::new({
        let held = Arc::clone(&held);
        move |frame: &mut Frame| {
            let mut held = held.lock().unwrap();
            if frame.kind == Some(Kind::Running) {
                *held = std::mem::take(&mut frame.bytes);
            } else if frame.kind == Some(Kind::Gone) {
                frame.bytes = [&std::mem::take(&mut *held)[..], &frame.bytes].concat();
            }
            Fate::Pass
        }
    }));
    let moving = slow(Some(decide));
    let ran = moving.wait(|left, came| match came {
        Status::PostcopyActive => Some(true),
        _ => left.is_over().then_some(false),
    });
    assert!(ran);
    moving.coming.end("it was short");
    let left = Arc::clone(&moving.left);
    let ended = join(moving);
    assert!(
        matches!(ended.outcome, Outcome::Completed(_)),
        "{:?}",
        ended.outcome
    );
    assert_eq!(left.snapshot().error.as_deref(), Some("it was short"));
}

#[test]
fn both_sides_can_be_ended_while_paused_and_while_they_recover() {
    require_userfault!();
    for recovering in [false, true] {
        let mut moving = slow(None);
        assert!(moving.wait_for_both(Status::PostcopyActive));
        moving.leaving.pause().unwrap();
        assert!(moving.wait_for_both(Status::PostcopyPaused));
        // Accepts connections and says nothing.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        if recovering {
            assert!(moving.listen());
            let address = silent.local_addr().unwrap();
            let nowhere = format!("tcp:{address}").parse().unwrap();
            moving.leaving.recover(nowhere).unwrap();
            moving.wait_for_both(Status::PostcopyRecover);
        }
        moving.leaving.end("the source ends");
        moving.coming.end("the destination ends");
        let came = Arc::clone(&moving.came);
        let ended = join(moving);
        assert!(
            matches!(&ended.outcome, Outcome::Abandoned { reason } if reason == "the source ends"),
            "{:?}",
            ended.outcome
        );
        assert!(ended.arrival.is_ok());
        let error = came.snapshot().error;
        assert_eq!(error.as_deref(), Some("the destination ends"));
    }
}

#[test]
fn a_source_that_ends_leaves_the_destination_paused() {
    require_userfault!();
    let moving = slow(None);
    assert!(moving.wait_for_both(Status::PostcopyActive));
    moving.leaving.end("it has to go");
    moving.wait(|_, came| (came == Status::PostcopyPaused).then_some(()));
    moving.coming.end("nobody comes");
    let ended = join(moving);
    let outcome = &ended.outcome;
    assert!(
        matches!(outcome, Outcome::Abandoned { reason } if reason == "it has to go"),
        "{outcome:?}"
    );
}

#[test]
fn a_recovery_can_be_paused() {
    require_userfault!();
    let mut moving = slow(None);
    assert!(moving.wait_for_both(Status::PostcopyActive));
    assert!(moving.leaving.pause().is_ok());
    assert!(moving.wait_for_both(Status::PostcopyPaused));
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = format!("tcp:{}", silent.local_addr().unwrap());
    assert!(moving.listen());
    moving.leaving.recover(nowhere.parse().unwrap()).unwrap();
    for (control, paused) in [(0, Status::PostcopyPaused), (1, Status::PostcopyPaused)] {
        match control {
            0 => moving.leaving.pause().unwrap(),
            _ => moving.coming.pause().unwrap(),
        }
        moving.wait(|left, came| (paused == [left, came][control]).then_some(()));
    }
    assert!(moving.recover());
    moving.finish();
}

#[test]
fn nothing_is_handed_over_once_the_source_has_ended() {
    require_userfault!();
    let moving = Moving::begin(busy(600), |job, _| {
        at_once(job);
        job.postcopy.as_ref().unwrap().end("the process ends");
    });
    let (vm, outcome) = moving.source.join().unwrap();
    let (there, arrival) = moving.arriving.join().unwrap();
    assert!(matches!(outcome, Outcome::Cancelled { .. }), "{outcome:?}");
    assert!(vm.is_running() && arrival.is_err());
    assert!(!there.ran.load(std::sync::atomic::Ordering::SeqCst));
}
