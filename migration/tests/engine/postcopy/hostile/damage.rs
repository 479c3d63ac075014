//! Bytes that change on the way, at random.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration::frame::{HEADER_LEN, Kind};
use migration::link::Deadlines;
use migration::progress::Status;

use crate::postcopy::{Moving, at_once, busy, require_userfault};
use crate::proxy::{Fate, Frame};
use crate::whole::short;

fn next(random: &mut u64) -> usize {
    *random = random
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    (*random >> 33) as usize
}

/// What is checked is not all of a migration: the connection is broken once, to be recovered, and
/// then one byte of one frame in about ten changes, at most three times.
fn damaged(seed: u64, repair: bool) -> Moving {
    let state = Arc::new(Mutex::new((seed, 3)));
    let decide = Arc::new(Mutex::new(move |frame: &mut Frame| {
        let (random, left) = &mut *state.lock().unwrap();
        if frame.kind.is_none() || *left == 0 || !next(random).is_multiple_of(10) {
            return Fate::Pass;
        }
        *left -= 1;
        if !repair {
            let at = next(random) % frame.bytes.len();
            frame.bytes[at] ^= 1 << (next(random) % 8);
        } else if frame.payload > HEADER_LEN && frame.kind != Some(Kind::Resume) {
            // As a peer would say it that means it.
            let at = HEADER_LEN + next(random) % (frame.payload - HEADER_LEN);
            frame.bytes[at] ^= 1 << (next(random) % 8);
            let crc = crc32fast::hash(&frame.bytes[HEADER_LEN..frame.payload]);
            frame.bytes[16..20].copy_from_slice(&crc.to_le_bytes());
            let crc = crc32fast::hash(&frame.bytes[..20]);
            frame.bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        }
        Fate::Pass
    }));
    let soon = Duration::from_secs(1);
    let deadlines = Deadlines {
        handshake: soon,
        progress: soon,
        resume: soon,
        go: soon,
        running: soon,
        stop_margin: soon,
        linger: soon,
        ..short()
    };
    let moving = Moving::begin_via(
        busy(300),
        Some(decide),
        |job, their_job| {
            at_once(job);
            job.parameters.set_max_postcopy_bandwidth(30_000_000);
            (job.deadlines, their_job.deadlines) = (deadlines.clone(), deadlines);
        },
        |_| {},
    );
    // The damage may have broken it before.
    let broken = |status: Status| status.is_over() || status == Status::PostcopyPaused;
    moving.wait(|left, came| {
        let active = left == Status::PostcopyActive && came == Status::PostcopyActive;
        (active || broken(left) || broken(came)).then_some(())
    });
    let _ = moving.leaving.pause();
    moving
}

/// Many at a time: most of the time they wait for what does not come.
fn each(seeds: u64, check: impl Fn(u64) + Sync) {
    for first in (0..seeds).step_by(10) {
        std::thread::scope(|scope| {
            for seed in first..first + 10 {
                let check = &check;
                scope.spawn(move || check(seed));
            }
        });
    }
}

#[test]
fn damage_is_found_and_survived() {
    require_userfault!();
    each(40, |seed| {
        damaged(seed, false).check(&format!("seed {seed}"));
    });
}

/// Numbers that are wrong and say so well. Memory may be wrong then, which nobody can tell.
#[test]
fn numbers_that_are_wrong_end_nothing_but_the_migration() {
    require_userfault!();
    each(40, |seed| {
        let mut moving = damaged(1000 + seed, true);
        moving.settle();
        let (vm, outcome) = moving.source.join().unwrap();
        let (there, arrival) = moving.arriving.join().unwrap();
        let ran = there.ran.load(std::sync::atomic::Ordering::SeqCst);
        let what = format!("seed {seed}: {outcome:?}, {arrival:?}");
        assert!(!(ran && vm.is_running()), "runs twice: {what}");
        assert_eq!(ran, arrival.is_ok(), "{what}");
    });
}
