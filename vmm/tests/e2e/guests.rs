//! What each test guest notices of several migrations: registers, clocks, the serial port.

use std::time::{Duration, Instant};

use guest_tests::{clock, echo, state};
use serde_json::json;

use crate::harness::{Ferry, Guest, require_kvm, scratch};

/// For the comparison of a guest's clock with ours: a loaded machine may take this long to bring
/// a line of the guest's here. It is no limit on the migration.
const SLACK: Duration = Duration::from_secs(5);

pub fn state_guest() -> Guest<'static> {
    let options = state::Options {
        interval: 250,
        ..state::Options::default()
    };
    Guest {
        image: guest_tests::STATE,
        append: options.to_string(),
        memory: "64M",
        smp: 2,
    }
}

/// What one vCPU has done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    rounds: u64,
    checks: u64,
    lapic_ticks: u64,
    pit_ticks: u64,
}

/// Waits until each vCPU has gone far enough beyond `since`; a changed value fails the test.
pub fn wait_state(ferry: &Ferry, since: [Done; 2]) -> [Done; 2] {
    // The guest judges its ticks over 200 of them.
    const TICKS: u64 = 210;
    let mut now = since;
    ferry.wait_line(|line| {
        match state::Report::parse(line) {
            Some(state::Report::Changed { .. }) => panic!("the guest says: {line}"),
            Some(state::Report::Ok {
                cpu,
                rounds,
                checks,
                lapic_ticks,
                pit_ticks,
                changed,
                ..
            }) => {
                assert_eq!(changed, 0, "{line}");
                now[cpu as usize] = Done {
                    rounds,
                    checks,
                    lapic_ticks,
                    pit_ticks,
                };
            }
            _ => {}
        }
        let enough = now.iter().zip(&since).all(|(now, since)| {
            now.rounds > since.rounds
                && now.checks > since.checks
                && now.lapic_ticks >= since.lapic_ticks + TICKS
        });
        (enough && now[0].pit_ticks >= since[0].pit_ticks + TICKS).then_some(())
    });
    now
}

#[test]
fn no_register_changes_and_timers_go_on() {
    require_kvm!();
    let dir = scratch();
    let mut here = Ferry::run(dir.path(), "s0", &state_guest(), &[]);
    let mut done = wait_state(&here, [Done::default(); 2]);
    for hop in 1..=3 {
        (here, _) = here.move_on(dir.path(), &format!("s{hop}"));
        done = wait_state(&here, done);
    }
}

#[test]
fn the_state_guest_notices_what_is_spoilt() {
    require_kvm!();
    let dir = scratch();
    let guest = Guest {
        append: "spoil=msr interval=250".to_owned(),
        ..state_guest()
    };
    let ferry = Ferry::run(dir.path(), "s", &guest, &[]);
    ferry.wait_line(|line| {
        matches!(
            state::Report::parse(line),
            Some(state::Report::Changed { .. })
        )
        .then_some(())
    });
}

/// The clocks of a guest, and ours when its report was there.
#[derive(Clone, Copy, Debug)]
struct Clocks {
    tsc: u64,
    kvmclock: Option<u64>,
    longest_step: Duration,
    at: Instant,
}

fn ask_clocks(ferry: &mut Ferry) -> Clocks {
    ferry.serial.send(&[clock::command::CLOCKS]).unwrap();
    ferry.wait_line(|line| match clock::Report::parse(line) {
        Some(clock::Report::Back { .. }) => panic!("the guest says: {line}"),
        Some(clock::Report::Clocks {
            tsc,
            kvmclock,
            longest_step_us,
            steps_back,
            ..
        }) => {
            assert_eq!(steps_back, 0, "{line}");
            Some(Clocks {
                tsc,
                kvmclock: kvmclock.0,
                longest_step: Duration::from_micros(longest_step_us),
                at: Instant::now(),
            })
        }
        _ => None,
    })
}

