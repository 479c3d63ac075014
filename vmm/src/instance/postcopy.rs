//! A guest that has moved ahead of its memory: what is refused meanwhile, and how it is stopped.
//!
//! At the destination, whoever touches memory that has not come waits for it, for as long as the
//! connection is broken: a vCPU or a device may not stand still before that. So no command waits
//! for them without bound.

use std::sync::Arc;
use std::time::Duration;

use migration::progress::Status;
use tracing::{error, warn};

use super::{Shared, State};
use crate::control::command::{CommandError, CommandResult, RunState};
use crate::machine::StillRunning;

/// How long a guest may take to stop that waits for its memory. A page comes within a round trip
/// or two as long as there is a connection.
const PATIENCE: Duration = Duration::from_secs(1);

/// Memory of the guest here that is still at its source.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missing {
    pages: u64,
    /// The connection is broken: it does not come before the migration is recovered.
    paused: bool,
}

impl State {
    /// What is missing of the memory of the guest here.
    pub(super) fn memory_missing(&self) -> Option<Missing> {
        self.guest.as_ref()?;
        let progress = self.incoming.as_ref()?.progress().snapshot();
        if self.run == RunState::Inmigrate || progress.status.is_over() {
            return None;
        }
        let pages = progress.postcopy.map(|postcopy| postcopy.missing_pages);
        (progress.status.is_postcopy() || pages.is_some()).then(|| Missing {
            pages: pages.unwrap_or(0),
            paused: progress.status == Status::PostcopyPaused,
        })
    }

    /// Refuses a command that needs the guest's memory while that can't come.
    pub(super) fn refuse_while_paused(&self, command: &str) -> CommandResult<()> {
        match self.memory_missing() {
            Some(Missing {
                pages,
                paused: true,
            }) => Err(CommandError::generic(format!(
                "'{command}' is not possible: {pages} pages of the guest's memory are missing, and \
                 the connection to its source is broken; recover the migration first \
                 ('migrate_recover' here, then 'migrate -r' at the source)"
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses to move on a guest that has not arrived as a whole.
    pub(super) fn refuse_while_missing(&self) -> CommandResult<()> {
        match self.memory_missing() {
            Some(Missing { pages, .. }) => Err(CommandError::generic(format!(
                "{pages} pages of the guest's memory have not come yet: it can be migrated or saved \
                 when the migration to here has completed"
            ))),
            None => Ok(()),
        }
    }

    /// Why the process must not end, if a guest is lost with it.
    pub(super) fn refuse_to_end(&self) -> CommandResult<()> {
        let how = "wait until the migration has completed ('info migrate'), or give the guest up \
                   with 'quit -f' (QMP: \"force\": true)";
        // A guest that has shut down needs no more.
        let needed = |_: &Missing| self.run != RunState::Shutdown;
        if let Some(Missing { pages, .. }) = self.memory_missing().filter(needed) {
            return Err(CommandError::generic(format!(
                "{pages} pages of the guest's memory are missing here, the guest would be lost: {how}"
            )));
        }
        let outgoing = self.outgoing.as_ref().map(|outgoing| outgoing.progress());
        match outgoing.map(|progress| progress.snapshot()) {
            Some(progress) if progress.status.is_postcopy() => {
                let pages = progress
                    .postcopy
                    .map_or(0, |postcopy| postcopy.missing_pages);
                Err(CommandError::generic(format!(
                    "the guest runs at the destination, which still needs {pages} pages of its \
                     memory from here: {how}"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Stops the vCPUs and devices for a command. If they wait for memory for too long, they run on.
    pub(super) fn pause_guest(&self) -> CommandResult<()> {
        let Some(guest) = &self.guest else {
            return Ok(());
        };
        if self.memory_missing().is_none() {
            guest.pause();
            return Ok(());
        }
        let stopped = match self.run {
            RunState::Running => guest.try_pause(PATIENCE),
            // It may not stand still yet, but it is not to run.
            _ => guest.stop_soon(PATIENCE),
        };
        stopped.map(drop).map_err(|still| {
            CommandError::generic(format!("the guest can't be stopped: {still}; try again"))
        })
    }

    /// Stops the vCPUs and devices of a guest that has no way on from here; those that wait for
    /// memory stop when it has come. Whether all stand still.
    pub(super) fn still_guest(&self) -> bool {
        let Some(guest) = &self.guest else {
            return true;
        };
        if !self.incoming_was_postcopy() {
            guest.pause();
            return true;
        }
        let late = |still: &StillRunning| warn!("not all of the guest stands still yet: {still}");
        guest.stop_soon(PATIENCE).inspect_err(late).is_ok()
    }

    /// Stops them because the process ends, and has waited for the migrations. Whether they stand
    /// still; if not, nothing of the machine is taken down, as that would wait for them.
    pub(super) fn still_guest_to_end(&self) -> bool {
        let still = self.still_guest();
        if !still && let Some(guest) = &self.guest {
            error!("the guest is lost, and with it what it had not flushed to its disks");
            std::mem::forget(Arc::clone(guest));
        }
        still
    }

    /// A migration to here has failed. If the guest runs already, it can't go on: memory that it
    /// needs never comes.
    pub(super) fn lose_guest(&mut self, shared: &Shared) {
        if self.guest.is_some() && self.run == RunState::Running && self.incoming_was_postcopy() {
            error!("the guest is lost: not all of its memory has come");
            self.stop_guest(shared, RunState::InternalError);
        }
    }

    /// Whether memory of the guest here may be missing, or be missing for good.
    fn incoming_was_postcopy(&self) -> bool {
        let progress = self.incoming.as_ref().map(|incoming| incoming.progress());
        progress.is_some_and(|progress| {
            let snapshot = progress.snapshot();
            snapshot.status != Status::Completed && snapshot.postcopy.is_some()
        })
    }
}
