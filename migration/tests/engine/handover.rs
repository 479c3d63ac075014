//! Who runs the guest when the end does not go as planned.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration::clock::MonotonicClock;
use migration::frame::{HEADER_LEN, Kind};
use migration::progress::{Observer, Progress, Status};
use migration::source::{self, Guest, Outcome, Peer};

use crate::machine::{Destination, Source};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{
    BUSY_SMALL, arrive, assert_moved, destination_job, migrate, short, source_job, unix_pair,
};

/// Fails the destination's call of that name; the source must say why, and run on.
fn destination_fails(call: &'static str) -> (String, Guest) {
    let mut vm = Source::new(400, 0);
    vm.run(BUSY_SMALL);
    let mut destination = Destination::default();
    destination.hook = Box::new(move |name| {
        if name == call {
            return Err("no such luck\nand no time".into());
        }
        Ok(())
    });
    let (a, b) = unix_pair();
    let arriving = arrive(destination, b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
    let (destination, arrival) = arriving.join().unwrap();
    assert!(arrival.is_err() && !destination.ran.load(Ordering::SeqCst));
    assert!(vm.is_running());
    let Outcome::Failed { error, guest } = outcome else {
        panic!("{outcome:?}")
    };
    let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
    assert_moved(&vm, &outcome, &destination, &arrival);
    (error.to_string(), guest)
}

#[test]
fn the_destinations_reason_arrives() {
    let (error, guest) = destination_fails("prepare");
    assert_eq!(error, "the destination refused: no such luck\nand no time");
    assert!(matches!(guest, Guest::Untouched));
    let (error, guest) = destination_fails("load");
    assert!(
        error.starts_with("the destination failed: loading the state failed: no such luck"),
        "{error}"
    );
    assert!(matches!(guest, Guest::Resumed));
    // After GO: it has not run, says so, and never will.
    let (error, guest) = destination_fails("start");
    assert!(error.contains("starting the guest failed"), "{error}");
    assert!(matches!(guest, Guest::Resumed));
}

/// What happens from the stop on, in order: the machine's calls and what the observer is told.
fn from_the_stop_on(fails: &'static str) -> Vec<String> {
    struct Told(Arc<Mutex<Vec<String>>>);
    impl Observer for Told {
        fn status_changed(&self, status: Status) {
            self.0.lock().unwrap().push(format!("{status:?}"));
        }
        fn pass_begun(&self, _: u64) {
            self.0.lock().unwrap().push("pass".to_owned());
        }
    }
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let mut vm = Source::new(400, 0);
    vm.hook = Box::new({
        let log = Arc::clone(&log);
        move |name| {
            log.lock().unwrap().push(name.to_owned());
            match name == fails {
                true => Err("broken".into()),
                false => Ok(()),
            }
        }
    });
    let mut job = source_job();
    // Whatever the link is measured to be, the stop is expected to be short.
    job.parameters.set_avail_switchover_bandwidth(1 << 40);
    job.progress = Arc::new(Progress::new(
        Arc::new(MonotonicClock),
        Some(Box::new(Told(Arc::clone(&log)))),
    ));
    let (a, b) = unix_pair();
    let arriving = arrive(Destination::default(), b, destination_job());
    source::migrate(&mut vm, Peer::Connected(a), &job);
    let _ = arriving.join().unwrap();
    let log = log.lock().unwrap();
    let stop = log.iter().position(|what| what == "pause").unwrap();
    let heard = ["harvest", "stop_dirty_log"];
    let from = log[stop..].iter();
    from.filter(|what| !heard.contains(&what.as_str()))
        .cloned()
        .collect()
}

#[test]
fn nobody_is_told_of_a_short_stop_before_it_is_over() {
    let moved = ["pause", "save", "release", "handed_over"];
    let told = ["Device", "pass", "Completed"];
    assert_eq!(from_the_stop_on(""), [&moved[..], &told].concat());
    let failed = ["pause", "save", "release", "resume"];
    let told = ["Device", "pass", "Failed"];
    assert_eq!(from_the_stop_on("release"), [&failed[..], &told].concat());
}

#[test]
fn running_says_when_the_guest_was_entered_however_late_it_is_sent() {
    let mut vm = Source::new(400, 0);
    vm.run(BUSY_SMALL);
    // Before GO came: what is less than nothing is nothing.
    let destination = Destination {
        entered: Some(Duration::from_nanos(1)),
        ..Destination::default()
    };
    let bodies: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let stream = proxied({
        let bodies = Arc::clone(&bodies);
        move |frame: &mut Frame| {
            if frame.kind == Some(Kind::Running) {
                bodies
                    .lock()
                    .unwrap()
                    .push(frame.bytes[HEADER_LEN..].to_vec());
            }
            Fate::Pass
        }
    });
    let arriving = arrive(destination, stream.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &source_job());
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    assert_eq!(*bodies.lock().unwrap(), [[0; 8]]);
}

#[test]
fn a_destination_that_fails_amid_the_pages_is_heard() {
    let mut vm = Source::new(20_000, 0);
    vm.run(BUSY_SMALL);
    let job = destination_job();
    let cancel = job.cancel.clone();
    let stream = proxied(move |frame: &mut Frame| {
        if frame.kind == Some(Kind::Pages) && frame.index > 6 {
            let _ = cancel.cancel("the host shuts down");
        }
        Fate::Pass
    });
    let arriving = arrive(Destination::default(), stream.1, job);
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &source_job());
    assert!(arriving.join().unwrap().1.is_err());
    let Outcome::Failed { error, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        error.to_string(),
        "the destination failed: the host shuts down"
    );
    assert!(vm.is_running());
}

