//! What a user may change at any time, also while a migration runs.

mod throttle;
mod timeout;

use std::num::NonZeroU8;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::compression::{Method, Setting, ZstdLevel};
use crate::xbzrle::DEFAULT_CACHE_SIZE;
use crate::xbzrle::cache::{Cache, SizeError};

pub use throttle::{ThrottleOutOfRange, ThrottleParameters};
pub use timeout::{Timeout, TimeoutAction, TimeoutParameters};

/// The longest downtime limit: 2000 s, as in QEMU.
pub const MAX_DOWNTIME_LIMIT: Duration = Duration::from_millis(2_000_000);

/// The downtime limit that nobody has changed.
pub const DEFAULT_DOWNTIME_LIMIT: Duration = Duration::from_millis(30);

/// How many connections carry pages with multifd if nobody has changed it: 2, as in QEMU.
pub const DEFAULT_CHANNELS: NonZeroU8 = NonZeroU8::new(2).unwrap();

/// Codes of [`Parameters::compression`].
const OFF: u8 = 0;
const LZ4: u8 = 1;
const ZSTD: u8 = 2;

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
    max_postcopy_bandwidth: AtomicU64,
    postcopy_after_rounds: AtomicU64,
    postcopy_after_ms: AtomicU64,
    postcopy_no_convergence: AtomicBool,
    compression: AtomicU8,
    zstd_level: AtomicU8,
    xbzrle: AtomicBool,
    xbzrle_cache_size: AtomicU64,
    zero_copy_send: AtomicBool,
    page_checksum: AtomicBool,
    multifd: AtomicBool,
    multifd_channels: AtomicU8,
    multifd_all: AtomicBool,
    throttle: ThrottleParameters,
    timeout: TimeoutParameters,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            downtime_limit_ms: AtomicU64::new(DEFAULT_DOWNTIME_LIMIT.as_millis() as u64),
            max_bandwidth: AtomicU64::new(0),
            avail_switchover_bandwidth: AtomicU64::new(0),
            max_postcopy_bandwidth: AtomicU64::new(0),
            postcopy_after_rounds: AtomicU64::new(0),
            postcopy_after_ms: AtomicU64::new(0),
            postcopy_no_convergence: AtomicBool::new(false),
            compression: AtomicU8::new(OFF),
            zstd_level: AtomicU8::new(ZstdLevel::default().get()),
            xbzrle: AtomicBool::new(false),
            xbzrle_cache_size: AtomicU64::new(DEFAULT_CACHE_SIZE),
            zero_copy_send: AtomicBool::new(false),
            page_checksum: AtomicBool::new(true),
            multifd: AtomicBool::new(false),
            multifd_channels: AtomicU8::new(DEFAULT_CHANNELS.get()),
            multifd_all: AtomicBool::new(false),
            throttle: ThrottleParameters::default(),
            timeout: TimeoutParameters::default(),
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

    /// The most bytes a second that the source pushes once the guest has moved; 0 means no limit.
    /// Pages that the guest waits for are sent beside that.
    pub fn max_postcopy_bandwidth(&self) -> u64 {
        self.max_postcopy_bandwidth.load(Ordering::Relaxed)
    }

    /// Sets [`max_postcopy_bandwidth`](Self::max_postcopy_bandwidth).
    pub fn set_max_postcopy_bandwidth(&self, bytes_per_second: u64) {
        self.max_postcopy_bandwidth
            .store(bytes_per_second, Ordering::Relaxed);
    }

    /// After how many rounds a migration that may go over into post-copy does so by itself; 0
    /// means never.
    pub fn postcopy_after_rounds(&self) -> u64 {
        self.postcopy_after_rounds.load(Ordering::Relaxed)
    }

    /// Sets [`postcopy_after_rounds`](Self::postcopy_after_rounds).
    pub fn set_postcopy_after_rounds(&self, rounds: u64) {
        self.postcopy_after_rounds.store(rounds, Ordering::Relaxed);
    }

    /// How long after its start a migration that may go over into post-copy does so by itself;
    /// `None` means never.
    pub fn postcopy_after_time(&self) -> Option<Duration> {
        match self.postcopy_after_ms.load(Ordering::Relaxed) {
            0 => None,
            ms => Some(Duration::from_millis(ms)),
        }
    }

    /// Sets [`postcopy_after_time`](Self::postcopy_after_time) in milliseconds; 0 means never.
    pub fn set_postcopy_after_ms(&self, ms: u64) {
        self.postcopy_after_ms.store(ms, Ordering::Relaxed);
    }

    /// Whether a migration that may go over into post-copy does so by itself as soon as it is
    /// clear that the rest will never fit into the downtime limit.
    pub fn postcopy_no_convergence(&self) -> bool {
        self.postcopy_no_convergence.load(Ordering::Relaxed)
    }

    /// Sets [`postcopy_no_convergence`](Self::postcopy_no_convergence).
    pub fn set_postcopy_no_convergence(&self, on: bool) {
        self.postcopy_no_convergence.store(on, Ordering::Relaxed);
    }

    /// How pages are compressed where that pays.
    pub fn compression(&self) -> Setting {
        match self.compression.load(Ordering::Relaxed) {
            LZ4 => Setting::Lz4,
            ZSTD => Setting::Zstd(self.zstd_level()),
            _ => Setting::Off,
        }
    }

    /// Sets [`compression`](Self::compression); for zstd, with the level that is set.
    pub fn set_compression(&self, method: Option<Method>) {
        let code = match method {
            None => OFF,
            Some(Method::Lz4) => LZ4,
            Some(Method::Zstd) => ZSTD,
        };
        self.compression.store(code, Ordering::Relaxed);
    }

    /// The level of zstd.
    pub fn zstd_level(&self) -> ZstdLevel {
        let level = self.zstd_level.load(Ordering::Relaxed);
        ZstdLevel::new(level.into()).unwrap_or_default()
    }

    /// Sets [`zstd_level`](Self::zstd_level).
    pub fn set_zstd_level(&self, level: ZstdLevel) {
        self.zstd_level.store(level.get(), Ordering::Relaxed);
    }

    /// Whether a guest that doesn't converge is slowed down, and how.
    pub fn throttle(&self) -> &ThrottleParameters {
        &self.throttle
    }

    /// How long a migration may take, and what then.
    pub fn timeout(&self) -> &TimeoutParameters {
        &self.timeout
    }

    /// The size of the XBZRLE cache in bytes; `None` if XBZRLE is off.
    pub fn xbzrle(&self) -> Option<u64> {
        let on = self.xbzrle.load(Ordering::Relaxed);
        on.then(|| self.xbzrle_cache_size())
    }

    /// Switches XBZRLE on or off.
    pub fn set_xbzrle(&self, on: bool) {
        self.xbzrle.store(on, Ordering::Relaxed);
    }

    /// The size of the XBZRLE cache in bytes, whether it is used or not.
    pub fn xbzrle_cache_size(&self) -> u64 {
        self.xbzrle_cache_size.load(Ordering::Relaxed)
    }

    /// Sets [`xbzrle_cache_size`](Self::xbzrle_cache_size): a power of two that holds a page. What
    /// is in the cache is given up.
    pub fn set_xbzrle_cache_size(&self, size: u64) -> Result<(), SizeError> {
        Cache::check_size(size)?;
        self.xbzrle_cache_size.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Whether pages are sent without a copy where that is possible; see [`crate::zero_copy`].
    pub fn zero_copy_send(&self) -> bool {
        self.zero_copy_send.load(Ordering::Relaxed)
    }

    /// Switches [`zero_copy_send`](Self::zero_copy_send) on or off, for connections made later.
    pub fn set_zero_copy_send(&self, on: bool) {
        self.zero_copy_send.store(on, Ordering::Relaxed);
    }

    /// Whether each page is sent with a checksum. Without, nobody notices one that is damaged on the
    /// way; a destination that does not know that, and a file, get them all the same.
    pub fn page_checksum(&self) -> bool {
        self.page_checksum.load(Ordering::Relaxed)
    }

    /// Sets [`page_checksum`](Self::page_checksum), for migrations that begin later.
    pub fn set_page_checksum(&self, on: bool) {
        self.page_checksum.store(on, Ordering::Relaxed);
    }

    /// How many connections there are for pages beside the first one; `None` without multifd. It
    /// counts when a migration begins.
    pub fn multifd(&self) -> Option<NonZeroU8> {
        let on = self.multifd.load(Ordering::Relaxed);
        on.then(|| self.multifd_channels())
    }

    /// Switches multifd on or off.
    pub fn set_multifd(&self, on: bool) {
        self.multifd.store(on, Ordering::Relaxed);
    }

    /// How many connections there are with multifd, whether it is on or not.
    pub fn multifd_channels(&self) -> NonZeroU8 {
        let channels = self.multifd_channels.load(Ordering::Relaxed);
        NonZeroU8::new(channels).unwrap_or(DEFAULT_CHANNELS)
    }

    /// Sets [`multifd_channels`](Self::multifd_channels).
    pub fn set_multifd_channels(&self, channels: NonZeroU8) {
        self.multifd_channels
            .store(channels.get(), Ordering::Relaxed);
    }

    /// Whether all those connections are used, even if fewer would do: to measure what they bring.
    pub fn multifd_all(&self) -> bool {
        self.multifd_all.load(Ordering::Relaxed)
    }

    /// Sets [`multifd_all`](Self::multifd_all).
    pub fn set_multifd_all(&self, all: bool) {
        self.multifd_all.store(all, Ordering::Relaxed);
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

    #[test]
    fn nothing_switches_to_postcopy_by_itself_unless_asked_to() {
        let parameters = Parameters::default();
        assert_eq!(parameters.postcopy_after_rounds(), 0);
        assert_eq!(parameters.postcopy_after_time(), None);
        assert!(!parameters.postcopy_no_convergence());
        parameters.set_postcopy_after_ms(1500);
        assert_eq!(
            parameters.postcopy_after_time(),
            Some(Duration::from_millis(1500))
        );
        parameters.set_postcopy_after_ms(0);
        assert_eq!(parameters.postcopy_after_time(), None);
    }
}
