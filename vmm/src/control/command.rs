//! What can be asked of a machine. QMP and the human monitor are two faces of this, and both
//! report a [`CommandError`] as it is.

use serde::{Serialize, Serializer};
use tokio::sync::broadcast;

pub use migration::uri::Uri;

pub use super::address::SocketAddress;
pub use super::balloon::{BalloonInfo, FerryBalloonInfo};
pub use super::block::BlockInfo;
pub use super::capability::{Capabilities, MigrationCapability, MigrationCapabilityStatus};
pub use super::compression::{CompressionInfo, MultifdCompression, XbzrleCacheStats};
pub use super::convergence::{ConvergenceChange, ConvergenceParameters, TimeoutAction};
pub use super::dirty_rate::{
    DirtyRateInfo, DirtyRateMode, DirtyRateRequest, DirtyRateStatus, DirtyRateVcpu,
};
pub use super::event::{Event, EventKind, ShutdownCause};
pub use super::forecast::MigrationForecast;
pub use super::migrate_request::{MigrateRequest, StorageCopy};
pub use super::migration::{
    BytesByKind, DowntimeParts, FerryMigrationInfo, MigrationInfo, MigrationRound, MigrationStats,
    MigrationStatus, MultifdInfo, ZeroCopyInfo,
};
pub use super::network::{AnnounceChange, AnnounceParameters, AnnounceRequest, NetworkInfo};
pub use super::parameters::{MigrationParameters, ParameterChange};
pub use super::postcopy::PostcopyInfo;
pub use super::run_state::{CpuInfo, RunState, StatusInfo};
pub use super::snapshot::{SavedInfo, SnapshotInfo, Work};
pub use super::vcpu_dirty_limit::DirtyLimitInfo;

/// The result of a command.
pub type CommandResult<T> = Result<T, CommandError>;

/// A running ferry, as those who control it see it.
///
/// All methods are called on the main thread, which serves every client: each must return after
/// short, bounded work, never after waiting for a peer. What takes long goes on in the
/// background and is told by events and [`migration_info`](Self::migration_info).
pub trait Control: Send + Sync {
    /// The guest's name, as given with `--name`.
    fn name(&self) -> Option<String>;

    /// Whether the guest runs, and why not.
    fn status(&self) -> StatusInfo;

    /// The vCPUs, in the order of their index. Empty while a destination does not know them yet.
    fn cpus(&self) -> Vec<CpuInfo>;

    /// The registers of one vCPU as text for people, several lines, taken while it is out of the
    /// guest for a moment. Fails if there is no such vCPU.
    fn registers(&self, cpu: u32) -> CommandResult<String>;

    /// The disks, in the order of the guest's devices. Empty while there is no guest.
    fn disks(&self) -> Vec<BlockInfo>;

    /// Stops the guest; does nothing if it is stopped. Sends [`EventKind::Stop`] if it ran.
    fn stop(&self) -> CommandResult<()>;

    /// Runs the guest; does nothing if it runs. While a migration comes in, it asks for the guest
    /// to run once it has arrived. Fails in a state that only a reset leaves.
    fn cont(&self) -> CommandResult<()>;

    /// Resets the machine, as its reset button would.
    fn system_reset(&self) -> CommandResult<()>;

    /// Presses the machine's power button: what follows is the guest's to decide. Sends
    /// [`EventKind::Powerdown`].
    fn system_powerdown(&self) -> CommandResult<()>;

    /// The memory balloon. Fails if there is none. What the guest tells of its memory is asked for
    /// anew, for the next call.
    fn balloon(&self) -> CommandResult<BalloonInfo>;

    /// Asks the guest to give memory back, or to take it, until `bytes` are left to it. Fails if
    /// there is no balloon. Sends [`EventKind::BalloonChange`] when the guest does so.
    fn set_balloon(&self, bytes: u64) -> CommandResult<()>;
    /// The network cards, in their order. Empty while a destination does not know them yet.
    fn networks(&self) -> Vec<NetworkInfo>;

    /// Plugs a network card's cable in or out.
    fn set_link(&self, name: &str, up: bool) -> CommandResult<()>;

    /// Tells the network where the guest is, in the background.
    fn announce_self(&self, request: AnnounceRequest) -> CommandResult<()>;

    /// Ends the process, soon: the answer to this command is still delivered. Fails while a guest
    /// has moved ahead of its memory, which would be lost, unless `force` is given.
    fn quit(&self, cause: ShutdownCause, force: bool) -> CommandResult<()>;

    /// Starts to migrate the guest, in the background, or goes on with a migration that is paused
    /// in post-copy. Fails at once if it cannot begin: one is under way already, the guest is not
    /// here, something blocks it. What fails later, such as connecting, is told by
    /// [`migration_info`](Self::migration_info). When this returns, `migration_info` is about this
    /// migration.
    fn migrate(&self, request: MigrateRequest) -> CommandResult<()>;

    /// Cancels the outgoing migration if there is one that can still be cancelled; otherwise does
    /// nothing. Returns at once; the status becomes [`MigrationStatus::Cancelled`] later. Fails if
    /// the guest has moved, or is about to.
    fn migrate_cancel(&self) -> CommandResult<()>;

    /// Has the migration under way go over into post-copy: the guest moves as soon as possible,
    /// and its memory follows. Fails without the capability, or if there has been no migration.
    fn migrate_start_postcopy(&self) -> CommandResult<()>;

    /// Breaks the connection of a migration in post-copy, at either side, so that it can be
    /// recovered over another one.
    fn migrate_pause(&self) -> CommandResult<()>;

