use std::sync::Arc;
use std::thread::JoinHandle;

use super::*;

fn positions(patience: Duration) -> Arc<Positions> {
    Arc::new(Positions::new(Cancel::new().unwrap(), patience))
}

const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(30);

type Waiting = JoinHandle<Result<(), PositionError>>;

fn waiting(positions: &Arc<Positions>, connection: usize, sent: &[u64]) -> Waiting {
    let (there, sent) = (Arc::clone(positions), sent.to_vec());
    let thread = std::thread::spawn(move || there.wait(connection, &sent));
    // It waits, or it is over.
    while !thread.is_finished() && positions.lock().connections[connection].doing != Doing::Waiting
    {
        std::thread::yield_now();
    }
    thread
}

#[test]
fn what_is_there_is_not_waited_for() {
    let positions = positions(LONG);
    assert!(positions.join(1) && positions.join(3));
    assert!(!positions.join(1), "it came twice");
    positions.begin(1);
    positions.placed(1);
    // Its own entry says nothing, and one that has not come may have sent nothing.
    assert_eq!(positions.wait(FIRST, &[u64::MAX, 2, 0, 1]), Ok(()));
    positions.end(1);
    assert_eq!(positions.wait(3, &[1, 2, 0, u64::MAX]), Ok(()));
    assert!(!positions.join(1), "it came again after its end");
}

#[test]
fn a_barrier_holds_until_all_others_have_come_so_far() {
    let positions = positions(LONG);
    assert!(positions.join(1));
    let barrier = waiting(&positions, FIRST, &[9, 3, 2]);
    for _ in 0..2 {
        positions.begin(1);
        positions.placed(1);
    }
    assert!(!barrier.is_finished());
    // The other one comes only now.
    assert!(positions.join(2));
    assert!(!barrier.is_finished());
    positions.begin(2);
    assert!(
        !barrier.is_finished(),
        "a frame that has begun is not placed"
    );
    positions.placed(2);
    assert_eq!(barrier.join().unwrap(), Ok(()));
}

#[test]
fn the_first_connection_is_waited_for_too() {
    let positions = positions(LONG);
    assert!(positions.join(1));
    let barrier = waiting(&positions, 1, &[2, 0]);
    positions.placed(FIRST);
    assert_eq!(barrier.join().unwrap(), Ok(()));
}

#[test]
fn what_can_never_come_is_said_at_once() {
    let positions = positions(LONG);
    assert!(positions.join(2));
    let barrier = waiting(&positions, FIRST, &[1, 0, 7]);
    positions.placed(2);
    positions.end(2);
    let error = barrier.join().unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "data connection 1 ended after 2 frames, but 7 were sent on it"
    );
    let error = positions.wait(FIRST, &[1, 0, u64::MAX]).unwrap_err();
    assert!(matches!(error, PositionError::Ended { sent: u64::MAX, .. }));
}

#[test]
fn a_circle_of_barriers_and_silence_end_at_the_deadline() {
    let positions = positions(SHORT);
    assert!(positions.join(1) && positions.join(2));
    let circle = [
        waiting(&positions, 1, &[0, 0, 9]),
        waiting(&positions, 2, &[0, 9, 0]),
    ];
    for barrier in circle {
        let error = barrier.join().unwrap().unwrap_err();
        assert!(matches!(error, PositionError::Silent { .. }), "{error}");
    }
    // One that never came, and one on which nothing comes.
    for sent in [[0, 0, 0, 1], [0, 0, 2, 0]] {
        let error = positions.wait(FIRST, &sent).unwrap_err();
        assert!(matches!(error, PositionError::Silent { .. }), "{error}");
    }
    let error = positions.wait_ended().unwrap_err();
    assert!(matches!(error, PositionError::Open { .. }), "{error}");
}

/// A frame has deadlines of its own: who waits for it needs none.
#[test]
fn who_is_at_work_is_waited_for() {
    let positions = positions(SHORT);
    assert!(positions.join(1));
    positions.begin(1);
    let barrier = waiting(&positions, FIRST, &[0, 2]);
    let began = Instant::now();
    while began.elapsed() < 3 * SHORT {
        assert!(!barrier.is_finished());
        std::thread::yield_now();
    }
    positions.placed(1);
    assert_eq!(barrier.join().unwrap(), Ok(()));
}

#[test]
fn all_have_to_end() {
    let positions = positions(LONG);
    assert_eq!(positions.wait_ended(), Ok(()));
    assert!(positions.join(1) && positions.join(200));
    let there = Arc::clone(&positions);
    let ending = std::thread::spawn(move || there.wait_ended());
    positions.end(1);
    assert!(!ending.is_finished());
    positions.end(200);
    assert_eq!(ending.join().unwrap(), Ok(()));
}

#[test]
fn waits_end_when_it_is_over() {
    let positions = positions(LONG);
    let barrier = waiting(&positions, FIRST, &[0, 1]);
    positions.over.cancel("enough").unwrap();
    positions.wake();
    let over = Err(PositionError::Over("enough".to_owned()));
    assert_eq!(barrier.join().unwrap(), over);
    assert_eq!(positions.wait_ended(), over);
}
