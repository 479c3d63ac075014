//! Time, as the engine sees it: monotonic, and replaceable in tests.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// A monotonic clock. Its origin is arbitrary but fixed for the process, so that times from the
/// VMM (when the last vCPU left the guest) and from the engine can be subtracted.
pub trait Clock: Send + Sync {
    /// The time since the clock's origin.
    fn now(&self) -> Duration;
}

/// `CLOCK_MONOTONIC`, counted from the first use in this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonotonicClock;

static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        ORIGIN.elapsed()
    }
}
