//! Who of the vCPUs may write how much: arithmetic.
//!
//! What a migration lets all of them write is given to each alike, and what one doesn't use, the
//! others may. So there is one limit for all, below which nobody is slowed down, and above which one
//! runs for as much of its time as brings it down to that. A user's limits are each vCPU's own.

use std::time::Instant;

use super::write_rates::WriteRates;
use crate::vcpu::MAX_SHARE;

/// What vCPUs may write to, in bytes a second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Allowed {
    /// All together.
    Together {
        /// So much.
        total: u64,
        /// Each in any case.
        each: u64,
    },
    /// Each as much as is said here; `None` is as much as it likes.
    Own(Vec<Option<u64>>),
}

impl Default for Allowed {
    fn default() -> Self {
        Self::Own(Vec::new())
    }
}

/// What is known of the vCPUs, and what is done about it.
#[derive(Debug, Default)]
pub(super) struct DirtyLimit {
    writes: WriteRates,
    allowed: Allowed,
    /// What each may write, as found out last, in bytes a second; infinite if it may what it likes.
    limits: Vec<f64>,
    /// For what share of its time each is kept from running.
    shares: Vec<u8>,
}

impl DirtyLimit {
    /// Changes what they may write, from the next look on.
    pub(super) fn allow(&mut self, allowed: Allowed) {
        if let Allowed::Own(own) = &allowed {
            self.limits = own.iter().map(own_limit).collect();
            // Whoever has no limit any more is let go at once.
            for (share, limit) in self.shares.iter_mut().zip(&self.limits) {
                if limit.is_infinite() {
                    *share = 0;
                }
            }
        }
        self.allowed = allowed;
    }

    /// Looks at what the vCPUs write ([`WriteRates::look`]), although they are kept from running
    /// for the shares `kept`, and finds out for which they are from here on.
    pub(super) fn look(
        &mut self,
        now: Instant,
        faults: &[u64],
        measured: Option<u64>,
        kept: &[u8],
    ) {
        if !self.writes.look(now, faults, measured) {
            return;
        }
        // What each would write if it ran all the time.
        let wanted: Vec<f64> = self
            .writes
            .rates()
            .iter()
            .zip(kept)
            .map(|(rate, share)| rate * 100.0 / f64::from(100 - (*share).min(MAX_SHARE)))
            .collect();
        self.limits = match &self.allowed {
            Allowed::Together { total, each } => {
                let limit = limit(&wanted, *total as f64).max(*each as f64);
                vec![limit; wanted.len()]
            }
            Allowed::Own(own) => own.iter().map(own_limit).collect(),
        };
        self.shares = wanted
            .iter()
            .zip(&self.limits)
            .map(|(wanted, limit)| share(*wanted, *limit))
            .collect();
    }

    /// The same while nobody runs: the shares stay as they are.
    pub(super) fn skip(&mut self, now: Instant, faults: &[u64]) {
        self.writes.skip(now, faults);
    }

    /// For what share of its time that vCPU is not to run, in percent.
    pub(super) fn share(&self, vcpu: usize) -> u8 {
        self.shares.get(vcpu).copied().unwrap_or(0)
    }

    /// What that vCPU may write, in bytes a second, if that is limited.
    pub(super) fn limit(&self, vcpu: usize) -> Option<u64> {
        let limit = self.limits.get(vcpu).copied()?;
        match self.allowed {
            // Nobody is above it: one may still not write more than all together.
            Allowed::Together { total, each } => Some(limit.min(total.max(each) as f64) as u64),
            Allowed::Own(_) => limit.is_finite().then_some(limit as u64),
        }
    }

    /// The limits that were set for each vCPU.
    pub(super) fn own(&self) -> &[Option<u64>] {
        match &self.allowed {
            Allowed::Own(own) => own,
            Allowed::Together { .. } => &[],
        }
    }

    /// What the vCPUs write.
    pub(super) fn writes(&self) -> &WriteRates {
        &self.writes
    }
}

fn own_limit(own: &Option<u64>) -> f64 {
    own.map_or(f64::INFINITY, |own| own as f64)
}

/// The share for a vCPU that would write so much, both in bytes a second.
fn share(wanted: f64, limit: f64) -> u8 {
    if wanted <= limit {
        return 0;
    }
    let share = 100.0 * (1.0 - limit / wanted);
    (share.ceil() as u8).min(MAX_SHARE)
}

/// How much each may write if all together may write `total`, and some want less.
fn limit(wanted: &[f64], total: f64) -> f64 {
    let mut sorted = wanted.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (mut left, mut others) = (total, sorted.len());
    for wanted in sorted {
        let fair = left / others as f64;
        if wanted > fair {
            return fair;
        }
        left -= wanted;
        others -= 1;
    }
    f64::INFINITY
}

#[cfg(test)]
#[path = "dirty_limit_tests.rs"]
mod tests;
