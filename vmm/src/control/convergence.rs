//! The parameters about guests that write faster than their memory moves: QEMU's for slowing them
//! down, and Ferry's own for migrations that take too long.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::command::{CommandError, CommandResult};

/// What becomes of a migration whose time is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeoutAction {
    /// It is cancelled.
    #[default]
    Cancel,
    /// The guest is stopped, and the rest is sent however long that takes.
    Force,
    /// The guest moves ahead of its memory.
    Postcopy,
}

impl TimeoutAction {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cancel, Self::Force, Self::Postcopy];

    /// The name in QMP and in the monitor.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Force => "force",
            Self::Postcopy => "postcopy",
        }
    }
}

impl fmt::Display for TimeoutAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TimeoutAction {
    type Err = CommandError;

    fn from_str(name: &str) -> CommandResult<Self> {
        let known = Self::ALL.into_iter().find(|known| known.as_str() == name);
        known.ok_or_else(|| {
            CommandError::generic(format!(
                "Parameter 'x-migration-timeout-action' does not accept value '{name}': it is \
                 cancel, force (stop the guest and finish), or postcopy"
            ))
        })
    }
}

/// How guests are slowed down, and how long migrations may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ConvergenceParameters {
    /// How much of what was sent may be written to meanwhile, in percent, before the guest is
    /// slowed down.
    #[serde(rename = "throttle-trigger-threshold")]
    pub trigger_threshold: u64,
    /// The share of time that vCPUs are kept from running first, in percent.
    #[serde(rename = "cpu-throttle-initial")]
    pub initial: u64,
    /// What is added to it at a time.
    #[serde(rename = "cpu-throttle-increment")]
    pub increment: u64,
    /// Whether less is added if less is enough.
    #[serde(rename = "cpu-throttle-tailslow")]
    pub tailslow: bool,
    /// The most of it.
    #[serde(rename = "max-cpu-throttle")]
    pub max: u64,
    /// What each vCPU may write to in any case, in MB/s, with the capability `dirty-limit`.
    #[serde(rename = "vcpu-dirty-limit")]
    pub vcpu_dirty_limit: u64,
    /// For how many milliseconds, at least, the guest is looked at before it is slowed down in
    /// another way, with the capability `dirty-limit`.
    #[serde(rename = "x-vcpu-dirty-limit-period")]
    pub vcpu_dirty_limit_period: u64,
    /// Milliseconds that a migration may take until its guest is stopped; 0 is no limit.
    #[serde(rename = "x-migration-timeout")]
    pub timeout: u64,
    /// What happens then.
    #[serde(rename = "x-migration-timeout-action")]
    pub timeout_action: TimeoutAction,
}

/// QEMU's, but for the period, which is 1000 ms there.
impl Default for ConvergenceParameters {
    fn default() -> Self {
        Self {
            trigger_threshold: 50,
            initial: 20,
            increment: 10,
            tailslow: false,
            max: 99,
            vcpu_dirty_limit: 1,
            vcpu_dirty_limit_period: 200,
            timeout: 0,
            timeout_action: TimeoutAction::Cancel,
        }
    }
}

/// Parameters to change: those that are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvergenceChange {
    /// See [`ConvergenceParameters::trigger_threshold`].
    pub trigger_threshold: Option<u64>,
    /// See [`ConvergenceParameters::initial`].
    pub initial: Option<u64>,
    /// See [`ConvergenceParameters::increment`].
    pub increment: Option<u64>,
    /// See [`ConvergenceParameters::tailslow`].
    pub tailslow: Option<bool>,
    /// See [`ConvergenceParameters::max`].
    pub max: Option<u64>,
    /// See [`ConvergenceParameters::vcpu_dirty_limit`].
    pub vcpu_dirty_limit: Option<u64>,
    /// See [`ConvergenceParameters::vcpu_dirty_limit_period`].
    pub vcpu_dirty_limit_period: Option<u64>,
    /// See [`ConvergenceParameters::timeout`].
    pub timeout: Option<u64>,
    /// See [`ConvergenceParameters::timeout_action`].
    pub timeout_action: Option<TimeoutAction>,
}

impl ConvergenceChange {
    /// The names of those that are numbers.
    pub const NUMBERS: [&str; 7] = [
        "throttle-trigger-threshold",
        "cpu-throttle-initial",
        "cpu-throttle-increment",
        "max-cpu-throttle",
        "vcpu-dirty-limit",
        "x-migration-timeout",
        "x-vcpu-dirty-limit-period",
    ];