#[test]
fn the_source_machine_fails() {
    for (call, what) in [
        ("offer", "describing the guest failed: broken"),
        (
            "start_dirty_log",
            "switching the dirty log on failed: broken",
        ),
        ("harvest", "reading the dirty log failed: broken"),
        ("protect", "protecting memory failed: broken"),
        ("save", "saving the state failed: broken"),
        (
            "release",
            "giving up what only one side may hold failed: broken",
        ),
    ] {
        let mut vm = Source::new(400, 0);
        vm.run(BUSY_SMALL);
        vm.hook = Box::new(move |name| {
            if name == call {
                return Err("broken".into());
            }
            Ok(())
        });
        let (outcome, destination, arrival) = match call {
            // Nothing has been sent: the destination waits in vain for a preamble.
            "offer" => {
                let (a, _b) = unix_pair();
                let outcome = source::migrate(&mut vm, Peer::Connected(a), &source_job());
                (outcome, None, None)
            }
            _ => {
                let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
                (outcome, Some(destination), Some(arrival))
            }
        };
        let Outcome::Failed { error, .. } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(error.to_string(), what);
        assert!(vm.is_running());
        if let (Some(destination), Some(arrival)) = (destination, arrival) {
            assert!(!destination.ran.load(Ordering::SeqCst));
            assert_eq!(
                arrival.unwrap_err().to_string(),
                format!("the source cancelled: {what}")
            );
        }
    }
}

#[test]
fn a_go_that_is_lost_leaves_it_open() {
    for (kind, ran) in [(Kind::Go, false), (Kind::Running, true)] {
        let mut vm = Source::new(400, 0);
        vm.run(BUSY_SMALL);
        let mut job = source_job();
        job.deadlines.running = Duration::from_millis(50);
        let stream = proxied(move |frame: &mut Frame| {
            if frame.kind == Some(kind) {
                return Fate::Hold;
            }
            Fate::Pass
        });
        let arriving = arrive(Destination::default(), stream.1, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &job);
        assert!(
            matches!(outcome, Outcome::HandoverUnknown { .. }),
            "{outcome:?}"
        );
        assert_eq!(job.progress.status(), Status::HandoverUnknown);
        assert!(!vm.is_running(), "the guest may be running there");
        assert!(!vm.calls().contains(&"resume".to_owned()));
        assert!(vm.calls().contains(&"stop_dirty_log".to_owned()));
        let (destination, arrival) = arriving.join().unwrap();
        assert_eq!(destination.ran.load(Ordering::SeqCst), ran);
        assert_eq!(arrival.is_ok(), ran);
    }
}

#[test]
fn a_destination_that_waits_in_vain_for_go_says_so() {
    let mut vm = Source::new(400, 0);
    vm.run(BUSY_SMALL);
    let mut job = destination_job();
    job.deadlines = short();
    let stream = proxied(|frame: &mut Frame| {
        if frame.kind == Some(Kind::Go) {
            return Fate::Hold;
        }
        Fate::Pass
    });
    let arriving = arrive(Destination::default(), stream.1, job);
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &source_job());
    // GO had left; but the destination says that the guest has not run and never will.
    let Outcome::Failed { error, guest } = outcome else {
        panic!("{outcome:?}")
    };
    assert!(error.to_string().starts_with("the destination failed"));
    assert!(matches!(guest, Guest::Resumed) && vm.is_running());
    let (destination, arrival) = arriving.join().unwrap();
    assert!(arrival.is_err() && !destination.ran.load(Ordering::SeqCst));
}

#[test]
fn from_a_to_b_to_c_and_back() {
    let mut vm = Source::new(400, 77);
    for _ in 0..20 {
        let (outcome, destination, arrival) = migrate(&mut vm, unix_pair());
        assert_moved(&vm, &outcome, &destination, &arrival);
        let mut next = Source::new(1, 0);
        next.layout = vm.layout.clone();
        next.ram = destination.ram.unwrap();
        next.run(BUSY_SMALL);
        vm = next;
    }
}
