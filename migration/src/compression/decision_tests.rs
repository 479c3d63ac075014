use super::*;

const MIB: u64 = 1 << 20;
/// What a frame holds.
const FRAME: u64 = 2 * MIB;
/// One of compressed pages.
const COMPRESSED: u64 = MIB / 2;
/// And one for a try.
const FEW: u64 = MIB / 4;

/// A made-up pair of hosts, in bytes (of pages, but for the link) a second, at a place in the
/// memory of the guest, in bytes.
struct Hosts<'a> {
    /// How fast pages are read, checksummed and copied to the socket.
    handles: f64,
    /// How fast they are compressed thoroughly.
    compresses: f64,
    /// How many times faster that is quickly; the gain is its square root then.
    quicker: f64,
    ratio: &'a dyn Fn(u64) -> f64,
    link: &'a dyn Fn(u64) -> f64,
    /// What both sockets hold.
    buffers: f64,
    /// Each so many bytes of pages the sender is without a processor for so many seconds.
    interrupted: Option<(u64, f64)>,
}

/// What came of it.
#[derive(Debug)]
struct End {
    seconds: f64,
    /// What part of the pages was compressed.
    compressed: f64,
    /// And what part thoroughly.
    thorough: f64,
    /// What part of the time went into compressing.
    compressing: f64,
    decision: Decision,
}

/// Sends `bytes` of pages, as `plan` says or, without it, as decided.
fn simulate(hosts: &Hosts<'_>, bytes: u64, plan: Option<Plan>) -> End {
    let mut decision = Decision::default();
    let (mut now, mut buffered, mut sent) = (0.0, 0.0f64, 0);
    let (mut compressed, mut thorough, mut processor) = (0, 0, 0.0);
    while sent < bytes {
        let room = buffered < hosts.buffers * 2.0 / 3.0;
        let decided = decision.plan(room);
        let plan = plan.unwrap_or(decided);
        let input = match plan {
            Plan::Plain => FRAME,
            Plan::Compressed(_) => COMPRESSED,
            Plan::Try(_) => FEW,
        };
        let link = (hosts.link)(sent);
        let mut compressing = 0.0;
        let mut output = input as f64;
        if let Some(effort) = plan.effort() {
            // What doesn't compress is found out sooner.
            let mut ratio = (hosts.ratio)(sent);
            let mut speed = hosts.compresses * if ratio < 1.05 { 5.0 } else { 1.0 };
            match effort {
                Effort::Thorough => thorough += input,
                Effort::Quick => {
                    ratio = ratio.sqrt();
                    speed *= hosts.quicker;
                }
            }
            compressing = input as f64 / speed;
            output /= ratio;
            compressed += input;
        }
        let mut busy = input as f64 / hosts.handles + compressing;
        if let Some((every, seconds)) = hosts.interrupted
            && sent / every != (sent + input) / every
        {
            busy += seconds;
        }
        processor += compressing;
        buffered = (buffered - link * busy).max(0.0) + output;
        let waiting = (buffered - hosts.buffers).max(0.0) / link;
        buffered -= waiting * link;
        now += busy + waiting;
        sent += input;
        decision.sent(&Sample {
            input,
            output: output as u64,
            total: Duration::from_secs_f64(busy + waiting),
            compressing: Duration::from_secs_f64(compressing),
            waiting: Duration::from_secs_f64(waiting),
        });
    }
    let seconds = now + buffered / (hosts.link)(bytes);
    End {
        seconds,
        compressed: compressed as f64 / sent as f64,
        thorough: thorough as f64 / sent as f64,
        compressing: processor / seconds,
        decision,
    }
}

/// Fails unless `bytes` of pages take at most `times` as long as the best of the ways does
/// throughout; says what was done.
fn check(hosts: &Hosts<'_>, bytes: u64, times: f64) -> End {
    let end = simulate(hosts, bytes, None);
    let ways = [
        Plan::Plain,
        Plan::Compressed(Effort::Quick),
        Plan::Compressed(Effort::Thorough),
    ];
    let ways = ways.map(|plan| simulate(hosts, bytes, Some(plan)).seconds);
    let best = ways.into_iter().fold(f64::MAX, f64::min);
    assert!(
        end.seconds <= best * times,
        "plain, quick, thorough: {ways:.3?} s; {end:?}"
    );
    end
}

const GIBIT: f64 = 118e6;

fn hosts<'a>(ratio: &'a dyn Fn(u64) -> f64, link: &'a dyn Fn(u64) -> f64) -> Hosts<'a> {
    Hosts {
        handles: 2e9,
        compresses: 400e6,
        quicker: 2.0,
        ratio,
        link,
        buffers: 8e6,
        interrupted: None,
    }
}

#[test]
fn on_a_slow_link_it_is_on() {
    for link in [1e6, 12.5e6, GIBIT] {
        let end = check(&hosts(&|_| 3.0, &|_| link), 512 * MIB, 1.12);
        assert!(end.compressed > 0.8, "{end:?}");
        assert!(end.decision.compresses());
    }
}

#[test]
fn it_is_as_thorough_as_the_link_leaves_time_for() {
    // Far from keeping the processor busy.
    let end = check(&hosts(&|_| 6.0, &|_| 12.5e6), 512 * MIB, 1.12);
    assert!(end.thorough > 0.9, "{end:?}");
    // Thorough alone leaves the link idle, quick alone the processor: a mix beats both.
    let ratio: &dyn Fn(u64) -> f64 = &|_| 6.0;
    let end = check(&hosts(ratio, &|_| GIBIT), 512 * MIB, 0.92);
    assert!((0.2..0.8).contains(&end.thorough), "{end:?}");
    // Here only quick is quick enough, and just so: whether the link is faster is looked at.
    let mut slow = hosts(ratio, &|_| GIBIT);
    slow.compresses = 60e6;
    slow.quicker = 8.0;
    let end = check(&slow, 512 * MIB, 1.05);
    assert!(end.compressed > 0.9 && end.thorough < 0.2, "{end:?}");
}

