//! Snapshots of a guest with its disks: `savevm`, `loadvm`, `delvm` and `info snapshots`.
//!
//! A snapshot is the guest's state in a file (`migration::snapshot`), a copy of each writable
//! disk's image, and a manifest that makes them one; all of them are beside the images. [`store`]
//! knows where, [`save`] and [`load`] do the work, each on a thread, one at a time.

mod load;
mod manifest;
mod replace;
mod save;
mod store;
mod tag;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use migration::cancel::Cancel;
use time::OffsetDateTime;
use tracing::error;

use self::store::Store;
use self::tag::Tag;
use super::outgoing::Outgoing;
use super::{Exit, Instance, Shared, State};
use crate::control::command::{
    CommandError, CommandResult, RunState, ShutdownCause, SnapshotInfo, Work,
};
use crate::machine::Machine;

/// Why a snapshot could not be saved, loaded or deleted.
#[derive(Debug)]
struct Failed(String);

impl Failed {
    fn new(reason: impl ToString) -> Self {
        Self(reason.to_string())
    }
}

impl<E: std::error::Error> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::new(error)
    }
}

/// Saving, loading or deleting a snapshot, under way.
pub(super) struct SnapshotJob {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

/// By which the work is told that it shall end.
#[derive(Clone)]
struct Stop {
    /// For the migration that is a part of it.
    cancel: Cancel,
    /// For the rest.
    stopped: Arc<AtomicBool>,
}

impl Stop {
    fn goes_on(&self) -> bool {
        !self.stopped.load(Ordering::Relaxed)
    }
}

impl SnapshotJob {
    /// Cancels it because the process ends; returns its thread, to be waited for.
    pub(super) fn begin_shutdown(&mut self) -> Option<JoinHandle<()>> {
        self.stop.stopped.store(true, Ordering::Relaxed);
        // Too late means that it is nearly over.
        let _ = self.stop.cancel.cancel("the process ends");
        self.thread.take()
    }
}

/// Whether a guest in this state can be saved.
fn can_be_saved(run: RunState) -> bool {
    matches!(
        run,
        RunState::Running
            | RunState::Paused
            | RunState::Prelaunch
            | RunState::IoError
            | RunState::Debug
    )
}

impl State {
    /// Refuses what can't go on beside a snapshot's work.
    pub(super) fn check_no_snapshot_work(&self) -> CommandResult<()> {
        match self.snapshot {
            None => Ok(()),
            Some(_) => Err(CommandError::generic(
                "a snapshot is being saved, loaded or deleted",
            )),
        }
    }

    /// Refuses work on snapshots while something else has the guest.
    fn check_free(&self) -> CommandResult<()> {
        self.check_no_snapshot_work()?;
        if self.outgoing.as_ref().is_some_and(Outgoing::is_running) {
            return Err(CommandError::generic(
                "There's a migration process in progress",
            ));
        }
        self.refuse_while_missing()?;
        match self.run {
            RunState::Inmigrate => Err(CommandError::generic(
                "Guest is waiting for an incoming migration",
            )),
            RunState::Postmigrate => Err(CommandError::generic(
                "the guest is not here any more, nor are its disks (state 'postmigrate')",
            )),
            _ => Ok(()),
        }
    }
}

impl Shared {
    fn store(&self) -> CommandResult<Store> {
        Store::of(&self.settings.given).map_err(|error| CommandError::generic(error.to_string()))
    }

