use super::*;

const LIMIT: Duration = Duration::from_millis(30);
const GIB: u64 = (1 << 30) / PAGE_SIZE;

fn pages_only(pages: u64) -> Rest {
    Rest {
        pages,
        block_bytes: 0,
    }
}

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A made-up link, in bytes a second at a time in seconds.
struct Wire<'a> {
    speed: &'a dyn Fn(f64) -> f64,
    round_trip: Duration,
}

/// How a made-up migration ended.
#[derive(Debug)]
struct End {
    rounds: u32,
    /// What the stop really cost; `None` if it never came to it.
    downtime: Option<Duration>,
    /// What the last decision expected.
    expected: Option<Duration>,
    never_fits: bool,
}

/// Migrates a guest of `pages` pages that dirties up to `set` of them at `rate` pages a second
/// (a function of the time), over `wire`, giving up after 400 rounds.
fn simulate(
    pages: u64,
    set: u64,
    rate: &dyn Fn(f64) -> f64,
    wire: &Wire<'_>,
    limit: Duration,
) -> End {
    let mut state = Convergence::default();
    state.round_trip_took(wire.round_trip);
    let costs = Costs::default();
    let mut now = 0.0;
    let mut rest = pages;
    let mut end = End {
        rounds: 0,
        downtime: None,
        expected: None,
        never_fits: false,
    };
    let transfer = |bytes: u64, mut now: f64| {
        let mut left = bytes as f64;
        while left > 0.0 {
            let step = (left / (wire.speed)(now)).min(0.002);
            left -= (wire.speed)(now) * step;
            now += step;
        }
        now
    };
    for _ in 0..400 {
        end.rounds += 1;
        let began = now;
        // In deliveries of 32 MiB, each acknowledged half a round trip after it has arrived.
        let mut left = rest * PAGE_ON_WIRE;
        let mut sent_at = now;
        while left > 0 {
            let bytes = left.min(32 << 20);
            let arrived = transfer(bytes, now);
            let acked = Duration::from_secs_f64(arrived) + wire.round_trip;
            let began = Duration::from_secs_f64(sent_at);
            state
                .bandwidth
                .delivered(bytes, began, acked, wire.round_trip);
            left -= bytes;
            now = arrived;
            sent_at = arrived;
        }
        now += wire.round_trip.as_secs_f64();
        let time = now - began;
        let dirtied = ((rate)(now) * time) as u64;
        rest = dirtied.min(set);
        state.dirtied(pages_only(rest), Duration::from_secs_f64(time));
        end.expected = state.expected_downtime(pages_only(rest), 0);
        match state.decide(pages_only(rest), limit, 0) {
            Decision::SwitchOver => {
                let late = (rate)(now) * costs.pause.as_secs_f64();
                let last = (rest + late as u64).min(set);
                let sent = transfer(last * PAGE_ON_WIRE, now).max(now + costs.save.as_secs_f64());
                let moved = transfer(costs.state_bytes, sent) - now;
                let fixed = costs.pause + costs.load + costs.start;
                end.downtime =
                    Some(Duration::from_secs_f64(moved) + fixed + wire.round_trip * 3 / 2);
                return end;
            }
            Decision::AnotherRound => {}
            Decision::NeverFits => {
                end.never_fits = true;
                now += 0.1;
            }
        }
    }
    end
}

fn steady(speed: f64) -> impl Fn(f64) -> f64 {
    move |_| speed
}

#[test]
fn an_idle_guest_moves_in_one_round() {
    for speed in [1.25e9, 1.25e8, 1.25e7] {
        let end = simulate(
            GIB / 4,
            0,
            &|_| 0.0,
            &Wire {
                speed: &steady(speed),
                round_trip: millis(1),
            },
            LIMIT,
        );
        assert_eq!(end.rounds, 1, "{end:?}");
        assert!(end.downtime.unwrap() <= LIMIT, "{end:?}");
    }
}

