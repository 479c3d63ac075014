//! Guests that write faster than their memory moves: slowed down, or given up on after a time.

use std::sync::Arc;
use std::time::Duration;

use migration::cancel::Cancel;
use migration::clock::MonotonicClock;
use migration::parameters::TimeoutAction;
use migration::progress::{Observer, Progress, Round};
use migration::source::{self, Guest, Outcome, Peer, SourceError};
use migration::throttle::Throttle;

use crate::machine::{Destination, Source, Writes};
use crate::whole::{arrive, assert_moved, destination_job, source_job, unix_pair};

/// It writes to 6 MiB, to all of it in each round that the link takes for that; but only as often as
/// it runs.
fn writer() -> Source {
    let mut vm = Source::new(2000, 0);
    vm.blobs.clear();
    vm.run(Writes {
        pages: 1500,
        batch: 50,
        blocks: 0,
        rest: Duration::from_micros(300),
    });
    vm
}

/// On a link of 20 MiB/s, where 1500 pages take 0.3 s and the downtime limit leaves room for few.
fn slow_job() -> source::Job {
    let job = source_job();
    job.parameters.set_max_bandwidth(20 << 20);
    job.parameters.set_avail_switchover_bandwidth(20 << 20);
    job.parameters.set_downtime_limit_ms(50).unwrap();
    let throttle = job.parameters.throttle();
    throttle.set_initial(50).unwrap();
    throttle.set_increment(45).unwrap();
    job
}

fn run(vm: &mut Source, job: &source::Job) -> Outcome {
    let (a, b) = unix_pair();
    let arriving = arrive(Destination::of(vm), b, destination_job());
    let outcome = source::migrate(vm, Peer::Connected(a), job);
    let (destination, arrival) = arriving.join().unwrap();
    if matches!(outcome, Outcome::Completed(_)) {
        assert_moved(vm, &outcome, &destination, &arrival);
    } else {
        assert!(arrival.is_err());
    }
    outcome
}

/// Cancels once a round has ended that `enough` says.
struct CancelWhen<F>(Cancel, F);

impl<F: Fn(&Round) -> bool + Send + Sync> Observer for CancelWhen<F> {
    fn round_ended(&self, round: &Round) {
        if (self.1)(round) {
            self.0.cancel("enough").unwrap();
        }
    }
}

fn cancel_when(job: &mut source::Job, enough: impl Fn(&Round) -> bool + Send + Sync + 'static) {
    let observer = CancelWhen(job.cancel.clone(), enough);
    let clock = Arc::new(MonotonicClock);
    job.progress = Arc::new(Progress::new(clock, Some(Box::new(observer))));
}

fn throttles(vm: &Source) -> Vec<String> {
    let calls = vm.calls().into_iter();
    calls.filter(|call| call.starts_with("throttle")).collect()
}

#[test]
fn a_guest_that_is_slowed_down_converges_and_one_that_is_not_does_not() {
    let (mut vm, mut job) = (writer(), slow_job());
    cancel_when(&mut job, |round| round.number == 12);
    let outcome = run(&mut vm, &job);
    let untouched = matches!(
        outcome,
        Outcome::Cancelled {
            guest: Guest::Untouched,
            ..
        }
    );
    assert!(untouched, "{outcome:?}");
    assert_eq!(throttles(&vm), [""; 0]);

    let job = slow_job();
    job.parameters.throttle().set_auto_converge(true);
    let outcome = run(&mut vm, &job);
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    let calls = throttles(&vm);
    assert_eq!(calls[0], "throttle Share(50)");
    assert_eq!(calls[1], "throttle Share(95)");
    assert_eq!(calls.last().unwrap(), "throttle Off");
    assert_eq!(job.progress.snapshot().throttle, Throttle::Off);
    // Not before it stands still, and before anything that a failure could come from.
    let calls = vm.calls();
    let pause = calls.iter().position(|call| call == "pause").unwrap();
    assert_eq!(calls[pause + 1], "throttle Off");
}

#[test]
fn a_guest_that_stays_here_is_as_fast_as_before() {
    let (mut vm, mut job) = (writer(), slow_job());
    job.parameters.throttle().set_auto_converge(true);
    // Stuck at 50 %, which is not enough.
    job.parameters.throttle().set_max(50).unwrap();
    cancel_when(&mut job, |round| round.number == 12);
    let outcome = run(&mut vm, &job);
    assert!(matches!(outcome, Outcome::Cancelled { .. }), "{outcome:?}");
    assert_eq!(throttles(&vm), ["throttle Share(50)", "throttle Off"]);
    assert_eq!(job.progress.snapshot().throttle, Throttle::Off);
}