    /// At the destination of a migration that is paused in post-copy: listens for its source.
    fn migrate_recover(&self, address: Uri) -> CommandResult<()>;

    /// Starts to listen for a guest. Fails unless the process was started with `--incoming defer`
    /// and has not got an address yet, or if it cannot listen there. `exit_on_error`: whether the
    /// process ends if the migration fails (the default in QEMU), or stays for another try.
    fn migrate_incoming(&self, address: Uri, exit_on_error: bool) -> CommandResult<()>;

    /// Saves the guest with its disks, in the background, as the snapshot `tag`, which replaces one
    /// of that name; without a name one is made of the time. Fails at once if it cannot begin.
    fn save_snapshot(&self, tag: Option<String>) -> CommandResult<Work>;

    /// Puts the guest and its disks back to where they were when the snapshot was saved, in the
    /// background. If that fails, the guest goes on as if nothing had happened.
    fn load_snapshot(&self, tag: &str) -> CommandResult<Work>;

    /// Deletes a snapshot, in the background.
    fn delete_snapshot(&self, tag: &str) -> CommandResult<Work>;

    /// The snapshots that there are, by date. Fails if the machine has no disk that can have any.
    fn snapshots(&self) -> CommandResult<Vec<SnapshotInfo>>;

    /// How the migration under way, or else the last one, is doing.
    fn migration_info(&self) -> MigrationInfo;

    /// Begins to measure how much the guest writes, in the background. The request has been
    /// [checked](DirtyRateRequest::check). Fails while a migration is under way, or while that is
    /// measured already.
    fn calc_dirty_rate(&self, request: DirtyRateRequest) -> CommandResult<()>;

    /// What was measured. A migration that begins meanwhile ends the measuring.
    fn dirty_rate(&self) -> DirtyRateInfo;

    /// Limits what a vCPU, or each of them, may write to, in MB (MiB) a second; 0 is no limit. Fails
    /// if there is no such vCPU, while a migration limits the vCPUs, and for one of several vCPUs if
    /// this host doesn't tell which of them writes.
    fn set_vcpu_dirty_limit(&self, cpu: Option<u64>, rate: u64) -> CommandResult<()>;

    /// Lets a vCPU, or all of them, write what they like again. Fails if there is no such vCPU, and
    /// while a migration limits the vCPUs.
    fn cancel_vcpu_dirty_limit(&self, cpu: Option<u64>) -> CommandResult<()>;

    /// The vCPUs whose writes are limited, in the order of their index.
    fn vcpu_dirty_limits(&self) -> Vec<DirtyLimitInfo>;

    /// What a migration would be like over a link of so many bytes a second, at least 1. Fails if it
    /// was not measured how much the guest writes.
    fn migration_forecast(&self, bandwidth: u64) -> CommandResult<MigrationForecast>;

    /// The parameters of migrations.
    fn parameters(&self) -> MigrationParameters;

    /// Changes the given parameters, at any time; a migration under way uses them at once. The
    /// values have been [checked](ParameterChange::check).
    fn set_parameters(&self, change: ParameterChange) -> CommandResult<()>;

    /// The capabilities.
    fn capabilities(&self) -> Capabilities;

    /// Switches capabilities, all or none. Fails while a migration is under way, and if this host
    /// lacks what one needs.
    fn set_capabilities(&self, changes: &[MigrationCapabilityStatus]) -> CommandResult<()>;

    /// From here on, every event. A receiver that lags may lose the oldest ones; a capacity of
    /// 256 or more is expected.
    fn subscribe(&self) -> broadcast::Receiver<Event>;
}

impl dyn Control {
    /// [Checks](DirtyRateRequest::check) what is to be measured, and begins.
    pub fn measure_dirty_rate(&self, request: DirtyRateRequest) -> CommandResult<()> {
        request.check()?;
        self.calc_dirty_rate(request)
    }

    /// [Checks](ParameterChange::check) and makes a change of parameters.
    pub fn change_parameters(&self, change: ParameterChange) -> CommandResult<()> {
        change.check()?;
        self.set_parameters(change)
    }
}

/// QAPI's `QapiErrorClass`: what a program can tell errors apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ErrorClass {
    /// Nothing more particular.
    GenericError,
    /// There is no such command, or not now.
    CommandNotFound,
    /// A device is there but not active.
    DeviceNotActive,
    /// There is no such device.
    DeviceNotFound,
    /// The host's KVM lacks what is needed.
    KVMMissingCap,
}

/// Why a command failed: a class for programs, a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize)]
#[error("{desc}")]
pub struct CommandError {
    /// The class.
    pub class: ErrorClass,
    /// What went wrong, with which value, and what to do: no full stop, no line break.
    #[serde(serialize_with = "one_line")]
    pub desc: String,
}

impl CommandError {
    /// An error of class [`ErrorClass::GenericError`].
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// An error of the given class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self {
            class,
            desc: desc.into(),
        }
    }
}

/// An error that was not written for this ends in one line all the same.
fn one_line<S: Serializer>(desc: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let lines: Vec<&str> = desc
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    serializer.serialize_str(&lines.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_several_lines_is_sent_as_one() {
        let error = CommandError::generic("destination lacks avx\n  destination lacks avx2\n");
        assert_eq!(
            serde_json::to_string(&error).unwrap(),
            r#"{"class":"GenericError","desc":"destination lacks avx; destination lacks avx2"}"#
        );
    }
}