#[test]
fn below_the_link_it_converges_within_the_limit() {
    for (speed, rate) in [(2.5e9, 20_000.0), (1.25e9, 100_000.0), (1.25e8, 5_000.0)] {
        let end = simulate(
            GIB,
            GIB / 2,
            &|_| rate,
            &Wire {
                speed: &steady(speed),
                round_trip: Duration::from_micros(200),
            },
            LIMIT,
        );
        assert!(end.downtime.expect("converges") <= LIMIT, "{end:?}");
        assert!(end.rounds < 20, "{end:?}");
    }
}

#[test]
fn above_the_link_it_never_stops_the_guest() {
    let end = simulate(
        GIB,
        GIB / 2,
        &|_| 40_000.0,
        &Wire {
            speed: &steady(1.25e8),
            round_trip: millis(1),
        },
        LIMIT,
    );
    assert!(end.downtime.is_none(), "{end:?}");
    assert!(end.expected.unwrap() > LIMIT && !end.never_fits, "{end:?}");
}

#[test]
fn a_small_working_set_written_fast_depends_on_the_limit() {
    // 20 MiB rewritten all the time: 170 ms on a gigabit link.
    let run = |limit| {
        simulate(
            GIB / 4,
            5000,
            &|_| 1e6,
            &Wire {
                speed: &steady(1.25e8),
                round_trip: millis(1),
            },
            limit,
        )
    };
    assert!(run(LIMIT).downtime.is_none());
    assert!(run(millis(200)).downtime.unwrap() <= millis(200));
}

#[test]
fn bursts_are_waited_for() {
    // Three seconds of heavy writing, one of rest.
    let rate = |now: f64| if now % 4.0 < 3.0 { 300_000.0 } else { 200.0 };
    let end = simulate(
        GIB / 2,
        GIB / 4,
        &rate,
        &Wire {
            speed: &steady(1.25e9),
            round_trip: millis(1),
        },
        LIMIT,
    );
    assert!(end.downtime.expect("a rest comes") <= LIMIT, "{end:?}");
}

#[test]
fn a_long_way_needs_a_higher_limit_and_says_so() {
    let run = |limit| {
        simulate(
            GIB / 16,
            100,
            &|_| 50.0,
            &Wire {
                speed: &steady(1.25e8),
                round_trip: millis(100),
            },
            limit,
        )
    };
    let end = run(LIMIT);
    assert!(end.downtime.is_none() && end.never_fits, "{end:?}");
    assert!(end.expected.unwrap() >= millis(150), "{end:?}");
    let end = run(millis(200));
    assert!(end.downtime.unwrap() <= millis(200), "{end:?}");
}

#[test]
fn the_state_is_saved_while_pages_are_sent() {
    let mut state = Convergence::default();
    // A page takes a microsecond.
    let speed = PAGE_ON_WIRE * 1_000_000;
    state
        .bandwidth
        .delivered(speed, Duration::ZERO, millis(1000), Duration::ZERO);
    let expected = |pages| state.expected_downtime(pages_only(pages), 0).unwrap();
    let save = state.costs.save.as_micros() as u64;
    assert_eq!(expected(save / 2), expected(0));
    let more = expected(save + 1000) - expected(0);
    assert!(
        more.abs_diff(millis(1)) < Duration::from_micros(1),
        "{more:?}"
    );
}

#[test]
fn jitter_costs_little() {
    // Between half and one and a half times the speed, changing every 10 ms.
    let speed = |now: f64| {
        let noise = ((now * 100.0) as u32).wrapping_mul(2_654_435_761) >> 16;
        1.25e9 * (0.5 + f64::from(noise % 100) / 100.0)
    };
    let end = simulate(
        GIB,
        GIB / 8,
        &|_| 20_000.0,
        &Wire {
            speed: &speed,
            round_trip: millis(1),
        },
        LIMIT,
    );
    assert!(end.downtime.expect("converges") <= LIMIT * 5 / 4, "{end:?}");
}