#[test]
fn a_machine_that_cannot_slow_its_guest_down_fails_and_the_guest_runs_on() {
    let (mut vm, job) = (writer(), slow_job());
    job.parameters.throttle().set_auto_converge(true);
    vm.hook = Box::new(|call| match call {
        "throttle Share(50)" => Err("no way".into()),
        _ => Ok(()),
    });
    let outcome = run(&mut vm, &job);
    let Outcome::Failed { error, .. } = outcome else {
        panic!("{outcome:?}");
    };
    assert!(matches!(error, SourceError::Vm { .. }), "{error}");
    assert!(vm.is_running());
    assert_eq!(throttles(&vm).last().unwrap(), "throttle Off");
}

#[test]
fn a_dirty_limit_goes_by_what_the_link_takes() {
    let (mut vm, mut job) = (writer(), slow_job());
    job.parameters.throttle().set_dirty_limit(true);
    cancel_when(&mut job, |round| round.number == 8);
    run(&mut vm, &job);
    let calls = throttles(&vm);
    let total = calls[0]
        .strip_prefix("throttle DirtyRate { total: ")
        .and_then(|rest| rest.split_once(','))
        .unwrap_or_else(|| panic!("{calls:?}"));
    // Half of 20 MiB/s; the machine may be busy with other things.
    let total: u64 = total.0.parse().unwrap();
    assert!((1 << 20..12 << 20).contains(&total), "{total}");
    assert_eq!(calls.last().unwrap(), "throttle Off");
}

fn timeout(job: &source::Job, action: TimeoutAction) {
    job.parameters.timeout().set_ms(400);
    job.parameters.timeout().set_action(action);
}

#[test]
fn a_migration_that_takes_too_long_is_cancelled() {
    let (mut vm, job) = (writer(), slow_job());
    timeout(&job, TimeoutAction::Cancel);
    let outcome = run(&mut vm, &job);
    let Outcome::Cancelled { reason, .. } = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(reason, "it took longer than the timeout of 400 ms");
    assert!(vm.is_running());
}

/// The time is up in the first round.
#[test]
fn a_migration_that_takes_too_long_is_brought_to_its_end() {
    let (mut vm, job) = (Source::new(10_000, 0), slow_job());
    vm.blobs.clear();
    job.parameters.set_max_bandwidth(1 << 20);
    job.parameters.set_avail_switchover_bandwidth(1 << 20);
    timeout(&job, TimeoutAction::Force);
    let outcome = run(&mut vm, &job);
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    let rounds = job.progress.snapshot().rounds;
    assert_eq!(rounds.len(), 2);
    assert!(rounds[0].pages < rounds[1].pages, "{rounds:?}");
}

/// With this bandwidth a single page takes more than an hour.
#[test]
fn a_forced_migration_does_not_wait_for_its_pace() {
    let (mut vm, job) = (Source::new(10_000, 0), slow_job());
    vm.blobs.clear();
    job.parameters.set_max_bandwidth(1);
    timeout(&job, TimeoutAction::Force);
    let outcome = run(&mut vm, &job);
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    let rounds = job.progress.snapshot().rounds;
    // Nor does the rest of what was begun go without a pace while the guest runs.
    let sent = |round: usize| rounds[round].pages + rounds[round].zero;
    assert!(sent(0) > 0 && sent(0) < 1000, "{rounds:?}");
    assert!(sent(1) > 9000, "{rounds:?}");
}

#[test]
fn a_migration_that_may_not_go_over_into_postcopy_does_not_begin() {
    let (mut vm, job) = (writer(), slow_job());
    timeout(&job, TimeoutAction::Postcopy);
    let outcome = source::migrate(&mut vm, Peer::Connected(unix_pair().0), &job);
    let refused = matches!(
        outcome,
        Outcome::Failed {
            error: SourceError::TimeoutAction,
            guest: Guest::Untouched
        }
    );
    assert!(refused, "{outcome:?}");
    assert_eq!(vm.calls(), [""; 0]);
}
