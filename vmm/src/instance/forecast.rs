//! What a migration of the guest would be like, from what was measured of it.

use std::time::Duration;

use migration::convergence::forecast::{Forecast, Remedy};

use super::Instance;
use super::outgoing::costs;
use crate::control::command::{CommandError, CommandResult, MigrationForecast};

impl Instance {
    /// Reckons with a link of so many bytes a second, at least 1.
    pub(super) fn forecast(&self, bandwidth: u64) -> CommandResult<MigrationForecast> {
        let state = self.0.state();
        let costs = costs(state.guest()?);
        let measured = state.dirty_rate.as_ref().and_then(|rate| rate.measured());
        let measured = measured.ok_or_else(|| {
            CommandError::generic(
                "it is not known how much the guest writes: measure it with calc-dirty-rate, and \
                 ask again when query-dirty-rate tells that it is measured",
            )
        })?;
        let forecast = Forecast {
            touched: measured.touched,
            dirty_rate: measured.rate,
            // What is written in a few seconds may be all that it writes to, or not.
            written: None,
            bandwidth: bandwidth as f64,
            downtime_limit: self.0.parameters.downtime_limit(),
            costs,
        };
        let course = forecast.course();
        let remedy = match course {
            Some(_) => None,
            None => Some(forecast.remedy()),
        };
        let throttle = |remedy: Remedy| remedy.throttle.map(u64::from);
        let faster = |remedy: Remedy| remedy.bandwidth.map(|rate| rate as u64);
        Ok(MigrationForecast {
            converges: course.is_some(),
            rounds: course.map(|course| course.rounds.into()),
            total_time: course.map(|course| ms(course.total)),
            downtime: course.map(|course| ms(course.downtime)),
            least_downtime: ms(forecast.least_downtime()),
            throttle_needed: remedy.and_then(throttle),
            bandwidth_needed: remedy.and_then(faster),
            memory: measured.touched,
            dirty_rate: measured.rate as u64,
            bandwidth,
        })
    }
}

/// Whole milliseconds, rounded up.
fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}