#[test]
fn a_link_that_gets_slower_is_noticed() {
    let speed = |now: f64| if now < 0.5 { 2e9 } else { 5e7 };
    let end = simulate(
        GIB,
        GIB / 4,
        &|now| if now < 20.0 { 11_000.0 } else { 100.0 },
        &Wire {
            speed: &speed,
            round_trip: millis(1),
        },
        LIMIT,
    );
    assert!(end.downtime.expect("converges") <= LIMIT, "{end:?}");
}

#[test]
fn one_odd_delivery_does_not_raise_the_estimate() {
    let mut bandwidth = Bandwidth::default();
    let mut now = Duration::ZERO;
    let mut deliver = |bytes: u64, ms: u64| {
        let began = now;
        now += millis(ms);
        bandwidth.delivered(bytes, began, now, Duration::ZERO);
        bandwidth.estimate().unwrap()
    };
    for _ in 0..5 {
        assert!((deliver(1_000_000, 10) - 1e8).abs() < 1e6);
    }
    assert!((deliver(100_000_000, 10) - 1e8).abs() < 1e6);
    deliver(1_000_000, 10);
    assert!(deliver(1_000_000, 10) < 1.1e8);
    // A slow one halves it at most, and is forgotten two deliveries later.
    assert!(deliver(1_000_000, 1000) > 0.4e8);
    deliver(1_000_000, 10);
    assert!((deliver(1_000_000, 10) - 1e8).abs() < 1e6);
}

#[test]
fn short_deliveries_count_only_for_want_of_longer_ones() {
    let mut bandwidth = Bandwidth::default();
    assert_eq!(bandwidth.estimate(), None);
    // 10 KiB and back in 50 ms, most of which is the way.
    bandwidth.delivered(10_240, Duration::ZERO, millis(51), millis(50));
    let weak = bandwidth.estimate().unwrap();
    assert!((1e5..1e6).contains(&weak), "{weak}");
    bandwidth.delivered(10_000_000, millis(100), millis(250), millis(50));
    assert!((bandwidth.estimate().unwrap() - 1e8).abs() < 1e6);
    bandwidth.delivered(10_240, millis(300), millis(400), millis(50));
    assert!((bandwidth.estimate().unwrap() - 1e8).abs() < 1e6);
}

#[test]
fn a_given_bandwidth_replaces_the_measured_one() {
    let mut state = Convergence::default();
    assert_eq!(state.expected_downtime(pages_only(0), 0), None);
    assert_eq!(
        state.decide(pages_only(10), LIMIT, 0),
        Decision::AnotherRound
    );
    assert_eq!(
        state.decide(pages_only(1000), LIMIT, 1_250_000_000),
        Decision::SwitchOver
    );
    state
        .bandwidth
        .delivered(1 << 30, Duration::ZERO, millis(500), Duration::ZERO);
    assert_eq!(
        state.decide(pages_only(1000), LIMIT, 0),
        Decision::SwitchOver
    );
    assert_eq!(
        state.decide(pages_only(1000), LIMIT, 10_000_000),
        Decision::AnotherRound
    );
    assert_eq!(
        state.decide(pages_only(1000), Duration::ZERO, 0),
        Decision::NeverFits
    );
}

/// At 100 MB/s, with the costs of a small guest.
fn with_disks(block_bytes: u64) -> (Convergence, Rest) {
    let mut state = Convergence::default();
    state
        .bandwidth
        .delivered(100 << 20, Duration::ZERO, millis(1000), Duration::ZERO);
    let rest = Rest {
        pages: 0,
        block_bytes,
    };
    (state, rest)
}

fn expected(state: &Convergence, rest: Rest) -> Duration {
    state.expected_downtime(rest, 0).unwrap()
}

