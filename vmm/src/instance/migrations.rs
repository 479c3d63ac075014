//! The commands on migrations.

use std::sync::Arc;

use migration::postcopy::RecoverError;
use migration::progress::Status;
use migration::userfault::Userfault;

use super::Instance;
use super::convergence;
use super::incoming::{self, Incoming};
use super::outgoing::Outgoing;
use crate::control::command::{
    CommandError, CommandResult, MigrateRequest, MigrationCapabilityStatus, MigrationInfo,
    MigrationStatus, RunState, StorageCopy, Uri,
};

impl Instance {
    /// Starts a migration.
    pub(super) fn start_migration(&self, request: MigrateRequest) -> CommandResult<()> {
        let mut state = self.0.state();
        let guest = Arc::clone(state.guest()?);
        state.check_no_snapshot_work()?;
        if state.outgoing.as_ref().is_some_and(Outgoing::is_running) {
            return Err(in_progress());
        }
        match state.run {
            RunState::Running
            | RunState::Paused
            | RunState::Prelaunch
            | RunState::IoError
            | RunState::Debug => {}
            RunState::Inmigrate => {
                return Err(CommandError::generic(
                    "Guest is waiting for an incoming migration",
                ));
            }
            run => {
                return Err(CommandError::generic(format!(
                    "a guest in the state '{run}' can't be migrated"
                )));
            }
        }
        state.refuse_while_missing()?;
        let postcopy = state.capabilities.postcopy_ram;
        if postcopy {
            refuse_file(&request.address)?;
        }
        convergence::check_timeout(&self.0.parameters, postcopy)?;
        let blockers = guest.devices().migration_blockers();
        if !blockers.is_empty() {
            return Err(CommandError::generic(blockers.join("\n")));
        }
        if matches!(request.address, Uri::File(_)) && request.copy != StorageCopy::None {
            return Err(CommandError::generic(
                "the contents of disks can't travel in a file: migrate without -b and -i, and keep \
                 the images unchanged until the guest is loaded",
            ));
        }
        let outgoing = Outgoing::start(Arc::clone(&self.0), guest, request, postcopy)
            .map_err(|err| CommandError::generic(format!("can't start a migration: {err}")))?;
        state.outgoing = Some(outgoing);
        Ok(())
    }

    /// Goes on with the migration that is paused in post-copy, over another connection.
    pub(super) fn resume_migration(&self, address: &Uri) -> CommandResult<()> {
        let state = self.0.state();
        refuse_file(address)?;
        let postcopy = state.outgoing.as_ref().and_then(Outgoing::postcopy);
        match postcopy.map(|postcopy| postcopy.recover(address.clone())) {
            Some(Ok(())) => Ok(()),
            None | Some(Err(RecoverError::NotPaused)) => Err(CommandError::generic(
                "Cannot resume if there is no paused migration",
            )),
            Some(Err(err)) => Err(CommandError::generic(err.to_string())),
        }
    }

    /// Has the migration under way go over into post-copy.
    pub(super) fn start_postcopy(&self) -> CommandResult<()> {
        let state = self.0.state();
        if !state.capabilities.postcopy_ram {
            return Err(CommandError::generic(
                "Enable postcopy with migrate_set_capability before the start of migration",
            ));
        }
        match &state.outgoing {
            None => Err(CommandError::generic(
                "Postcopy must be started after migration has been started",
            )),
            // Of one that is over there is nothing to switch, which its user could not know.
            Some(outgoing) => {
                if let Some(postcopy) = outgoing.postcopy() {
                    postcopy.start();
                }
                Ok(())
            }
        }
    }

    /// Breaks the connection of a migration in post-copy, at either side.
    pub(super) fn pause_migration(&self) -> CommandResult<()> {
        let state = self.0.state();
        let leaving = state.outgoing.as_ref().and_then(Outgoing::postcopy);
        let arriving = state.incoming.as_ref().and_then(Incoming::postcopy);
        let paused = leaving.is_some_and(|postcopy| postcopy.pause().is_ok())
            || arriving.is_some_and(|postcopy| postcopy.pause().is_ok());
        if paused {
            return Ok(());
        }
        Err(CommandError::generic(
            "migrate-pause is currently only supported during postcopy-active or postcopy-recover \
             state",
        ))
    }

