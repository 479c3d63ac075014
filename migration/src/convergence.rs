//! When to stop the guest: what a stop would cost, from what has been measured. Arithmetic only;
//! the measuring is done by the source.

use std::time::Duration;

use crate::layout::PAGE_SIZE;

/// What a page costs on the wire: its data, its checksum and its share of a frame.
const PAGE_ON_WIRE: u64 = PAGE_SIZE + 17;

/// From this many bytes on, a delivery says how fast the link is; a shorter one says more about
/// its latency.
pub const STRONG: u64 = 256 << 10;

/// How many deliveries the bandwidth is estimated from.
const WINDOW: usize = 5;

/// What a stop costs beside moving memory and state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Stopping the vCPUs and reading the dirty log.
    pub pause: Duration,
    /// Saving the state.
    pub save: Duration,
    /// The state's size in bytes.
    pub state_bytes: u64,
    /// Checking and loading it at the destination.
    pub load: Duration,
    /// Starting the vCPUs there.
    pub start: Duration,
}

impl Default for Costs {
    /// What a small guest costs. Nothing is known before the one stop of a migration.
    fn default() -> Self {
        Self {
            pause: Duration::from_micros(500),
            save: Duration::from_micros(500),
            state_bytes: 64 << 10,
            load: Duration::from_millis(2),
            start: Duration::from_micros(500),
        }
    }
}

/// The bandwidth, from acknowledged deliveries.
#[derive(Clone, Debug, Default)]
pub struct Bandwidth {
    recent: Vec<f64>,
    next: usize,
    weak: f64,
    last_ack: Duration,
}

impl Bandwidth {
    /// Records that `bytes`, of which the first was sent at `began` and the last before an
    /// acknowledgement that came at `acked`, have arrived. `round_trip` is the shortest known.
    pub fn delivered(
        &mut self,
        bytes: u64,
        began: Duration,
        acked: Duration,
        round_trip: Duration,
    ) {
        let whole = acked.saturating_sub(began);
        // If what was sent before was still on its way at `began`, the link was busy all the
        // time since that was acknowledged. Otherwise the first byte took half a round trip to
        // get there and the acknowledgement another half to come back.
        let busy = if self.last_ack > began {
            acked.saturating_sub(self.last_ack)
        } else {
            whole.saturating_sub(round_trip).max(whole / 4)
        };
        self.last_ack = acked;
        let rate = bytes as f64 / busy.max(Duration::from_micros(1)).as_secs_f64();
        if bytes < STRONG {
            self.weak = self.weak.max(rate);
        } else if self.recent.len() < WINDOW {
            self.recent.push(rate);
            self.next = 0;
        } else {
            self.recent[self.next] = rate;
            self.next = (self.next + 1) % WINDOW;
        }
    }

    /// Whether there was a delivery of at least [`STRONG`] bytes.
    pub fn is_measured(&self) -> bool {
        !self.recent.is_empty()
    }

    /// Bytes a second, carefully: the median of the last deliveries, or the mean of the last two
    /// if that is less. One odd delivery can't raise it; a link that gets slower lowers it soon.
    /// `None` before the first delivery.
    pub fn estimate(&self) -> Option<f64> {
        if self.recent.is_empty() {
            return (self.weak > 0.0).then_some(self.weak);
        }
        let mut sorted = self.recent.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted[(sorted.len() - 1) / 2];
        let len = self.recent.len();
        let last = |back: usize| self.recent[(self.next + len - back) % len];
        let latest = (last(1) + last(2.min(len))) / 2.0;
        Some(median.min(latest))
    }

    /// The last delivery's bytes a second.
    pub fn latest(&self) -> Option<f64> {
        let len = self.recent.len();
        let last = (self.next + len).checked_sub(1)?;
        self.recent.get(last % len.max(1)).copied()
    }
}

/// What to do at the end of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Stop the guest: the rest fits.
    SwitchOver,
    /// Send what is dirty, with the guest running.
    AnotherRound,
    /// Even with nothing dirty a stop would take too long: rounds alone will not help.
    NeverFits,
}

/// All that is known about the migration's speed.
#[derive(Clone, Debug, Default)]
pub struct Convergence {
    /// How fast data arrives.
    pub bandwidth: Bandwidth,
    /// The rest of a stop's costs.
    pub costs: Costs,
    round_trip: Option<Duration>,
    dirty_rate: f64,
}

impl Convergence {
    /// Records how long an answer took with nothing else on the link.
    pub fn round_trip_took(&mut self, time: Duration) {
        self.round_trip = Some(self.round_trip.map_or(time, |shortest| shortest.min(time)));
    }

    /// The shortest round trip so far; `None` before the first.
    pub fn measured_round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    /// The shortest round trip so far; zero before the first.
    pub fn round_trip(&self) -> Duration {
        self.round_trip.unwrap_or_default()
    }

    /// Records that the guest dirtied `pages` in `time`.
    pub fn dirtied(&mut self, pages: u64, time: Duration) {
        if !time.is_zero() {
            self.dirty_rate = pages as f64 / time.as_secs_f64();
        }
    }

    /// Pages that the guest dirties a second, from the last round.
    pub fn dirty_rate(&self) -> f64 {
        self.dirty_rate
    }

    /// The downtime if the guest were stopped now with `rest` pages to send. `assumed_bandwidth`,
    /// if not zero, replaces the measured one, in bytes a second. `None` if nothing has been
    /// measured.
    pub fn expected_downtime(&self, rest: u64, assumed_bandwidth: u64) -> Option<Duration> {
        let bandwidth = if assumed_bandwidth > 0 {
            assumed_bandwidth as f64
        } else {
            self.bandwidth.estimate()?
        };
        let costs = &self.costs;
        // The guest goes on writing until it has stopped.
        let late = self.dirty_rate * costs.pause.as_secs_f64();
        let late = if rest == 0 { 0.0 } else { late };
        let bytes = (rest as f64 + late) * PAGE_ON_WIRE as f64 + costs.state_bytes as f64;
        let transfer = Duration::try_from_secs_f64(bytes / bandwidth).unwrap_or(Duration::MAX);
        // The data goes there, READY comes back, GO goes there.
        let latency = self.round_trip() * 3 / 2;
        Some(
            [costs.pause, costs.save, costs.load, costs.start, latency]
                .into_iter()
                .fold(transfer, Duration::saturating_add),
        )
    }

    /// Whether to stop the guest with `rest` pages to send.
    pub fn decide(&self, rest: u64, limit: Duration, assumed_bandwidth: u64) -> Decision {
        let fits = |rest| {
            self.expected_downtime(rest, assumed_bandwidth)
                .is_some_and(|expected| expected <= limit)
        };
        if fits(rest) {
            Decision::SwitchOver
        } else if fits(0) || rest > 0 && self.bandwidth.estimate().is_none() {
            Decision::AnotherRound
        } else {
            Decision::NeverFits
        }
    }
}

#[cfg(test)]
#[path = "convergence_tests.rs"]
mod tests;
