//! The parameters of migrations: those of QEMU's schema under its names, and Ferry's own, which
//! begin with `x-`.

use serde::Serialize;

use super::command::{AnnounceChange, AnnounceParameters, CommandError, CommandResult};
use super::compression::MultifdCompression;
use super::convergence::{ConvergenceChange, ConvergenceParameters};

/// QAPI's `MigrationParameters`, as far as Ferry has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Bytes a second that a migration may send; 0 is no limit.
    pub max_bandwidth: u64,
    /// Bytes a second that the decision to switch over counts on; 0 is to measure.
    pub avail_switchover_bandwidth: u64,
    /// Milliseconds that the guest may be stopped.
    pub downtime_limit: u64,
    /// Bytes a second that are pushed after the guest has moved ahead of its memory; 0 is no limit.
    pub max_postcopy_bandwidth: u64,
    /// How many connections carry pages beside the first one with the capability `multifd`.
    pub multifd_channels: u64,
    /// How pages are compressed, where it pays.
    pub multifd_compression: MultifdCompression,
    /// The level of zstd, 1 to 20.
    pub multifd_zstd_level: u64,
    /// Bytes of pages that are remembered for the capability `xbzrle`.
    pub xbzrle_cache_size: u64,
    /// Ours: after how many rounds a migration goes over into post-copy by itself; 0 is never.
    #[serde(rename = "x-postcopy-after-rounds")]
    pub postcopy_after_rounds: u64,
    /// Ours: the same, milliseconds after its start; 0 is never.
    #[serde(rename = "x-postcopy-after-time")]
    pub postcopy_after_time: u64,
    /// Ours: whether it does so as soon as it is clear that the rest will never fit.
    #[serde(rename = "x-postcopy-no-convergence")]
    pub postcopy_no_convergence: bool,
    /// How a guest is slowed down that doesn't converge, and how long that may take.
    #[serde(flatten)]
    pub convergence: ConvergenceParameters,
    /// How a guest that has arrived is announced to the network.
    #[serde(flatten)]
    pub announce: AnnounceParameters,
}

impl Default for MigrationParameters {
    fn default() -> Self {
        Self {
            max_bandwidth: 0,
            avail_switchover_bandwidth: 0,
            downtime_limit: 30,
            max_postcopy_bandwidth: 0,
            multifd_channels: 2,
            multifd_compression: MultifdCompression::None,
            multifd_zstd_level: 1,
            xbzrle_cache_size: 64 << 20,
            postcopy_after_rounds: 0,
            postcopy_after_time: 0,
            postcopy_no_convergence: false,
            convergence: ConvergenceParameters::default(),
            announce: AnnounceParameters::default(),
        }
    }
}

/// Parameters to change: those that are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParameterChange {
    /// See [`MigrationParameters::max_bandwidth`].
    pub max_bandwidth: Option<u64>,
    /// See [`MigrationParameters::avail_switchover_bandwidth`].
    pub avail_switchover_bandwidth: Option<u64>,
    /// See [`MigrationParameters::downtime_limit`].
    pub downtime_limit: Option<u64>,
    /// See [`MigrationParameters::max_postcopy_bandwidth`].
    pub max_postcopy_bandwidth: Option<u64>,
    /// See [`MigrationParameters::multifd_channels`].
    pub multifd_channels: Option<u64>,
    /// See [`MigrationParameters::multifd_compression`].
    pub multifd_compression: Option<MultifdCompression>,
    /// See [`MigrationParameters::multifd_zstd_level`].
    pub multifd_zstd_level: Option<u64>,
    /// See [`MigrationParameters::xbzrle_cache_size`].
    pub xbzrle_cache_size: Option<u64>,
    /// See [`MigrationParameters::postcopy_after_rounds`].
    pub postcopy_after_rounds: Option<u64>,
    /// See [`MigrationParameters::postcopy_after_time`].
    pub postcopy_after_time: Option<u64>,
    /// See [`MigrationParameters::postcopy_no_convergence`].
    pub postcopy_no_convergence: Option<bool>,
    /// See [`MigrationParameters::convergence`].
    pub convergence: ConvergenceChange,
    /// See [`MigrationParameters::announce`].
    pub announce: AnnounceChange,
}

impl ParameterChange {
    /// The longest downtime limit in milliseconds, as in QEMU.
    pub const MAX_DOWNTIME_LIMIT: u64 = 2_000_000;

    const PAGE_SIZE: u64 = 4096;

