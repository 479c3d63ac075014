//! Migrations in which nothing goes wrong but that the connection breaks.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use migration::frame::Kind;
use migration::parameters::TimeoutAction;
use migration::progress::Status;

use super::{Moving, at_once, busy, require_userfault};
use crate::proxy::{Fate, Frame};
use crate::unchecked::has_checksums;

#[test]
fn a_guest_moves_before_any_of_its_memory() {
    require_userfault!();
    let moving = Moving::begin(busy(16_384), |job, _| {
        at_once(job);
    });
    let came = Arc::clone(&moving.came);
    moving.finish();
    let postcopy = came.snapshot().postcopy.unwrap();
    assert!(
        postcopy.requests > 0 && postcopy.missing_pages == 0,
        "{postcopy:?}"
    );
}

/// Also over the connections of a recovery.
#[test]
fn a_guest_moves_before_its_memory_without_checksums() {
    require_userfault!();
    let late = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&late);
    let decide = Arc::new(Mutex::new(move |frame: &mut Frame| {
        if frame.kind == Some(Kind::Pages) {
            assert!(!has_checksums(frame));
            count.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    }));
    let mut moving = Moving::begin_via(
        busy(4000),
        Some(decide),
        |job, _| {
            at_once(job);
            job.parameters.set_page_checksum(false);
            // Slow enough to be broken in the middle.
            job.parameters.set_max_postcopy_bandwidth(30_000_000);
        },
        |_| {},
    );
    moving.wait(|left, came| (left.is_postcopy() && came.is_postcopy()).then_some(()));
    let before = late.load(Ordering::SeqCst);
    moving.leaving.pause().unwrap();
    assert!(moving.recover());
    moving.finish();
    assert!(late.load(Ordering::SeqCst) > before);
}

#[test]
fn a_guest_moves_in_the_middle_of_its_rounds() {
    require_userfault!();
    let moving = Moving::begin(busy(16_384), |job, _| {
        // Never converges.
        job.parameters.set_downtime_limit_ms(0).unwrap();
    });
    while moving.left.snapshot().round < 3 {
        std::thread::yield_now();
    }
    moving.leaving.start();
    let left = Arc::clone(&moving.left);
    moving.finish();
    assert!(left.snapshot().downtime.is_some());
}

#[test]
fn a_guest_moves_when_its_time_is_up() {
    require_userfault!();
    let moving = Moving::begin(busy(16_384), |job, _| {
        // Never converges.
        job.parameters.set_downtime_limit_ms(0).unwrap();
        job.parameters.timeout().set_ms(300);
        let postcopy = TimeoutAction::Postcopy;
        job.parameters.timeout().set_action(postcopy);
    });
    let came = Arc::clone(&moving.came);
    moving.finish();
    assert!(came.snapshot().postcopy.is_some());
}

/// Not even its pace holds it up, which has it wait for more than an hour in the middle of a pass.
#[test]
fn a_guest_moves_when_its_time_is_up_whatever_the_bandwidth() {
    require_userfault!();
    for multifd in [false, true] {
        let mut vm = busy(16_384);
        vm.blobs.clear();
        let moving = Moving::begin(vm, |job, _| {
            job.parameters.set_max_bandwidth(1);
            job.parameters.set_multifd(multifd);
            job.parameters.timeout().set_ms(300);
            let postcopy = TimeoutAction::Postcopy;
            job.parameters.timeout().set_action(postcopy);
        });
        let came = Arc::clone(&moving.came);
        moving.finish();
        assert!(came.snapshot().postcopy.is_some());
    }
}

#[test]
fn a_connection_that_breaks_again_and_again_is_replaced() {
    require_userfault!();
    for seed in 0..10 {
        let mut moving = Moving::begin(busy(16_384), |job, _| {
            at_once(job);
        });
        let mut breaks = 0;
        while moving.wait_for_both(Status::PostcopyActive) && breaks < 5 {
            let broken = match (seed + breaks) % 2 {
                0 => moving.leaving.pause().is_ok(),
                _ => moving.coming.pause().is_ok(),
            };
            breaks += 1;
            if broken && !moving.recover() {
                break;
            }
        }
        moving.finish();
    }
}

/// What goes on other connections has all been placed, and they have ended, when it is told what is
/// missing.
#[test]
fn a_guest_whose_rounds_go_over_several_connections_moves_in_the_middle() {
    require_userfault!();
    for rounds in [0, 1, 3] {
        let moving = Moving::begin(busy(16_384), |job, _| {
            job.parameters.set_downtime_limit_ms(0).unwrap();
            job.parameters.set_multifd(true);
            job.parameters.set_multifd_all(true);
            if rounds == 0 {
                at_once(job);
            }
        });
        while moving.left.snapshot().round < rounds {
            std::thread::yield_now();
        }
        moving.leaving.start();
        let left = Arc::clone(&moving.left);
        moving.finish();
        let multifd = left.snapshot().multifd.unwrap();
        assert_eq!(multifd.channels, 2);
        assert!(rounds < 2 || multifd.bytes > 100_000, "{multifd:?}");
    }
}