    /// Does `work` on a thread.
    fn work_on_snapshot(
        self: &Arc<Self>,
        state: &mut State,
        work: impl FnOnce(&Arc<Shared>, &Stop) -> Result<(), Failed> + Send + 'static,
    ) -> CommandResult<Work> {
        let failed = |error: std::io::Error| CommandError::generic(format!("can't start: {error}"));
        let stop = Stop {
            cancel: Cancel::new().map_err(failed)?,
            stopped: Arc::default(),
        };
        let (sender, pending) = Work::new();
        let (shared, stopping) = (Arc::clone(self), stop.clone());
        let thread = thread::Builder::new()
            .name("snapshot work".to_owned())
            .spawn(move || {
                shared.settings.threads.begin_migration();
                let result = work(&shared, &stopping);
                let mut state = shared.state();
                let ours = |job: &SnapshotJob| Arc::ptr_eq(&job.stop.stopped, &stopping.stopped);
                if state.snapshot.as_ref().is_some_and(ours) {
                    state.snapshot = None;
                }
                drop(state);
                // Nobody may be waiting any more.
                let _ = sender.send(result.map_err(|Failed(why)| CommandError::generic(why)));
            });
        state.snapshot = Some(SnapshotJob {
            stop,
            thread: Some(thread.map_err(failed)?),
        });
        Ok(pending)
    }
}

fn tag(text: &str) -> CommandResult<Tag> {
    Tag::new(text).map_err(|error| CommandError::generic(error.to_string()))
}

impl Instance {
    pub(super) fn begin_save(&self, name: Option<String>) -> CommandResult<Work> {
        let tag = match name {
            Some(name) => tag(&name)?,
            None => Tag::of_time(OffsetDateTime::now_utc()),
        };
        let mut state = self.0.state();
        let guest = self.guest_for_snapshot(&state)?;
        if !can_be_saved(state.run) {
            let run = state.run;
            return Err(CommandError::generic(format!(
                "a guest in the state '{run}' can't be saved"
            )));
        }
        let blockers = guest.devices().migration_blockers();
        if !blockers.is_empty() {
            return Err(CommandError::generic(blockers.join("\n")));
        }
        let store = self.0.store()?;
        self.0.work_on_snapshot(&mut state, move |shared, stop| {
            let saved = save::save(shared, &guest, &store, &tag, stop);
            saved.map_err(|Failed(why)| Failed(format!("Could not save snapshot '{tag}': {why}")))
        })
    }

    pub(super) fn begin_load(&self, name: &str) -> CommandResult<Work> {
        let tag = tag(name)?;
        let mut state = self.0.state();
        let guest = self.guest_for_snapshot(&state)?;
        let store = self.0.store()?;
        self.0.work_on_snapshot(&mut state, move |shared, stop| {
            let loaded = load::load(shared, Some(guest), &store, &tag, stop);
            loaded.map_err(|Failed(why)| Failed(format!("Could not load snapshot '{tag}': {why}")))
        })
    }

    pub(super) fn begin_delete(&self, name: &str) -> CommandResult<Work> {
        let tag = tag(name)?;
        let mut state = self.0.state();
        state.check_free()?;
        let store = self.0.store()?;
        self.0
            .work_on_snapshot(&mut state, move |_, _| Ok(store.delete(&tag)?))
    }

    pub(super) fn list_snapshots(&self) -> CommandResult<Vec<SnapshotInfo>> {
        let list = self.0.store()?.list();
        list.map_err(|error| CommandError::generic(error.to_string()))
    }

    /// Loads a snapshot into a process that has no guest yet. If it fails the process ends.
    pub fn load_snapshot_at_start(&self, name: &str) -> CommandResult<()> {
        let tag = tag(name)?;
        let store = self.0.store()?;
        let mut state = self.0.state();
        state.run = RunState::RestoreVm;
        self.0.work_on_snapshot(&mut state, move |shared, stop| {
            let loaded = load::load(shared, None, &store, &tag, stop);
            if let Err(Failed(why)) = &loaded {
                let reason = format!("Could not load snapshot '{tag}': {why}");
                error!("{reason}");
                shared.exit(ShutdownCause::HostError, Exit::Failure(reason));
            }
            loaded
        })?;
        Ok(())
    }

    fn guest_for_snapshot(&self, state: &State) -> CommandResult<Arc<Machine>> {
        state.check_free()?;
        Ok(Arc::clone(state.guest()?))
    }
}
