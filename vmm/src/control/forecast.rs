//! The type of the forecast of a migration, and which link it is for.

use std::fmt;

use serde::Serialize;

use super::command::{CommandError, CommandResult, Control};
use super::size::format_size;

/// What `x-query-migration-forecast` returns; a member that has nothing to tell is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationForecast {
    /// Whether the guest can be handed over within the downtime limit.
    pub converges: bool,
    /// How many rounds there are while it runs; this and the next two only if it converges.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u64>,
    /// Milliseconds that the migration takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds that the guest is stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Milliseconds that it would be stopped with nothing left to send.
    pub least_downtime: u64,
    /// The share of time in percent that vCPUs would have to be kept from running, for it to
    /// converge; left out if it does, or if that would not help.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle_needed: Option<u64>,
    /// The bytes a second that the link would have to move; left out as the one above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_needed: Option<u64>,
    /// What it was reckoned from: bytes of memory that hold something,
    pub memory: u64,
    /// bytes that the guest writes to in a second,
    pub dirty_rate: u64,
    /// and bytes that the link moves in a second.
    pub bandwidth: u64,
}

impl dyn Control {
    /// What a migration would be like over a link of so many bytes a second. If that is not given,
    /// it is what the hand-over counts on, else the limit, else what was measured last.
    pub fn forecast_migration(&self, bandwidth: Option<u64>) -> CommandResult<MigrationForecast> {
        let parameters = self.parameters();
        let set = [
            parameters.avail_switchover_bandwidth,
            parameters.max_bandwidth,
        ];
        let measured = || self.migration_info().ferry?.bandwidth;
        let bandwidth = bandwidth
            .or_else(|| set.into_iter().find(|rate| *rate > 0))
            .or_else(measured)
            .ok_or_else(|| {
                CommandError::generic(
                    "the link's bandwidth is not known, as nothing was migrated over it and no \
                     limit is set: give it, in bytes a second",
                )
            })?;
        if bandwidth == 0 {
            return Err(CommandError::generic(
                "Parameter 'bandwidth' expects bytes a second, at least 1, got 0",
            ));
        }
        self.migration_forecast(bandwidth)
    }
}

/// What `info migration_forecast` shows.
impl fmt::Display for MigrationForecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = |rate| format!("{}/s", format_size(rate));
        writeln!(f, "memory: {}", format_size(self.memory))?;
        writeln!(f, "dirty rate: {}", rate(self.dirty_rate))?;
        writeln!(f, "bandwidth: {}", rate(self.bandwidth))?;
        let converges = if self.converges { "yes" } else { "no" };
        writeln!(f, "converges: {converges}")?;
        if let Some(rounds) = self.rounds {
            writeln!(f, "rounds: {rounds}")?;
        }
        for (what, time) in [
            ("total time", self.total_time),
            ("downtime", self.downtime),
            ("least downtime", Some(self.least_downtime)),
        ] {
            if let Some(time) = time {
                writeln!(f, "{what}: {time} ms")?;
            }
        }
        if let Some(percent) = self.throttle_needed {
            writeln!(f, "throttle needed: {percent} %")?;
        }
        if let Some(bandwidth) = self.bandwidth_needed {
            writeln!(f, "bandwidth needed: {}", rate(bandwidth))?;
        }
        Ok(())
    }
}