    /// The value of the numeric migration parameter of that name; `None` if it isn't one of these.
    pub fn value_mut(&mut self, parameter: &str) -> Option<&mut Option<u64>> {
        Some(match parameter {
            "throttle-trigger-threshold" => &mut self.trigger_threshold,
            "cpu-throttle-initial" => &mut self.initial,
            "cpu-throttle-increment" => &mut self.increment,
            "max-cpu-throttle" => &mut self.max,
            "vcpu-dirty-limit" => &mut self.vcpu_dirty_limit,
            "x-migration-timeout" => &mut self.timeout,
            "x-vcpu-dirty-limit-period" => &mut self.vcpu_dirty_limit_period,
            _ => return None,
        })
    }

    /// Refuses values out of range, in QEMU's words.
    pub fn check(&self) -> CommandResult<()> {
        for (name, value, most) in [
            ("throttle-trigger-threshold", self.trigger_threshold, 100),
            ("cpu-throttle-initial", self.initial, 99),
            ("cpu-throttle-increment", self.increment, 99),
            ("max-cpu-throttle", self.max, 99),
        ] {
            if let Some(value) = value
                && !(1..=most).contains(&value)
            {
                return Err(CommandError::generic(format!(
                    "Parameter '{name}' expects an integer in the range of 1 to {most}, got {value}"
                )));
            }
        }
        if self.vcpu_dirty_limit == Some(0) {
            return Err(CommandError::generic(
                "Parameter 'vcpu-dirty-limit' is invalid, it must be greater than 1 MB/s, or 1",
            ));
        }
        if let Some(period) = self.vcpu_dirty_limit_period
            && !(1..=1000).contains(&period)
        {
            return Err(CommandError::generic(format!(
                "Parameter 'x-vcpu-dirty-limit-period' expects a value between 1 and 1000, got \
                 {period}"
            )));
        }
        Ok(())
    }

    /// Makes the changes.
    pub fn apply(&self, parameters: &mut ConvergenceParameters) {
        let Self {
            trigger_threshold,
            initial,
            increment,
            tailslow,
            max,
            vcpu_dirty_limit,
            vcpu_dirty_limit_period,
            timeout,
            timeout_action,
        } = *self;
        let old = *parameters;
        *parameters = ConvergenceParameters {
            trigger_threshold: trigger_threshold.unwrap_or(old.trigger_threshold),
            initial: initial.unwrap_or(old.initial),
            increment: increment.unwrap_or(old.increment),
            tailslow: tailslow.unwrap_or(old.tailslow),
            max: max.unwrap_or(old.max),
            vcpu_dirty_limit: vcpu_dirty_limit.unwrap_or(old.vcpu_dirty_limit),
            vcpu_dirty_limit_period: vcpu_dirty_limit_period.unwrap_or(old.vcpu_dirty_limit_period),
            timeout: timeout.unwrap_or(old.timeout),
            timeout_action: timeout_action.unwrap_or(old.timeout_action),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_qemus() {
        let mut change = ConvergenceChange::default();
        *change.value_mut("max-cpu-throttle").unwrap() = Some(100);
        assert_eq!(
            change.check().unwrap_err().desc,
            "Parameter 'max-cpu-throttle' expects an integer in the range of 1 to 99, got 100"
        );
        change.max = Some(99);
        change.trigger_threshold = Some(100);
        change.check().unwrap();
        let mut parameters = ConvergenceParameters::default();
        change.apply(&mut parameters);
        assert_eq!(
            (parameters.trigger_threshold, parameters.initial),
            (100, 20)
        );
        change.initial = Some(0);
        assert!(change.check().is_err());
        assert!(change.value_mut("cpu-throttle").is_none());
    }

    #[test]
    fn the_period_of_a_dirty_limit_has_bounds() {
        for (ms, fits) in [(0, false), (1, true), (1000, true), (1001, false)] {
            let mut change = ConvergenceChange::default();
            *change.value_mut("x-vcpu-dirty-limit-period").unwrap() = Some(ms);
            assert_eq!(change.check().is_ok(), fits, "{ms} ms");
        }
    }

    #[test]
    fn an_action_has_one_name_everywhere() {
        for action in TimeoutAction::ALL {
            assert_eq!(serde_json::to_value(action).unwrap(), action.as_str());
            assert_eq!(action.as_str().parse(), Ok(action));
        }
        let error = "explode".parse::<TimeoutAction>().unwrap_err();
        assert!(error.desc.contains("'explode'"), "{error}");
    }
}
