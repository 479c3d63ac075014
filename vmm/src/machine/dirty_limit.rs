//! Who of the vCPUs may write how much: arithmetic.
//!
//! What all of them may is given to each alike, and what one doesn't use, the others may. So there
//! is one limit for all, below which nobody is slowed down, and above which one runs for as much of
//! its time as brings it down to that.

use std::time::Instant;

use crate::vcpu::MAX_SHARE;

/// What vCPUs may write to, in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowed {
    /// All together.
    pub(super) total: u64,
    /// Each in any case.
    pub(super) each: u64,
}

/// Write faults tell who writes if there are at least so many of them as this share of what the
/// dirty log has found. Some processors (Intel's with PML) log without a fault.
const TOLD: f64 = 0.5;

/// What is known of the vCPUs.
#[derive(Debug, Default)]
pub(super) struct DirtyLimit {
    /// When, and what each had written until then, as far as faults tell.
    before: Option<(Instant, Vec<u64>)>,
    /// For what share of its time each is kept from running.
    shares: Vec<u8>,
}

impl DirtyLimit {
    /// The shares of time in percent for which vCPUs are not to run from here on. `faults` is what
    /// each has written to since its beginning, in bytes, as far as its faults tell; `measured` is
    /// what all write in a second.
    pub(super) fn update(
        &mut self,
        now: Instant,
        faults: &[u64],
        measured: u64,
        allowed: Allowed,
    ) -> Vec<u8> {
        self.shares.resize(faults.len(), 0);
        let before = self.before.replace((now, faults.to_vec()));
        if let Some((then, before)) = before {
            let seconds = now.saturating_duration_since(then).as_secs_f64().max(1e-3);
            let rate = |(now, then): (&u64, &u64)| now.wrapping_sub(*then) as f64 / seconds;
            let mut rates: Vec<f64> = faults.iter().zip(&before).map(rate).collect();
            // Nobody knows whose the writes are: taken to be everybody's.
            if rates.iter().sum::<f64>() < measured as f64 * TOLD {
                rates.fill(measured as f64 / faults.len().max(1) as f64);
            }
            self.shares = shares(&rates, &self.shares, allowed);
        }
        self.shares.clone()
    }
}

/// The shares for vCPUs that write at these rates, in bytes a second, although they are kept from
/// running for the shares `now`.
fn shares(rates: &[f64], now: &[u8], allowed: Allowed) -> Vec<u8> {
    // What each would write if it ran all the time.
    let wanted: Vec<f64> = rates
        .iter()
        .zip(now)
        .map(|(rate, share)| rate * 100.0 / f64::from(100 - (*share).min(MAX_SHARE)))
        .collect();
    let limit = limit(&wanted, allowed.total as f64).max(allowed.each as f64);
    let share = |wanted: &f64| {
        if *wanted <= limit {
            return 0;
        }
        let share = 100.0 * (1.0 - limit / wanted);
        (share.ceil() as u8).min(MAX_SHARE)
    };
    wanted.iter().map(share).collect()
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
mod tests {
    use std::time::Duration;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn allowed(total: u64) -> Allowed {
        Allowed {
            total: total * MIB,
            each: MIB,
        }
    }

    fn rates(mib: &[u64]) -> Vec<f64> {
        mib.iter().map(|rate| (rate * MIB) as f64).collect()
    }

    #[test]
    fn who_writes_little_is_left_alone() {
        // The writer is brought down to what the others leave.
        assert_eq!(
            shares(&rates(&[100, 0, 10]), &[0; 3], allowed(60)),
            [50, 0, 0]
        );
        // Two that write too much: to the same.
        assert_eq!(
            shares(&rates(&[100, 50, 0]), &[0; 3], allowed(50)),
            [75, 50, 0]
        );
        // All is well.
        assert_eq!(shares(&rates(&[20, 20]), &[0; 2], allowed(50)), [0, 0]);
        // What each may in any case.
        assert_eq!(shares(&rates(&[4, 4]), &[0; 2], allowed(0)), [75, 75]);
        assert_eq!(shares(&rates(&[100_000]), &[0], allowed(0)), [99]);
    }

    #[test]
    fn a_guest_is_brought_to_the_limit_and_let_go_when_it_writes_less() {
        let began = Instant::now();
        let mut limit = DirtyLimit::default();
        let mut written = vec![0u64; 2];
        let mut now = began;
        let mut step = |limit: &mut DirtyLimit, wants: [f64; 2], shares: &[u8]| {
            now += Duration::from_secs(1);
            let mut measured = 0.0;
            for ((written, wants), share) in written.iter_mut().zip(wants).zip(shares) {
                let bytes = wants * (MIB as f64) * f64::from(100 - share) / 100.0;
                *written += bytes as u64;
                measured += bytes;
            }
            limit.update(now, &written, measured as u64, allowed(40))
        };
        // The first time tells only where the counters are.
        let mut shares = step(&mut limit, [400.0, 5.0], &[0, 0]);
        assert_eq!(shares, [0, 0]);
        for _ in 0..3 {
            shares = step(&mut limit, [400.0, 5.0], &shares);
            assert_eq!(shares, [92, 0]);
        }
        shares = step(&mut limit, [10.0, 5.0], &shares);
        assert_eq!(shares, [0, 0]);
    }

    #[test]
    fn if_faults_do_not_tell_all_are_treated_alike() {
        let mut limit = DirtyLimit::default();
        let now = Instant::now();
        limit.update(now, &[0, 0], 0, allowed(40));
        let now = now + Duration::from_secs(1);
        assert_eq!(limit.update(now, &[3, 0], 160 * MIB, allowed(40)), [75, 75]);
    }
}