    /// Waits for the source of a migration that is paused in post-copy.
    pub(super) fn recover_migration(&self, address: &Uri) -> CommandResult<()> {
        let mut state = self.0.state();
        refuse_file(address)?;
        let recovered = state
            .incoming
            .as_mut()
            .map(|incoming| incoming.recover(address));
        match recovered {
            Some(Ok(())) => Ok(()),
            None | Some(Err(incoming::RecoverError::Postcopy(RecoverError::NotPaused))) => Err(
                CommandError::generic("Migrate recover can only be run when postcopy is paused"),
            ),
            Some(Err(err)) => Err(CommandError::generic(err.to_string())),
        }
    }

    /// Waits for a guest, or loads it from a file.
    pub(super) fn start_incoming(&self, address: &Uri, exit_on_error: bool) -> CommandResult<()> {
        let mut state = self.0.state();
        if state.run != RunState::Inmigrate {
            return Err(CommandError::generic(
                "'-incoming' was not specified on the command line",
            ));
        }
        if state.incoming.as_ref().is_some_and(Incoming::is_listening) {
            return Err(CommandError::generic(
                "The incoming migration has already been started",
            ));
        }
        if state.capabilities.postcopy_ram {
            refuse_file(address)?;
        }
        let incoming = Incoming::listen(Arc::clone(&self.0), address, exit_on_error)
            .map_err(|err| CommandError::generic(err.to_string()))?;
        state.incoming = Some(incoming);
        Ok(())
    }

    /// The migration under way, or else the last one.
    pub(super) fn show_migration(&self) -> MigrationInfo {
        let state = self.0.state();
        let info = match (&state.outgoing, &state.incoming) {
            (Some(outgoing), _) => outgoing.info(),
            (None, Some(incoming)) => incoming.info(),
            (None, None) => MigrationInfo {
                status: MigrationStatus::None,
                ..MigrationInfo::default()
            },
        };
        let guest = state.guest.as_ref();
        MigrationInfo {
            blocked_reasons: guest
                .map_or_else(Vec::new, |guest| guest.devices().migration_blockers()),
            ..info
        }
    }

    /// Switches capabilities, between migrations.
    pub(super) fn switch_capabilities(
        &self,
        changes: &[MigrationCapabilityStatus],
    ) -> CommandResult<()> {
        let mut state = self.0.state();
        let arriving = |incoming: &Incoming| {
            let status = incoming.progress().status();
            status != Status::None && !status.is_over()
        };
        if state.outgoing.as_ref().is_some_and(Outgoing::is_running)
            || state.incoming.as_ref().is_some_and(arriving)
        {
            return Err(in_progress());
        }
        let after = state.capabilities.after(changes);
        if after.auto_converge && after.dirty_limit {
            return Err(CommandError::generic(
                "dirty-limit conflicts with auto-converge: either of them is available at a time",
            ));
        }
        if after.postcopy_ram && state.run == RunState::Inmigrate {
            check_userfaultfd()?;
        }
        self.0.parameters.set_xbzrle(after.xbzrle);
        self.0.parameters.set_multifd(after.multifd);
        self.0.parameters.set_zero_copy_send(after.zero_copy_send);
        self.0.parameters.set_page_checksum(after.page_checksum);
        let throttle = self.0.parameters.throttle();
        throttle.set_auto_converge(after.auto_converge);
        throttle.set_dirty_limit(after.dirty_limit);
        state.capabilities = after;
        Ok(())
    }
}

/// A destination must be able to have the guest wait for memory.
fn check_userfaultfd() -> CommandResult<()> {
    Userfault::probe().map_err(|err| CommandError::generic(err.to_string()))
}

fn in_progress() -> CommandError {
    CommandError::generic("There's a migration process in progress")
}

/// In post-copy both sides must be there.
fn refuse_file(address: &Uri) -> CommandResult<()> {
    match address {
        Uri::File(_) => Err(CommandError::generic(
            "post-copy is not possible with a file, which has no guest that could run on: switch \
             the capability postcopy-ram off to save to a file or to load from it",
        )),
        _ => Ok(()),
    }
}
