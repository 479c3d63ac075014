//! How much each vCPU writes: arithmetic.
//!
//! A page counts once, however often it is written between two looks at the dirty log.

use std::time::Instant;

/// Write faults tell who writes if there are at least so many of them as this share of what the
/// dirty log has found. Some processors (Intel's with PML) log without a fault.
const TOLD: f64 = 0.5;

/// In bytes a second: of less nobody can say whether faults tell. KVM itself writes a little.
const LITTLE: f64 = (1 << 20) as f64;

/// What the vCPUs write to, found out anew at each look.
#[derive(Debug)]
pub(crate) struct WriteRates {
    /// When the last look was, and what each vCPU had written until then, as far as faults tell.
    before: Option<(Instant, Vec<u64>)>,
    rates: Vec<f64>,
    told: bool,
}

impl Default for WriteRates {
    fn default() -> Self {
        Self {
            before: None,
            rates: Vec::new(),
            told: true,
        }
    }
}

impl WriteRates {
    /// Looks at what each vCPU has written since its beginning, in bytes, as far as its faults
    /// tell. `measured` is what the dirty log says that all write in a second, if it was asked.
    ///
    /// Whether something new is known: the first look tells only where the counters are.
    pub(crate) fn look(&mut self, now: Instant, faults: &[u64], measured: Option<u64>) -> bool {
        let Some((then, before)) = self.before.replace((now, faults.to_vec())) else {
            self.rates = vec![0.0; faults.len()];
            return false;
        };
        let seconds = now.saturating_duration_since(then).as_secs_f64().max(1e-3);
        let rate = |(now, then): (&u64, &u64)| now.wrapping_sub(*then) as f64 / seconds;
        let rates: Vec<f64> = faults.iter().zip(&before).map(rate).collect();
        let Some(measured) = measured.map(|measured| measured as f64) else {
            if self.told {
                self.rates = rates;
            }
            return self.told;
        };
        let told = rates.iter().sum::<f64>() >= measured * TOLD;
        if measured >= LITTLE {
            self.told = told;
        }
        self.rates = rates;
        if !told {
            // Nobody knows whose the writes are: taken to be everybody's.
            self.rates.fill(measured / faults.len().max(1) as f64);
        }
        true
    }

    /// The same while nobody runs: nothing is written, and nothing is learned of anybody.
    pub(crate) fn skip(&mut self, now: Instant, faults: &[u64]) {
        self.before = Some((now, faults.to_vec()));
        self.rates = vec![0.0; faults.len()];
    }

    /// Bytes a second, by vCPU; empty before the first look.
    pub(crate) fn rates(&self) -> &[f64] {
        &self.rates
    }

    /// Whether the rates are only the average of all vCPUs.
    pub(crate) fn are_averages(&self) -> bool {
        !self.told && self.rates.len() > 1
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn faults_tell_whose_the_writes_are_as_far_as_the_log_agrees() {
        let began = Instant::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        let mut writes = WriteRates::default();
        assert!(!writes.look(began, &[7 * MIB, 0], None));
        assert_eq!(writes.rates(), [0.0, 0.0]);
        assert!(writes.look(after(2), &[27 * MIB, 0], Some(11 * MIB)));
        assert_eq!(writes.rates(), [10.0 * MIB as f64, 0.0]);
        assert!(!writes.are_averages());
        // The log has found far more.
        assert!(writes.look(after(3), &[28 * MIB, 0], Some(40 * MIB)));
        assert_eq!(writes.rates(), [20.0 * MIB as f64; 2]);
        assert!(writes.are_averages());
        // Without the log nothing is known then, and nothing changes.
        assert!(!writes.look(after(4), &[28 * MIB, 0], None));
        assert_eq!(writes.rates(), [20.0 * MIB as f64; 2]);
        // Next to nothing is written: that says nothing of how it is logged.
        assert!(writes.look(after(5), &[28 * MIB, 0], Some(MIB / 2)));
        assert!(writes.are_averages());
        assert!(writes.look(after(6), &[30 * MIB, MIB], Some(3 * MIB)));
        assert!(!writes.are_averages());
        assert_eq!(writes.rates(), [2.0 * MIB as f64, MIB as f64]);
        assert!(writes.look(after(7), &[31 * MIB, MIB], None));
        assert_eq!(writes.rates(), [MIB as f64, 0.0]);
    }

    #[test]
    fn all_that_is_written_is_the_only_vcpus() {
        let began = Instant::now();
        let mut writes = WriteRates::default();
        writes.look(began, &[0], None);
        assert!(writes.look(began + Duration::from_secs(1), &[0], Some(9 * MIB)));
        assert_eq!(writes.rates(), [9.0 * MIB as f64]);
        assert!(!writes.are_averages());
    }

    #[test]
    fn a_guest_that_stands_still_writes_nothing() {
        let began = Instant::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        let mut writes = WriteRates::default();
        writes.look(began, &[0], None);
        writes.look(after(1), &[MIB], Some(MIB));
        writes.skip(after(3), &[5 * MIB]);
        assert_eq!(writes.rates(), [0.0]);
        writes.look(after(4), &[7 * MIB], Some(2 * MIB));
        assert_eq!(writes.rates(), [2.0 * MIB as f64]);
    }
}
