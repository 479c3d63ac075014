//! How many of the connections take work: found out by trying. Arithmetic only.
//!
//! It begins with one. Now and then one more is tried; it stays if clearly more pages get through.
//! If not, it rests again, and the next try is later; then one fewer is tried, too, which stays if
//! hardly fewer get through: what made a difference in one part of memory may make none in another.

use std::time::Duration;

/// One more must bring so much: it takes a processor's time, which the guest may need.
const PAYS: f64 = 1.08;

/// A speed is measured over at least such a time, and so many pages (64 MiB) or so long.
const WINDOW: Duration = Duration::from_millis(30);
const WINDOW_PAGES: u64 = 16384;
const LONG_WINDOW: Duration = Duration::from_millis(500);

/// A connection that begins to take work fills its buffers first, which says nothing about the
/// link behind them: so many pages (16 MiB) don't count.
const BUFFERS: u64 = 4096;

/// How much work there is between two tries; each time in vain it is twice as much.
const WAIT: Duration = Duration::from_millis(50);
const MAX_WAIT: Duration = Duration::from_secs(3);

/// How many connections take work.
#[derive(Clone, Debug)]
pub(crate) struct Active {
    most: usize,
    /// Whether that is not to change.
    fixed: bool,
    active: usize,
    stage: Stage,
    /// When the window began, and how many pages had been sent by then.
    since: (Duration, u64),
    /// Work since the last try, and how much of it there is to be.
    worked: Duration,
    wait: Duration,
    fewer_next: bool,
    tried: Option<Tried>,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Steady,
    /// After a change; this many took work, and so many pages a second got through.
    Filling(usize, f64),
    Trying(usize, f64),
}

/// A try of one more.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tried {
    connections: usize,
    /// How many times as many pages got through.
    gain: f64,
}

impl Active {
    /// One of `most`, at least one; or all of them, always.
    pub(crate) fn new(most: usize, all: bool) -> Self {
        Self {
            most,
            fixed: all || most <= 1,
            active: if all { most } else { 1 },
            stage: Stage::Steady,
            since: (Duration::ZERO, 0),
            worked: Duration::ZERO,
            wait: WAIT,
            fewer_next: false,
            tried: None,
        }
    }

    /// How many take work.
    pub(crate) fn get(&self) -> usize {
        self.active
    }

    /// Work begins, after a pause; `pages` have been sent so far.
    pub(crate) fn begin(&mut self, now: Duration, pages: u64) {
        self.since = (now, pages);
    }

    /// Work goes on; to be told often. How many are to take work from here on.
    pub(crate) fn sent(&mut self, now: Duration, pages: u64) -> usize {
        let time = now.saturating_sub(self.since.0);
        let done = pages.saturating_sub(self.since.1);
        let window = time >= WINDOW && (done >= WINDOW_PAGES || time >= LONG_WINDOW);
        let rate = done as f64 / time.as_secs_f64().max(1e-9);
        match self.stage {
            _ if self.fixed => {}
            Stage::Steady if window => {
                self.worked += time;
                self.since = (now, pages);
                if self.worked >= self.wait {
                    self.stage = Stage::Filling(self.active, rate);
                    let fewer = self.active == self.most || self.fewer_next && self.active > 1;
                    self.active = if fewer {
                        self.active - 1
                    } else {
                        self.active + 1
                    };
                }
            }
            Stage::Filling(from, before) if done >= BUFFERS => {
                self.stage = Stage::Trying(from, before);
                self.since = (now, pages);
            }
            Stage::Trying(from, before) if window => {
                self.judge(from, rate / before.max(1e-9));
                self.since = (now, pages);
            }
            _ => {}
        }
        self.active
    }

