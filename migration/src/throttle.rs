//! When to slow a guest down that writes faster than its memory moves, and how much. Arithmetic
//! only: the rounds give it their figures, the machine does what it says.
//!
//! A guest that is slowed is slowed for all that it does, so this is the last of the means: only
//! if its user allows it, only if rounds lead nowhere, and only while it is here.

use std::time::Duration;

use crate::parameters::ThrottleParameters;

/// The most of its time that a vCPU may be kept from running, in percent.
pub const MAX_SHARE: u8 = 99;

/// A guest is judged by what it wrote in at least this time: a few of the periods in which it is
/// kept from running, so that the last change shows.
pub(crate) const PERIOD: Duration = Duration::from_millis(200);

/// So many periods in succession with too much written, and it is slowed down (more).
const PERIODS: u32 = 2;

/// How a machine slows its guest down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Throttle {
    /// Not at all.
    #[default]
    Off,
    /// No vCPU runs for this share of its time, from 1 to [`MAX_SHARE`] percent.
    Share(u8),
    /// The guest's vCPUs together are to write to at most so many bytes of pages a second. Those
    /// that write more than their part are kept from running for as long as that takes; a vCPU
    /// that writes to no more than `each` is left alone. The machine is told anew, once it is slowed
    /// down, whenever there are new figures.
    DirtyRate {
        /// What they may, all together, in bytes a second.
        total: u64,
        /// What every vCPU may, in bytes a second.
        each: u64,
        /// What they do at present, all together, by the dirty log, in bytes a second.
        measured: u64,
    },
}

impl Throttle {
    /// The share of time in percent, if it is the same for all vCPUs.
    pub fn share(self) -> Option<u8> {
        match self {
            Self::Share(share) => Some(share),
            Self::Off | Self::DirtyRate { .. } => None,
        }
    }
}

/// What a round has moved and found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moved {
    /// How long it took.
    pub time: Duration,
    /// Bytes of pages and blocks that it has sent; not those that were never touched.
    pub sent: u64,
    /// Bytes of pages and blocks that the guest wrote to meanwhile.
    pub dirtied: u64,
    /// Bytes of pages that the link takes in a second, if that is known.
    pub bandwidth: Option<f64>,
}

/// Watches the rounds of one migration.
#[derive(Debug, Default)]
pub struct Throttling {
    throttle: Throttle,
    /// What there was in this period so far.
    time: Duration,
    sent: u64,
    dirtied: u64,
    /// Periods in succession with too much written.
    high: u32,
}

impl Throttling {
    /// How the guest is slowed down at present.
    pub fn current(&self) -> Throttle {
        self.throttle
    }

    /// A round has ended. Returns how to slow the guest down from here on, if that changes.
    pub fn round_ended(
        &mut self,
        parameters: &ThrottleParameters,
        round: Moved,
    ) -> Option<Throttle> {
        if !parameters.auto_converge() && !parameters.dirty_limit() {
            return None;
        }
        self.sent += round.sent;
        self.dirtied += round.dirtied;
        self.time += round.time;
        let limited = parameters.dirty_limit() && self.throttle != Throttle::Off;
        let period = match limited {
            true => parameters.vcpu_dirty_limit_period(),
            false => PERIOD,
        };
        if self.time < period {
            return None;
        }
        let time = std::mem::take(&mut self.time);
        let sent = std::mem::take(&mut self.sent);
        let dirtied = std::mem::take(&mut self.dirtied);
        if limited {
            // It follows what the guest does from here on.
            self.throttle = dirty_rate(parameters, round.bandwidth?, dirtied, time);
            return Some(self.throttle);
        }
        let threshold = sent as f64 * f64::from(parameters.trigger_threshold()) / 100.0;
        if dirtied as f64 <= threshold {
            self.high = 0;
            return None;
        }
        self.high += 1;
        if self.high < PERIODS {
            return None;
        }
        self.high = 0;
        let next = if parameters.auto_converge() {
            Throttle::Share(self.next_share(parameters, threshold / dirtied as f64))
        } else {
            dirty_rate(parameters, round.bandwidth?, dirtied, time)
        };
        (next != self.throttle).then(|| {
            self.throttle = next;
            next
        })
    }

    /// The guest is to run as it likes again. Whether that is a change.
    pub fn end(&mut self) -> bool {
        *self = Self {
            throttle: self.throttle,
            ..Self::default()
        };
        std::mem::take(&mut self.throttle) != Throttle::Off
    }

    /// `enough` is how much of what the guest writes would be little enough, from 0 to 1.
    fn next_share(&self, parameters: &ThrottleParameters, enough: f64) -> u8 {
        let Some(share) = self.throttle.share() else {
            return parameters.initial();
        };
        let mut increment = parameters.increment();
        if parameters.tailslow() {
            // What it does is taken to grow with the time that it runs.
            let left = f64::from(100 - share.min(100));
            let ideal = (left - left * enough).ceil() as u8;
            increment = increment.min(ideal).max(1);
        }
        let most = parameters.max().max(parameters.initial());
        share.saturating_add(increment).min(most)
    }
}

/// So little that rounds get shorter at the pace that the threshold stands for.
fn dirty_rate(
    parameters: &ThrottleParameters,
    bandwidth: f64,
    dirtied: u64,
    time: Duration,
) -> Throttle {
    let total = bandwidth * f64::from(parameters.trigger_threshold()) / 100.0;
    Throttle::DirtyRate {
        total: total as u64,
        each: parameters.vcpu_dirty_limit() << 20,
        measured: (dirtied as f64 / time.as_secs_f64().max(1e-6)) as u64,
    }
}

#[cfg(test)]
#[path = "throttle_tests.rs"]
mod tests;