/// Who shares its processor with others still compresses what is worth it.
#[test]
fn a_sender_that_loses_its_processor_now_and_then_goes_on() {
    let losses = [
        (8 * MIB, 0.01),
        (16 * MIB, 0.06),
        (32 * MIB, 0.06),
        (128 * MIB, 0.2),
    ];
    for (every, seconds) in losses {
        let mut hosts = hosts(&|_| 6.0, &|_| GIBIT);
        hosts.interrupted = Some((every, seconds));
        let end = check(&hosts, 2048 * MIB, 1.08);
        assert!(end.compressed > 0.95, "{every}: {end:?}");
    }
}

#[test]
fn on_a_fast_link_it_is_off() {
    for link in [1.25e9, 5e9] {
        let end = check(&hosts(&|_| 3.0, &|_| link), 2048 * MIB, 1.15);
        assert!(end.compressed < 0.02, "{end:?}");
        assert!(!end.decision.compresses());
    }
}

#[test]
fn what_does_not_compress_is_left_alone() {
    for link in [12.5e6, GIBIT, 1.25e9, 5e9] {
        let end = check(&hosts(&|_| 1.0, &|_| link), 2048 * MIB, 1.03);
        assert!(end.compressing < 0.01, "{end:?}");
    }
}

/// A tenth less to send is not worth a processor.
#[test]
fn a_small_gain_does_not_pay() {
    let end = check(&hosts(&|_| 1.1, &|_| GIBIT), 512 * MIB, 1.12);
    assert!(end.compressed < 0.1, "{end:?}");
}

/// Compressing can't fill the link, and yet is faster than sending more; the sender never waits,
/// so that what the link takes must be found out.
#[test]
fn a_processor_that_does_not_keep_up_may_still_gain() {
    let ratio: &dyn Fn(u64) -> f64 = &|_| 4.0;
    let mut slow = hosts(ratio, &|_| GIBIT);
    slow.compresses = 200e6;
    let end = check(&slow, 512 * MIB, 1.15);
    assert!(end.compressed > 0.8, "{end:?}");
    // Here it is not faster.
    slow.compresses = 130e6;
    slow.quicker = 1.0;
    let end = check(&slow, 512 * MIB, 1.1);
    assert!(end.compressed < 0.2, "{end:?}");
}

#[test]
fn it_begins_again_when_the_memory_is_worth_it_and_ends_when_it_is_not() {
    let parts = |at: u64| {
        if (at / MIB / 512).is_multiple_of(2) {
            1.0
        } else {
            3.0
        }
    };
    let end = check(&hosts(&parts, &|_| GIBIT), 4096 * MIB, 1.15);
    assert!((0.35..0.6).contains(&end.compressed), "{end:?}");
    // Mixed within each frame it is the mean that counts.
    let end = check(&hosts(&|_| 1.6, &|_| GIBIT), 512 * MIB, 1.12);
    assert!(end.compressed > 0.8, "{end:?}");
}

#[test]
fn it_follows_a_link_that_changes() {
    // As when the limit of the bandwidth is lifted, or set, on the way.
    let faster = |at: u64| if at < 1024 * MIB { GIBIT } else { 3e9 };
    let end = simulate(&hosts(&|_| 3.0, &faster), 4096 * MIB, None);
    assert!(!end.decision.compresses(), "{end:?}");
    let slower = |at: u64| if at < 1024 * MIB { 3e9 } else { 12.5e6 };
    let end = simulate(&hosts(&|_| 3.0, &slower), 2048 * MIB, None);
    assert!(end.decision.compresses(), "{end:?}");
}

/// A few pages that look good among others that aren't: it is tried ever less often.
#[test]
fn it_does_not_flap() {
    // Only the first of each 32 MiB.
    let traps = |at: u64| {
        if (at / MIB).is_multiple_of(32) {
            5.0
        } else {
            1.0
        }
    };
    let end = check(&hosts(&traps, &|_| GIBIT), 8192 * MIB, 1.06);
    assert!(end.compressed < 0.1, "{end:?}");
}

#[test]
fn frames_of_single_pages_on_a_link_that_is_held_back() {
    let mut decision = Decision::default();
    for _ in 0..1000 {
        decision.sent(&Sample {
            input: 4096,
            output: 1500,
            total: Duration::from_millis(15),
            compressing: Duration::from_micros(10),
            waiting: Duration::from_millis(14),
        });
    }
    assert!(decision.compresses());
    for _ in 0..100 {
        decision.sent(&Sample {
            input: 4096,
            output: 4096,
            total: Duration::from_millis(40),
            compressing: Duration::from_micros(10),
            waiting: Duration::from_millis(39),
        });
    }
    assert!(!decision.compresses());
}

#[test]
fn samples_of_nothing_do_no_harm() {
    let mut decision = Decision::default();
    for _ in 0..10 {
        decision.sent(&Sample::default());
    }
    assert!(decision.compresses());
    decision.sent(&Sample {
        total: Duration::from_secs(1),
        ..Sample::default()
    });
    let _ = decision.plan(true);
}