    fn judge(&mut self, from: usize, gain: f64) {
        let connections = self.active;
        let more = connections > from;
        let stays = if more {
            gain >= PAYS
        } else {
            gain * PAYS > 1.0
        };
        if more {
            self.tried = Some(Tried { connections, gain });
        }
        tracing::debug!(
            from,
            connections,
            gain,
            stays,
            "multifd: another number of connections"
        );
        if !stays {
            self.active = from;
        }
        self.wait = match more && stays {
            true => WAIT,
            false => (2 * self.wait).min(MAX_WAIT),
        };
        // What has just helped is done again; what has not is turned round.
        self.fewer_next = more != stays;
        self.worked = Duration::ZERO;
        self.stage = Stage::Steady;
    }

    /// Why one is enough; `None` if it was not, or there is no other.
    pub(crate) fn why_one(&self) -> Option<String> {
        if self.active > 1 || self.fixed {
            return None;
        }
        Some(match self.tried {
            Some(Tried { connections, gain }) => {
                format!("{connections} moved {gain:.2} times as many pages as one fewer")
            }
            None => "too little was sent to try more".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link on which `rate` pages a second get through with so many connections; when one is
    /// added it takes `buffer` pages at once. Returns how many are used, on average, in the last
    /// half of `seconds`.
    fn run(active: &mut Active, seconds: u64, buffer: u64, rate: impl Fn(usize) -> f64) -> f64 {
        let step = Duration::from_millis(1);
        let (mut now, mut sent, mut used) = (Duration::ZERO, 0.0, 0);
        active.begin(now, 0);
        let steps = seconds * 1000;
        let mut before = active.get();
        for index in 0..steps {
            now += step;
            sent += rate(active.get()) * step.as_secs_f64();
            let connections = active.sent(now, sent as u64);
            if connections > before {
                sent += buffer as f64;
            }
            before = connections;
            used += if index >= steps / 2 { connections } else { 0 };
        }
        used as f64 / (steps / 2) as f64
    }

    #[test]
    fn as_many_as_help_are_used() {
        // A processor for each of three, then the link is full.
        let mut active = Active::new(8, false);
        let used = run(&mut active, 20, 0, |n| 250_000.0 * n.min(3) as f64);
        assert!((2.8..3.2).contains(&used), "{used}");
        assert_eq!(active.why_one(), None);
        // All of them.
        let used = run(&mut Active::new(4, false), 20, 0, |n| 250_000.0 * n as f64);
        assert!(used > 3.7, "{used}");
    }

    #[test]
    fn more_that_bring_nothing_rest_and_their_buffers_deceive_nobody() {
        for rate in [3_000.0, 30_000.0, 250_000.0] {
            let mut active = Active::new(4, false);
            let used = run(&mut active, 60, 4000, |_| rate);
            assert!(used < 1.2, "{used} at {rate}");
            assert!(active.why_one().is_some());
        }
        // More are even slower.
        let used = run(&mut Active::new(4, false), 20, 0, |n| 250_000.0 / n as f64);
        assert!(used < 1.2, "{used}");
    }

    #[test]
    fn a_link_that_changes_is_noticed() {
        let mut active = Active::new(4, false);
        run(&mut active, 5, 0, |n| 250_000.0 * n as f64);
        assert_eq!(active.get(), 4);
        let used = run(&mut active, 60, 0, |_| 250_000.0);
        assert!(used < 1.5, "{used}");
        let used = run(&mut active, 60, 0, |n| 250_000.0 * n as f64);
        assert!(used > 3.5, "{used}");
    }

    #[test]
    fn passes_that_are_too_short_say_nothing() {
        let mut active = Active::new(4, false);
        let mut now = Duration::ZERO;
        for pass in 0..1000 {
            now += Duration::from_millis(10);
            active.begin(now, pass * 2000);
            now += Duration::from_millis(8);
            assert_eq!(active.sent(now, (pass + 1) * 2000), 1);
        }
        let why = active.why_one().unwrap();
        assert!(why.contains("too little"), "{why}");
    }

    #[test]
    fn one_is_all_there_is() {
        let mut active = Active::new(1, false);
        assert_eq!(run(&mut active, 10, 0, |_| 250_000.0), 1.0);
        assert_eq!(active.why_one(), None);
    }
}