#[test]
fn blocks_cost_the_slower_of_reading_and_sending_and_then_the_flush() {
    let (mut state, rest) = with_disks(10 << 20);
    let nothing = expected(&state, Rest::default());
    // 100 ms on the way, 10 for a flush of which nothing is known.
    let unmeasured = expected(&state, rest) - nothing;
    assert!(
        unmeasured.abs_diff(millis(110)) < millis(1),
        "{unmeasured:?}"
    );
    // Reading faster than the link costs nothing more; slower, it is what counts.
    state.disks.read(1 << 30, millis(1000));
    assert_eq!(expected(&state, rest) - nothing, unmeasured);
    state.disks.read(10 << 20, millis(400));
    let slow = expected(&state, rest) - nothing;
    assert!(slow.abs_diff(millis(410)) < millis(1), "{slow:?}");
    // The flush is what a small one took, and the bytes at the speed of a large one.
    state.disks.flushed(1 << 30, millis(1024 * 20));
    state.disks.flushed(BLOCK_SIZE, millis(30));
    let flushed = expected(&state, rest) - nothing;
    assert!(
        flushed.abs_diff(millis(400 + 30 + 200)) < millis(1),
        "{flushed:?}"
    );
    // Pages come on top, after the blocks.
    let both = Rest {
        pages: 2560,
        ..rest
    };
    let more = expected(&state, both) - nothing - flushed;
    assert!(more.abs_diff(millis(100)) < millis(2), "{more:?}");
}

#[test]
fn a_disk_at_rest_costs_nothing() {
    let (mut state, _) = with_disks(0);
    let before = expected(&state, Rest::default());
    state.disks.read(1 << 20, millis(5000));
    state.disks.flushed(1 << 30, millis(5000));
    state.disks.flushed(1, millis(900));
    assert_eq!(expected(&state, Rest::default()), before);
}

#[test]
fn what_is_written_until_the_stop_counts() {
    let (mut state, rest) = with_disks(1 << 20);
    state.costs.pause = Duration::from_micros(500);
    let before = expected(&state, rest);
    let written = Rest {
        pages: 0,
        block_bytes: 1 << 30,
    };
    state.dirtied(written, millis(1000));
    let late = expected(&state, rest) - before;
    // Half a millisecond of a GiB a second, at 100 MiB a second.
    assert!(late.abs_diff(millis(5)) < millis(1), "{late:?}");
}

#[test]
fn the_decision_is_over_blocks_and_pages() {
    let (mut state, rest) = with_disks(1 << 20);
    assert_eq!(state.decide(rest, millis(30), 0), Decision::SwitchOver);
    let both = Rest { pages: 500, ..rest };
    assert_eq!(state.decide(both, millis(30), 0), Decision::AnotherRound);
    let more = Rest {
        block_bytes: 4 << 20,
        ..rest
    };
    assert_eq!(state.decide(more, millis(30), 0), Decision::AnotherRound);
    // A flush alone is above the limit: the guest's next lull is waited for.
    state.disks.flushed(1, millis(40));
    assert_eq!(state.decide(rest, millis(30), 0), Decision::NeverFits);
    assert_eq!(
        state.decide(Rest::default(), millis(30), 0),
        Decision::SwitchOver
    );
}

/// What takes time at the hand-over counts, though it moves nothing.
#[test]
fn a_release_that_takes_long_is_a_part_of_the_downtime() {
    let mut state = Convergence::default();
    state.bandwidth.delivered(
        1 << 30,
        Duration::ZERO,
        Duration::from_secs(1),
        Duration::ZERO,
    );
    let without = state.expected_downtime(pages_only(0), 0).unwrap();
    state.release_took(Duration::from_millis(40));
    state.release_took(Duration::from_millis(90));
    let with = state.expected_downtime(pages_only(0), 0).unwrap();
    assert_eq!(with - without, Duration::from_millis(40));
    let limit = Duration::from_millis(30);
    assert_eq!(state.decide(pages_only(0), limit, 0), Decision::NeverFits);
}