#[test]
fn clocks_never_go_back_agree_and_lose_no_more_than_the_downtime() {
    require_kvm!();
    let dir = scratch();
    let guest = Guest {
        image: guest_tests::CLOCK,
        append: "interval=0".to_owned(),
        memory: "64M",
        smp: 2,
    };
    let mut here = Ferry::run(dir.path(), "c0", &guest, &[]);
    let khz = here.wait_line(|line| match clock::Report::parse(line) {
        Some(clock::Report::Ready { tsc_khz, .. }) => Some(tsc_khz),
        _ => None,
    });
    let mut before = ask_clocks(&mut here);
    for hop in 1..=4 {
        let info;
        (here, info) = here.move_on(dir.path(), &format!("c{hop}"));
        let downtime = &info["x-ferry"]["downtime"]["total"];
        let downtime = Duration::from_micros(downtime.as_u64().unwrap());
        let after = ask_clocks(&mut here);
        // Ours goes on at the same rate.
        let passed = after.at - before.at;
        let tsc = after.tsc.checked_sub(before.tsc).expect("no step back");
        let by_tsc = Duration::from_nanos((u128::from(tsc) * 1_000_000 / u128::from(khz)) as u64);
        let by_kvmclock = before.kvmclock.map(|before| {
            let after = after.kvmclock.expect("kvmclock stays");
            Duration::from_nanos(after.checked_sub(before).expect("no step back"))
        });
        for (clock, went) in [("TSC", Some(by_tsc)), ("kvmclock", by_kvmclock)] {
            let Some(went) = went else { continue };
            assert!(
                went + downtime + SLACK >= passed && went <= passed + SLACK,
                "{clock} went {went:?} while {passed:?} passed, {downtime:?} of them stopped"
            );
        }
        assert!(
            after.longest_step <= downtime + SLACK,
            "the clock jumped {:?} over {downtime:?}",
            after.longest_step
        );
        before = after;
    }
}

/// Sends a word and waits until it has come back, once.
fn echoes(ferry: &mut Ferry, word: &str) {
    ferry.serial.send(format!("{word}\n").as_bytes()).unwrap();
    // What comes in between would be a word that was doubled, or one that came late.
    let came = ferry.wait_line(|line| Some(line.to_owned()));
    assert_eq!(came, word);
}

/// Bytes that the guest has received, and its interrupts.
fn count(ferry: &mut Ferry) -> (u64, u64) {
    ferry.serial.send(&[echo::command::COUNT]).unwrap();
    ferry.wait_line(|line| match echo::Report::parse(line) {
        Some(echo::Report::Count { bytes, interrupts }) => Some((bytes, interrupts)),
        _ => panic!("the guest says: {line}"),
    })
}

fn run_echo(dir: &std::path::Path, name: &str, via: echo::Controller) -> Ferry {
    let guest = Guest::new(guest_tests::ECHO, "64M", echo::Options { via });
    let ferry = Ferry::run(dir, name, &guest, &[]);
    ferry.wait_line(|line| echo::Report::parse(line).map(|_| ()));
    ferry
}

#[test]
fn input_is_neither_lost_nor_doubled_and_interrupts_go_on() {
    require_kvm!();
    let dir = scratch();
    for via in [echo::Controller::Pic, echo::Controller::IoApic] {
        let mut here = run_echo(dir.path(), &format!("{via}0"), via);
        let mut sent = 0;
        for hop in 1..=3 {
            let (mut there, uri) = Ferry::incoming(dir.path(), &format!("{via}{hop}"));
            // Slow enough for input to come while it moves.
            here.execute(
                "migrate-set-parameters",
                json!({ "max-bandwidth": 1 << 20 }),
            );
            here.migrate(&uri);
            here.wait_migration("it moves", |info| info["status"] != "setup");
            for word in 0..5 {
                let word = format!("source {hop} {word}");
                echoes(&mut here, &word);
                sent += word.len() as u64 + 1;
            }
            here.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }));
            here.wait_migrated("completed");
            for word in 0..5 {
                let word = format!("destination {hop} {word}");
                echoes(&mut there, &word);
                sent += word.len() as u64 + 1;
            }
            sent += 1;
            let (bytes, interrupts) = count(&mut there);
            assert_eq!(bytes, sent);
            assert!(interrupts > 0);
            here.quit();
            here = there;
        }
    }
}
