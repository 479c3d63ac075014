//! The states of a machine and its vCPUs.

use std::fmt;

use serde::Serialize;

/// QAPI's `RunState`, as far as Ferry has the states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Stopped by `stop`.
    Paused,
    /// Started with `--paused`, and not run yet.
    Prelaunch,
    /// Waiting for a guest, or receiving it.
    Inmigrate,
    /// Stopped to hand the guest over.
    FinishMigrate,
    /// The guest has gone to another process, or may have.
    Postmigrate,
    /// The guest has powered off, and the process stays (`--no-shutdown`).
    Shutdown,
    /// KVM could not go on; what it said is in the log.
    InternalError,
    /// The guest's kernel has panicked.
    GuestPanicked,
    /// Stopped because a disk failed.
    IoError,
    /// Stopped by a debugger.
    Debug,
    /// Stopped while a snapshot is saved.
    SaveVm,
    /// A snapshot is being loaded, and there is no guest yet.
    RestoreVm,
}

impl RunState {
    /// The name in QMP and in the monitor.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Prelaunch => "prelaunch",
            Self::Inmigrate => "inmigrate",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
            Self::GuestPanicked => "guest-panicked",
            Self::IoError => "io-error",
            Self::Debug => "debug",
            Self::SaveVm => "save-vm",
            Self::RestoreVm => "restore-vm",
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// QAPI's `StatusInfo`, what `query-status` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StatusInfo {
    /// Whether all vCPUs can run.
    pub running: bool,
    /// The state.
    pub status: RunState,
}

impl From<RunState> for StatusInfo {
    fn from(status: RunState) -> Self {
        Self {
            running: status == RunState::Running,
            status,
        }
    }
}

/// One vCPU: what `query-cpus-fast` (QAPI's `CpuInfoFast`) and `info cpus` show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuInfo {
    /// Its index, from 0.
    pub index: u32,
    /// The host's thread (gettid) that runs it.
    pub thread_id: i32,
    /// Whether it waits for an interrupt (HLT), where known without asking KVM.
    pub halted: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_has_one_name_everywhere() {
        for state in [
            RunState::Running,
            RunState::Paused,
            RunState::Prelaunch,
            RunState::Inmigrate,
            RunState::FinishMigrate,
            RunState::Postmigrate,
            RunState::Shutdown,
            RunState::InternalError,
            RunState::GuestPanicked,
            RunState::IoError,
            RunState::Debug,
            RunState::SaveVm,
            RunState::RestoreVm,
        ] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
    }
}
