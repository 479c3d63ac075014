//! The parameters about guests that don't converge, between the commands and the engine.

use migration::parameters::{self, Parameters};

use crate::control::command::{
    CommandError, CommandResult, ConvergenceChange, ConvergenceParameters, TimeoutAction,
};

/// What they are now.
pub(super) fn parameters(parameters: &Parameters) -> ConvergenceParameters {
    let throttle = parameters.throttle();
    ConvergenceParameters {
        trigger_threshold: throttle.trigger_threshold().into(),
        initial: throttle.initial().into(),
        increment: throttle.increment().into(),
        tailslow: throttle.tailslow(),
        max: throttle.max().into(),
        vcpu_dirty_limit: throttle.vcpu_dirty_limit(),
        vcpu_dirty_limit_period: u64::try_from(throttle.vcpu_dirty_limit_period().as_millis())
            .unwrap_or(u64::MAX),
        timeout: parameters.timeout().ms(),
        timeout_action: match parameters.timeout().action() {
            parameters::TimeoutAction::Cancel => TimeoutAction::Cancel,
            parameters::TimeoutAction::Force => TimeoutAction::Force,
            parameters::TimeoutAction::Postcopy => TimeoutAction::Postcopy,
        },
    }
}

/// Changes those that are given.
pub(super) fn change(parameters: &Parameters, change: ConvergenceChange) -> CommandResult<()> {
    let ConvergenceChange {
        trigger_threshold,
        initial,
        increment,
        tailslow,
        max,
        vcpu_dirty_limit,
        vcpu_dirty_limit_period,
        timeout,
        timeout_action,
    } = change;
    let throttle = parameters.throttle();
    let set = || {
        trigger_threshold.map_or(Ok(()), |percent| throttle.set_trigger_threshold(percent))?;
        initial.map_or(Ok(()), |percent| throttle.set_initial(percent))?;
        increment.map_or(Ok(()), |percent| throttle.set_increment(percent))?;
        max.map_or(Ok(()), |percent| throttle.set_max(percent))
    };
    set().map_err(|err: parameters::ThrottleOutOfRange| CommandError::generic(err.to_string()))?;
    if let Some(on) = tailslow {
        throttle.set_tailslow(on);
    }
    if let Some(limit) = vcpu_dirty_limit {
        throttle.set_vcpu_dirty_limit(limit);
    }
    if let Some(ms) = vcpu_dirty_limit_period {
        throttle.set_vcpu_dirty_limit_period(ms);
    }
    if let Some(ms) = timeout {
        parameters.timeout().set_ms(ms);
    }
    if let Some(action) = timeout_action {
        parameters.timeout().set_action(match action {
            TimeoutAction::Cancel => parameters::TimeoutAction::Cancel,
            TimeoutAction::Force => parameters::TimeoutAction::Force,
            TimeoutAction::Postcopy => parameters::TimeoutAction::Postcopy,
        });
    }
    Ok(())
}

/// Refuses a timeout that a migration could not act on.
pub(super) fn check_timeout(parameters: &Parameters, postcopy: bool) -> CommandResult<()> {
    match parameters.timeout().get() {
        Some(timeout) if timeout.action == parameters::TimeoutAction::Postcopy && !postcopy => {
            Err(CommandError::generic(
                "x-migration-timeout-action is postcopy, which needs the capability postcopy-ram \
                 at both sides: switch it on, or set another action",
            ))
        }
        _ => Ok(()),
    }
}
