//! What a user may change at any time, also while a migration runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The longest downtime limit: 2000 s, as in QEMU.
pub const MAX_DOWNTIME_LIMIT: Duration = Duration::from_millis(2_000_000);

/// The downtime limit that nobody has changed.
pub const DEFAULT_DOWNTIME_LIMIT: Duration = Duration::from_millis(30);

/// A value out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the downtime limit must be from 0 to 2000000 ms, not {0} ms")]
pub struct OutOfRange(u64);

/// The parameters, shared between those who set them and the engine, which reads them each time
/// that it decides.
#[derive(Debug)]
pub struct Parameters {
    downtime_limit_ms: AtomicU64,
    max_bandwidth: AtomicU64,
    avail_switchover_bandwidth: AtomicU64,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            downtime_limit_ms: AtomicU64::new(DEFAULT_DOWNTIME_LIMIT.as_millis() as u64),
            max_bandwidth: AtomicU64::new(0),
            avail_switchover_bandwidth: AtomicU64::new(0),
        }
    }
}

impl Parameters {
    /// How long the guest may be stopped at the switch-over.
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_millis(self.downtime_limit_ms.load(Ordering::Relaxed))
    }

    /// Sets the downtime limit in milliseconds, up to [`MAX_DOWNTIME_LIMIT`].
    pub fn set_downtime_limit_ms(&self, ms: u64) -> Result<(), OutOfRange> {
        if u128::from(ms) > MAX_DOWNTIME_LIMIT.as_millis() {
            return Err(OutOfRange(ms));
        }
        self.downtime_limit_ms.store(ms, Ordering::Relaxed);
        Ok(())
    }

    /// The most bytes a second that the source sends while the guest runs; 0 means no limit.
    pub fn max_bandwidth(&self) -> u64 {
        self.max_bandwidth.load(Ordering::Relaxed)
    }

    /// Sets [`max_bandwidth`](Self::max_bandwidth).
    pub fn set_max_bandwidth(&self, bytes_per_second: u64) {
        self.max_bandwidth
            .store(bytes_per_second, Ordering::Relaxed);
    }

    /// The bytes a second to expect while the guest is stopped, in place of what is measured; 0
    /// means to measure.
    pub fn avail_switchover_bandwidth(&self) -> u64 {
        self.avail_switchover_bandwidth.load(Ordering::Relaxed)
    }

    /// Sets [`avail_switchover_bandwidth`](Self::avail_switchover_bandwidth).
    pub fn set_avail_switchover_bandwidth(&self, bytes_per_second: u64) {
        self.avail_switchover_bandwidth
            .store(bytes_per_second, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_of_the_downtime_limit_is_qemus() {
        let parameters = Parameters::default();
        assert_eq!(parameters.downtime_limit(), Duration::from_millis(30));
        parameters.set_downtime_limit_ms(2_000_000).unwrap();
        assert_eq!(
            parameters
                .set_downtime_limit_ms(2_000_001)
                .unwrap_err()
                .to_string(),
            "the downtime limit must be from 0 to 2000000 ms, not 2000001 ms"
        );
        assert_eq!(parameters.downtime_limit(), MAX_DOWNTIME_LIMIT);
    }
}