    /// Refuses values out of range, in QEMU's words.
    pub fn check(&self) -> CommandResult<()> {
        self.announce.check()?;
        if let Some(channels) = self.multifd_channels
            && !(1..=255).contains(&channels)
        {
            return Err(CommandError::generic(format!(
                "Parameter 'multifd-channels' expects a value between 1 and 255, got {channels}"
            )));
        }
        self.convergence.check()?;
        if let Some(level) = self.multifd_zstd_level
            && !(1..=20).contains(&level)
        {
            return Err(CommandError::generic(format!(
                "Parameter 'multifd-zstd-level' expects a value between 1 and 20, got {level}"
            )));
        }
        if let Some(size) = self.xbzrle_cache_size
            && (size < Self::PAGE_SIZE || !size.is_power_of_two())
        {
            return Err(CommandError::generic(format!(
                "Parameter 'xbzrle-cache-size' expects a power of two no less than the target \
                 page size of {} bytes, got {size}",
                Self::PAGE_SIZE
            )));
        }
        match self.downtime_limit {
            Some(limit) if limit > Self::MAX_DOWNTIME_LIMIT => Err(CommandError::generic(format!(
                "Parameter 'downtime-limit' expects an integer in the range of 0 to {} ms, \
                 got {limit}",
                Self::MAX_DOWNTIME_LIMIT
            ))),
            _ => Ok(()),
        }
    }

    /// Makes the changes.
    pub fn apply(&self, parameters: &mut MigrationParameters) {
        let Self {
            max_bandwidth,
            avail_switchover_bandwidth,
            downtime_limit,
            max_postcopy_bandwidth,
            multifd_channels,
            multifd_compression,
            multifd_zstd_level,
            xbzrle_cache_size,
            postcopy_after_rounds,
            postcopy_after_time,
            postcopy_no_convergence,
            convergence,
            announce,
        } = *self;
        announce.apply(&mut parameters.announce);
        convergence.apply(&mut parameters.convergence);
        if let Some(value) = max_bandwidth {
            parameters.max_bandwidth = value;
        }
        if let Some(value) = avail_switchover_bandwidth {
            parameters.avail_switchover_bandwidth = value;
        }
        if let Some(value) = downtime_limit {
            parameters.downtime_limit = value;
        }
        if let Some(value) = max_postcopy_bandwidth {
            parameters.max_postcopy_bandwidth = value;
        }
        if let Some(value) = multifd_channels {
            parameters.multifd_channels = value;
        }
        if let Some(value) = multifd_compression {
            parameters.multifd_compression = value;
        }
        if let Some(value) = multifd_zstd_level {
            parameters.multifd_zstd_level = value;
        }
        if let Some(value) = xbzrle_cache_size {
            parameters.xbzrle_cache_size = value;
        }
        if let Some(value) = postcopy_after_rounds {
            parameters.postcopy_after_rounds = value;
        }
        if let Some(value) = postcopy_after_time {
            parameters.postcopy_after_time = value;
        }
        if let Some(value) = postcopy_no_convergence {
            parameters.postcopy_no_convergence = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_leaves_what_is_not_given() {
        let mut parameters = MigrationParameters::default();
        ParameterChange {
            downtime_limit: Some(0),
            ..Default::default()
        }
        .apply(&mut parameters);
        assert_eq!(
            parameters,
            MigrationParameters {
                downtime_limit: 0,
                ..Default::default()
            }
        );
    }

    #[test]
    fn connections_have_bounds() {
        for (channels, fits) in [(0, false), (1, true), (255, true), (256, false)] {
            let multifd_channels = Some(channels);
            let change = ParameterChange {
                multifd_channels,
                ..Default::default()
            };
            assert_eq!(change.check().is_ok(), fits, "{channels} connections");
        }
    }

    #[test]
    fn compression_has_bounds() {
        for (level, fits) in [(0, false), (1, true), (20, true), (21, false)] {
            let multifd_zstd_level = Some(level);
            let change = ParameterChange {
                multifd_zstd_level,
                ..Default::default()
            };
            assert_eq!(change.check().is_ok(), fits, "level {level}");
        }
        for (size, fits) in [
            (0, false),
            (2048, false),
            (4096, true),
            (5000, false),
            (1 << 30, true),
        ] {
            let xbzrle_cache_size = Some(size);
            let change = ParameterChange {
                xbzrle_cache_size,
                ..Default::default()
            };
            assert_eq!(change.check().is_ok(), fits, "{size} bytes");
        }
    }

    #[test]
    fn the_downtime_limit_has_a_bound() {
        let change = |limit| ParameterChange {
            downtime_limit: Some(limit),
            ..Default::default()
        };
        assert!(change(2_000_000).check().is_ok());
        assert!(
            change(2_000_001)
                .check()
                .unwrap_err()
                .desc
                .contains("2000001")
        );
    }
}
