//! The parameters of a guest that is slowed down: QEMU's, with its ranges.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::throttle::{MAX_SHARE, PERIOD};

/// A value out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Parameter '{name}' expects an integer in the range of {least} to {most}, got {value}")]
pub struct ThrottleOutOfRange {
    name: &'static str,
    least: u8,
    most: u8,
    value: u64,
}

/// How much, and from when on, a guest is slowed down that writes faster than its memory moves.
#[derive(Debug)]
pub struct ThrottleParameters {
    auto_converge: AtomicBool,
    dirty_limit: AtomicBool,
    trigger_threshold: AtomicU8,
    initial: AtomicU8,
    increment: AtomicU8,
    tailslow: AtomicBool,
    max: AtomicU8,
    vcpu_dirty_limit: AtomicU64,
    vcpu_dirty_limit_period: AtomicU64,
}

impl Default for ThrottleParameters {
    fn default() -> Self {
        Self {
            auto_converge: AtomicBool::new(false),
            dirty_limit: AtomicBool::new(false),
            trigger_threshold: AtomicU8::new(50),
            initial: AtomicU8::new(20),
            increment: AtomicU8::new(10),
            tailslow: AtomicBool::new(false),
            max: AtomicU8::new(MAX_SHARE),
            vcpu_dirty_limit: AtomicU64::new(1),
            vcpu_dirty_limit_period: AtomicU64::new(PERIOD.as_millis() as u64),
        }
    }
}

impl ThrottleParameters {
    /// Whether all vCPUs of a guest that doesn't converge are slowed down alike.
    pub fn auto_converge(&self) -> bool {
        self.auto_converge.load(Ordering::Relaxed)
    }

    /// Sets [`auto_converge`](Self::auto_converge).
    pub fn set_auto_converge(&self, on: bool) {
        self.auto_converge.store(on, Ordering::Relaxed);
    }

    /// Whether those are slowed down that write, as much as the link asks.
    pub fn dirty_limit(&self) -> bool {
        self.dirty_limit.load(Ordering::Relaxed)
    }

    /// Sets [`dirty_limit`](Self::dirty_limit).
    pub fn set_dirty_limit(&self, on: bool) {
        self.dirty_limit.store(on, Ordering::Relaxed);
    }

    /// `throttle-trigger-threshold`: how much of what was sent may have been written to meanwhile,
    /// in percent, before a guest counts as one that doesn't converge.
    pub fn trigger_threshold(&self) -> u8 {
        self.trigger_threshold.load(Ordering::Relaxed)
    }

    /// Sets [`trigger_threshold`](Self::trigger_threshold), from 1 to 100.
    pub fn set_trigger_threshold(&self, percent: u64) -> Result<(), ThrottleOutOfRange> {
        let name = "throttle-trigger-threshold";
        self.trigger_threshold
            .store(within(name, percent, 1, 100)?, Ordering::Relaxed);
        Ok(())
    }

    /// `cpu-throttle-initial`: the first share of time that vCPUs may not run, in percent.
    pub fn initial(&self) -> u8 {
        self.initial.load(Ordering::Relaxed)
    }

    /// Sets [`initial`](Self::initial), from 1 to 99.
    pub fn set_initial(&self, percent: u64) -> Result<(), ThrottleOutOfRange> {
        let share = within("cpu-throttle-initial", percent, 1, MAX_SHARE)?;
        self.initial.store(share, Ordering::Relaxed);
        Ok(())
    }

    /// `cpu-throttle-increment`: what is added to it at a time.
    pub fn increment(&self) -> u8 {
        self.increment.load(Ordering::Relaxed)
    }

    /// Sets [`increment`](Self::increment), from 1 to 99.
    pub fn set_increment(&self, percent: u64) -> Result<(), ThrottleOutOfRange> {
        let share = within("cpu-throttle-increment", percent, 1, MAX_SHARE)?;
        self.increment.store(share, Ordering::Relaxed);
        Ok(())
    }

    /// `cpu-throttle-tailslow`: whether less is added if less is enough.
    pub fn tailslow(&self) -> bool {
        self.tailslow.load(Ordering::Relaxed)
    }

    /// Sets [`tailslow`](Self::tailslow).
    pub fn set_tailslow(&self, on: bool) {
        self.tailslow.store(on, Ordering::Relaxed);
    }

    /// `max-cpu-throttle`: the largest share of time that vCPUs may not run, in percent.
    pub fn max(&self) -> u8 {
        self.max.load(Ordering::Relaxed)
    }

    /// Sets [`max`](Self::max), from 1 to 99. One below [`initial`](Self::initial) counts as that.
    pub fn set_max(&self, percent: u64) -> Result<(), ThrottleOutOfRange> {
        let share = within("max-cpu-throttle", percent, 1, MAX_SHARE)?;
        self.max.store(share, Ordering::Relaxed);
        Ok(())
    }

    /// `vcpu-dirty-limit`: what each vCPU may write to, in MiB a second, however slow the link.
    pub fn vcpu_dirty_limit(&self) -> u64 {
        self.vcpu_dirty_limit.load(Ordering::Relaxed)
    }

    /// Sets [`vcpu_dirty_limit`](Self::vcpu_dirty_limit), in MiB a second.
    pub fn set_vcpu_dirty_limit(&self, mib: u64) {
        self.vcpu_dirty_limit
            .store(mib.min(u64::MAX >> 20), Ordering::Relaxed);
    }

    /// `x-vcpu-dirty-limit-period`: while the dirty limit slows a guest down, for how long at least
    /// it is looked at before the vCPUs' shares change again.
    pub fn vcpu_dirty_limit_period(&self) -> Duration {
        Duration::from_millis(self.vcpu_dirty_limit_period.load(Ordering::Relaxed))
    }

    /// Sets [`vcpu_dirty_limit_period`](Self::vcpu_dirty_limit_period), in milliseconds.
    pub fn set_vcpu_dirty_limit_period(&self, ms: u64) {
        self.vcpu_dirty_limit_period.store(ms, Ordering::Relaxed);
    }
}

fn within(name: &'static str, value: u64, least: u8, most: u8) -> Result<u8, ThrottleOutOfRange> {
    match u8::try_from(value) {
        Ok(fits) if (least..=most).contains(&fits) => Ok(fits),
        _ => Err(ThrottleOutOfRange {
            name,
            least,
            most,
            value,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranges_are_qemus() {
        let parameters = ThrottleParameters::default();
        assert_eq!(
            parameters.set_max(100).unwrap_err().to_string(),
            "Parameter 'max-cpu-throttle' expects an integer in the range of 1 to 99, got 100"
        );
        assert!(parameters.set_initial(0).is_err());
        assert!(parameters.set_increment(300).is_err());
        parameters.set_trigger_threshold(100).unwrap();
        assert!(parameters.set_trigger_threshold(101).is_err());
        assert_eq!(
            (
                parameters.initial(),
                parameters.increment(),
                parameters.max()
            ),
            (20, 10, 99)
        );
    }
}
