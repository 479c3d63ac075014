//! The commands that limit what vCPUs may write.
//!
//! The limits are this process's, not the guest's: a guest that moves leaves them behind, and one
//! that is put back to a snapshot keeps those that it has here.

use std::sync::Arc;

use tracing::error;

use super::outgoing::Outgoing;
use super::write_limiter::WriteLimiter;
use super::{Instance, State};
use crate::control::command::{
    CommandError, CommandResult, DirtyLimitInfo, DirtyRateMode, DirtyRateStatus, ErrorClass,
    RunState,
};
use crate::kvm;
use crate::machine::Machine;

/// The largest limit in MB a second that is a number of bytes.
const MAX_MB: u64 = u64::MAX >> 20;

impl Instance {
    /// Limits what a vCPU, or each, may write to, in MB a second; 0 is no limit.
    pub(super) fn limit_vcpu_writes(&self, cpu: Option<u64>, rate: u64) -> CommandResult<()> {
        if rate == 0 {
            return self.unlimit_vcpu_writes(cpu);
        }
        let mut state = self.0.state();
        let guest = Arc::clone(state.guest()?);
        let mut limits = guest.write_limits();
        let chosen = choose(&guest, cpu, &mut limits)?;
        state.refuse_while_migration_limits("set")?;
        state.check_log_is_free()?;
        if cpu.is_some() && guest.config().vcpus > 1 {
            check_writers_are_told(&guest)?;
        }
        chosen.fill(Some(rate.min(MAX_MB) << 20));
        if state.write_limiter.is_none() {
            let started = WriteLimiter::start(Arc::clone(&guest), state.log_in_use);
            state.write_limiter =
                Some(started.map_err(|err| CommandError::generic(err.to_string()))?);
        }
        guest.limit_writes(limits);
        Ok(())
    }

    /// Lets a vCPU, or all, write what they like again.
    pub(super) fn unlimit_vcpu_writes(&self, cpu: Option<u64>) -> CommandResult<()> {
        let mut state = self.0.state();
        let guest = Arc::clone(state.guest()?);
        let mut limits = guest.write_limits();
        let chosen = choose(&guest, cpu, &mut limits)?;
        state.refuse_while_migration_limits("cancel")?;
        chosen.fill(None);
        if limits.iter().all(Option::is_none) {
            limits.clear();
            state.write_limiter = None;
        }
        guest.limit_writes(limits);
        Ok(())
    }

    /// The vCPUs whose writes are limited.
    pub(super) fn show_vcpu_limits(&self) -> Vec<DirtyLimitInfo> {
        let guest = self.0.state().guest.clone();
        let limited = guest.map(|guest| guest.limited_vcpus());
        let info = |vcpu: crate::machine::LimitedVcpu| DirtyLimitInfo {
            cpu_index: vcpu.index,
            limit_rate: vcpu.limit >> 20,
            current_rate: vcpu.rate >> 20,
            throttle_percentage: vcpu.share,
            rate_is_average: vcpu.is_average,
        };
        limited.into_iter().flatten().map(info).collect()
    }
}

impl State {
    /// Another machine takes the place of the guest's: the limits go over to it.
    pub(super) fn move_write_limits(&mut self, to: &Arc<Machine>) {
        // It uses the log of the machine that goes.
        if self.write_limiter.take().is_none() {
            return;
        }
        let limits = self.guest.as_ref().map(|guest| guest.write_limits());
        match WriteLimiter::start(Arc::clone(to), self.log_in_use) {
            Ok(limiter) => {
                to.limit_writes(limits.unwrap_or_default());
                self.write_limiter = Some(limiter);
            }
            Err(err) => error!("what vCPUs write is not limited any more: {err}"),
        }
    }

    fn refuse_while_migration_limits(&self, what: &str) -> CommandResult<()> {
        let migrating = self.outgoing.as_ref().is_some_and(Outgoing::is_running);
        if migrating && self.capabilities.dirty_limit {
            return Err(CommandError::generic(format!(
                "can't {what} dirty page rate limit while migration is running: with the \
                 capability dirty-limit it limits the vCPUs itself"
            )));
        }
        Ok(())
    }

    fn check_log_is_free(&self) -> CommandResult<()> {
        if self.run == RunState::Postmigrate {
            return Err(CommandError::generic(
                "the guest is not here any more, to be limited (state 'postmigrate')",
            ));
        }
        if self.memory_missing().is_some() {
            return Err(CommandError::generic(
                "some of the guest's memory has not come yet: its vCPUs can be limited when the \
                 migration to here has completed",
            ));
        }
        let measured = self.dirty_rate.as_ref().map(|measured| measured.info());
        let by_log = measured.is_some_and(|info| {
            info.status == DirtyRateStatus::Measuring && info.mode == DirtyRateMode::DirtyBitmap
        });
        if by_log {
            return Err(CommandError::generic(
                "the dirty rate is being measured by the dirty log, which limiting vCPUs needs: \
                 wait until query-dirty-rate tells it",
            ));
        }
        Ok(())
    }
}

/// The limits that a command is about, of all, which are made as many as there are vCPUs.
fn choose<'a>(
    guest: &Machine,
    cpu: Option<u64>,
    limits: &'a mut Vec<Option<u64>>,
) -> CommandResult<&'a mut [Option<u64>]> {
    let vcpus = guest.config().vcpus;
    limits.resize(vcpus as usize, None);
    let Some(cpu) = cpu else {
        return Ok(limits);
    };
    let chosen = usize::try_from(cpu).ok();
    let chosen = chosen.and_then(|cpu| limits.get_mut(cpu..=cpu));
    chosen.ok_or_else(|| {
        CommandError::generic(format!(
            "incorrect cpu index specified: there is no vCPU {cpu}, but 0 to {}",
            vcpus.saturating_sub(1)
        ))
    })
}

/// Refuses to limit one of several vCPUs where nobody knows what it writes.
fn check_writers_are_told(guest: &Machine) -> CommandResult<()> {
    let why = if !guest.has_fault_counts() {
        "its KVM counts no page faults for each vCPU (Linux 5.14 does)"
    } else if kvm::logs_without_faults() {
        "its processor logs dirty pages without faults (Intel's PML, which the parameter pml=0 of \
         the module kvm_intel switches off)"
    } else {
        return Ok(());
    };
    Err(CommandError::new(
        ErrorClass::KVMMissingCap,
        format!(
            "this host doesn't tell which vCPU writes: {why}; without a cpu-index, all are \
             limited alike"
        ),
    ))
}
