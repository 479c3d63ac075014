//! When to stop the guest: what a stop would cost, from what has been measured. Arithmetic only;
//! the measuring is done by the source.

pub mod forecast;
pub mod refinement;

use std::time::Duration;

use self::refinement::Prospect;
use crate::disk::BLOCK_SIZE;
use crate::layout::PAGE_SIZE;

/// What a page costs on the wire: its data, its checksum and its share of a frame.
const PAGE_ON_WIRE: u64 = PAGE_SIZE + 17;

/// From this many pages on, what they took says what others will take.
const ENOUGH_PAGES: u64 = 64;

/// From this many bytes on, a delivery says how fast the link is; a shorter one says more about
/// its latency.
pub const STRONG: u64 = 256 << 10;

/// How many preparations of the release are remembered.
const RELEASES: usize = 4;

/// How many deliveries the bandwidth is estimated from.
const WINDOW: usize = 5;

/// What is still to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rest {
    /// Pages.
    pub pages: u64,
    /// Bytes of the disks' blocks.
    pub block_bytes: u64,
}

/// What a stop costs beside moving blocks, memory and state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Stopping the vCPUs and reading the dirty log.
    pub pause: Duration,
    /// Saving the state, which goes on while pages are sent.
    pub save: Duration,
    /// The state's size in bytes.
    pub state_bytes: u64,
    /// Checking and loading it at the destination.
    pub load: Duration,
    /// Starting the vCPUs there.
    pub start: Duration,
    /// Giving up, before the hand-over, what only one side may hold.
    pub release: Duration,
    /// Flushing a few blocks there, until that has been measured.
    pub flush: Duration,
}

