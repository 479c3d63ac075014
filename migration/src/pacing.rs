//! Keeping below a bandwidth: arithmetic without clocks.

use std::time::Duration;

use crate::layout::PAGE_SIZE;

/// A frame is to take no longer than this at the pace that is set or measured.
const FRAME_TIME: Duration = Duration::from_millis(100);

/// Waits end late, by a time slice of the scheduler and more: up to so much of that is made up for.
const LATE: Duration = Duration::from_millis(100);

/// How far the sending is ahead of its pace.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pacing {
    /// In bytes; negative after a wait that took longer than it should have.
    owed: f64,
    at: Duration,
    /// Whether the last answer was to wait.
    waits: bool,
}

impl Pacing {
    /// Records that `bytes` were sent.
    pub fn sent(&mut self, bytes: u64) {
        self.owed += bytes as f64;
    }

    /// How long to wait at the time `now` before sending more, at `rate` bytes a second; zero
    /// means no limit. The rate may differ from call to call: what is owed is in bytes.
    pub fn wait(&mut self, now: Duration, rate: u64) -> Duration {
        let elapsed = now.saturating_sub(self.at);
        self.at = now;
        if rate == 0 {
            *self = Self {
                at: now,
                ..Self::default()
            };
            return Duration::ZERO;
        }
        let rate = rate as f64;
        // Who was not held back saves nothing up, and keeps what there is to make up for.
        let credit = match self.waits {
            true => -LATE.as_secs_f64() * rate,
            false => self.owed.min(0.0),
        };
        self.owed = (self.owed - elapsed.as_secs_f64() * rate).max(credit);
        self.waits = self.owed > 0.0;
        Duration::try_from_secs_f64(self.owed.max(0.0) / rate).unwrap_or(Duration::MAX)
    }
}

/// How many pages to put in a frame, at most `limit`, at `rate` bytes a second: so few that a
/// slow link is not busy with one frame for long.
pub fn pages_per_frame(rate: f64, limit: u64) -> u64 {
    ((rate * FRAME_TIME.as_secs_f64()) as u64 / PAGE_SIZE).clamp(1, limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends frames of `frame` bytes whenever the pacing lets, for a second; returns the bytes.
    /// Each wait takes `late` longer.
    fn second(pacing: &mut Pacing, from: u64, frame: u64, rate: u64, late: Duration) -> u64 {
        let from = Duration::from_secs(from);
        let (mut now, mut sent) = (from, 0);
        while now < from + Duration::from_secs(1) {
            let wait = pacing.wait(now, rate);
            if wait.is_zero() {
                pacing.sent(frame);
                sent += frame;
                now += Duration::from_micros(10);
            } else {
                now += wait + late;
            }
        }
        sent
    }

    #[test]
    fn the_rate_is_kept_and_may_change_however_late_waits_end() {
        for late in [0, 100, 3000].map(Duration::from_micros) {
            let mut pacing = Pacing::default();
            for (start, rate) in [(0, 100_000_000), (1, 20_000_000), (2, 1_000_000_000)] {
                let frame = (rate / 500).min(2 << 20);
                let sent = second(&mut pacing, start, frame, rate, late);
                assert!(
                    sent.abs_diff(rate) <= rate * 3 / 100,
                    "{sent} at {rate}, waits {late:?} late"
                );
            }
        }
    }

    #[test]
    fn a_link_that_is_slower_saves_nothing_up() {
        let mut pacing = Pacing::default();
        // A frame of 1 ms takes 2.
        for step in 0..1000 {
            let now = Duration::from_millis(2 * step);
            assert_eq!(pacing.wait(now, 1_000_000), Duration::ZERO);
            pacing.sent(1000);
        }
        let sent = second(&mut pacing, 2, 1000, 1_000_000, Duration::ZERO);
        assert!(sent <= 1_002_000, "{sent}");
    }

    #[test]
    fn no_rate_means_no_wait_and_idling_saves_nothing_up() {
        let mut pacing = Pacing::default();
        pacing.sent(1 << 40);
        assert_eq!(pacing.wait(Duration::ZERO, 0), Duration::ZERO);
        let hour = Duration::from_secs(3600);
        assert_eq!(pacing.wait(hour, 1000), Duration::ZERO);
        pacing.sent(1000);
        assert_eq!(pacing.wait(hour, 1000), Duration::from_secs(1));
    }

    #[test]
    fn frames_shrink_on_slow_links() {
        assert_eq!(pages_per_frame(1e10, 512), 512);
        assert_eq!(pages_per_frame(1e6, 512), 24);
        assert_eq!(pages_per_frame(0.0, 512), 1);
    }
}