impl Default for Costs {
    /// What a small guest costs. Nothing is known before the one stop of a migration.
    fn default() -> Self {
        Self {
            pause: Duration::from_micros(200),
            save: Duration::from_micros(250),
            state_bytes: 20 << 10,
            load: Duration::from_micros(500),
            start: Duration::from_micros(200),
            release: Duration::ZERO,
            flush: Duration::from_millis(10),
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

/// A flush of fewer bytes says what any flush costs; one of more, how fast the disks are.
const LARGE_FLUSH: u64 = 4 << 20;

/// How fast the disks are: reading at the source, flushing at the destination.
#[derive(Clone, Debug, Default)]
pub struct DiskSpeed {
    read: Option<f64>,
    write: Option<f64>,
    small_flush: Option<Duration>,
}

impl DiskSpeed {
    /// Records that reading `bytes` in one pass took so long.
    pub fn read(&mut self, bytes: u64, time: Duration) {
        if bytes > 0 {
            self.read = Some(bytes as f64 / time.as_secs_f64().max(1e-6));
        }
    }

    /// Records that flushing `bytes` took so long.
    pub fn flushed(&mut self, bytes: u64, time: Duration) {
        if bytes >= LARGE_FLUSH {
            self.write = Some(bytes as f64 / time.as_secs_f64().max(1e-6));
        } else if bytes > 0 {
            self.small_flush = Some(time);
        }
    }

    /// How long reading so much takes.
    fn read_time(&self, bytes: f64) -> Duration {
        seconds(self.read.map_or(0.0, |rate| bytes / rate))
    }

    /// How long flushing so much takes; `small` is the time for little if that is not known.
    fn flush_time(&self, bytes: f64, small: Duration) -> Duration {
        if bytes == 0.0 {
            return Duration::ZERO;
        }
        let proportional = seconds(self.write.map_or(0.0, |rate| bytes / rate));
        self.small_flush
            .unwrap_or(small)
            .saturating_add(proportional)
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// What to do at the end of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Stop the guest: the rest fits.
    SwitchOver,
    /// Send what is dirty, with the guest running.
    AnotherRound,
    /// Even with next to nothing dirty a stop would take too long: rounds alone will not help.
    NeverFits,
}

/// All that is known about the migration's speed.
#[derive(Clone, Debug, Default)]
pub struct Convergence {
    /// How fast data arrives.
    pub bandwidth: Bandwidth,
    /// The rest of a stop's costs.
    pub costs: Costs,
    /// The disks at both ends.
    pub disks: DiskSpeed,
    round_trip: Option<Duration>,
    releases: Vec<Duration>,
    dirty_rate: f64,
    dirty_block_rate: f64,
    page_bytes: Option<f64>,
}

impl Convergence {
    /// Records how long it took to prepare for giving up what only one side may hold. The least of
    /// the last few counts: one slow write-back says little about the next, and a guest that writes all
    /// the time would never be stopped.
    pub fn release_took(&mut self, time: Duration) {
        self.releases.push(time);
        if self.releases.len() > RELEASES {
            self.releases.remove(0);
        }
        self.costs.release = self.releases.iter().min().copied().unwrap_or_default();
    }

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

    /// Records what the guest dirtied in `time`.
    pub fn dirtied(&mut self, dirty: Rest, time: Duration) {
        if !time.is_zero() {
            self.dirty_rate = dirty.pages as f64 / time.as_secs_f64();
            self.dirty_block_rate = dirty.block_bytes as f64 / time.as_secs_f64();
        }
    }

    /// Records that the pages with contents of a round took `bytes`: less than they have if they
    /// were compressed, or sent as differences. The next round's are taken to be like them.
    pub fn pages_took(&mut self, pages: u64, bytes: u64) {
        if pages >= ENOUGH_PAGES {
            self.page_bytes = Some(bytes as f64 / pages as f64);
        }
    }

    /// Bytes of pages that are moved in a second, on a link that may be used at `limit` bytes a
    /// second if that is not zero: more if they take less than they have. `None` if nothing has been
    /// measured.
    pub fn page_rate(&self, limit: u64) -> Option<f64> {
        let page_bytes = self.page_bytes.unwrap_or(PAGE_ON_WIRE as f64).max(1.0);
        let measured = self.bandwidth.estimate()?;
        let bandwidth = match limit {
            0 => measured,
            limit => measured.min(limit as f64),
        };
        Some(bandwidth / page_bytes * PAGE_SIZE as f64)
    }

    /// Pages that the guest dirties a second, from the last round.
    pub fn dirty_rate(&self) -> f64 {
        self.dirty_rate
    }

    /// Bytes of the disks' blocks that the guest dirties a second, from the last round.
    pub fn dirty_block_rate(&self) -> f64 {
        self.dirty_block_rate
    }

    /// The downtime if the guest were stopped now with `rest` to send. `assumed_bandwidth`,
    /// if not zero, replaces the measured one, in bytes a second. `None` if nothing has been
    /// measured.
    pub fn expected_downtime(&self, rest: Rest, assumed_bandwidth: u64) -> Option<Duration> {
        let bandwidth = if assumed_bandwidth > 0 {
            assumed_bandwidth as f64
        } else {
            self.bandwidth.estimate()?
        };
        let costs = &self.costs;
        // The guest goes on writing until it has stopped.
        let at_stop = |rest: u64, rate: f64| match rest {
            0 => 0.0,
            rest => rest as f64 + rate * costs.pause.as_secs_f64(),
        };
        let pages = at_stop(rest.pages, self.dirty_rate);
        let blocks = at_stop(rest.block_bytes, self.dirty_block_rate);
        let page_bytes = self.page_bytes.unwrap_or(PAGE_ON_WIRE as f64);
        let move_pages = seconds(pages * page_bytes / bandwidth).max(costs.save);
        let move_state = seconds(costs.state_bytes as f64 / bandwidth);
        // Blocks are read while others are on their way, and all before the first page.
        let move_blocks = seconds(blocks / bandwidth).max(self.disks.read_time(blocks));
        let flush = self.disks.flush_time(blocks, costs.flush);
        // The data goes there, READY comes back, GO goes there.
        let latency = self.round_trip() * 3 / 2;
        Some(
            [
                move_blocks,
                flush,
                costs.pause,
                move_pages,
                move_state,
                costs.load,
                costs.start,
                costs.release,
                latency,
            ]
            .into_iter()
            .fold(Duration::ZERO, Duration::saturating_add),
        )
    }

    /// What a round more would do for a stop with `rest` to send, `elapsed` after the beginning.
    /// `None` if nothing has been measured.
    pub fn prospect(
        &self,
        rest: Rest,
        assumed_bandwidth: u64,
        elapsed: Duration,
    ) -> Option<Prospect> {
        let bandwidth = self.bandwidth.estimate()?;
        let page_bytes = self.page_bytes.unwrap_or(PAGE_ON_WIRE as f64);
        let dirtied = self.dirty_rate * page_bytes + self.dirty_block_rate;
        Some(Prospect {
            expected: self.expected_downtime(rest, assumed_bandwidth)?,
            least: self.expected_downtime(Rest::default(), assumed_bandwidth)?,
            pressure: dirtied / bandwidth.max(1.0),
            elapsed,
        })
    }

    /// Whether to stop the guest with `rest` to send.
    pub fn decide(&self, rest: Rest, limit: Duration, assumed_bandwidth: u64) -> Decision {
        let fits = |rest| {
            self.expected_downtime(rest, assumed_bandwidth)
                .is_some_and(|expected| expected <= limit)
        };
        // A guest that writes to its disks all the time leaves one block at least.
        let least = Rest {
            pages: 0,
            block_bytes: rest.block_bytes.min(BLOCK_SIZE),
        };
        if fits(rest) {
            Decision::SwitchOver
        } else if fits(least) || rest != Rest::default() && self.bandwidth.estimate().is_none() {
            Decision::AnotherRound
        } else {
            Decision::NeverFits
        }
    }
}

#[cfg(test)]
#[path = "convergence_tests.rs"]
mod tests;
