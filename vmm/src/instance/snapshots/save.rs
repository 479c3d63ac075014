//! Saving a snapshot: the state as a migration to a file, then copies of the images, and in the
//! end the manifest.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use devices::image::Image;
use migration::bitmap::{PageBitmap, PageRun};
use migration::clock::MonotonicClock;
use migration::layout::GuestRam;
use migration::link::Deadlines;
use migration::parameters::{MAX_DOWNTIME_LIMIT, Parameters};
use migration::progress::Progress;
use migration::section::Section;
use migration::snapshot;
use migration::source::{Guest, Job, Outcome};
use migration::vm::{Offer, Pause, SourceVm, VmError};
use tracing::{error, info, warn};

use super::super::Shared;
use super::super::outgoing::{Source, costs};
use super::manifest::{Manifest, SavedDisk, directory, sync_directory};
use super::store::{Store, StoreError, StoredDisk, image_file, state_file};
use super::tag::Tag;
use super::{Failed, Stop};
use crate::control::command::{EventKind, RunState, StorageCopy};
use crate::machine::{Machine, backends};

/// Saves the guest as `tag`. Whether it succeeds or not, the guest then goes on; and if it does
/// not, there is nothing new, and an older snapshot of that name is as it was.
pub(super) fn save(
    shared: &Arc<Shared>,
    guest: &Arc<Machine>,
    store: &Store,
    tag: &Tag,
    stop: &Stop,
) -> Result<(), Failed> {
    let began = Instant::now();
    let mut id = [0; 8];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Failed::new(format!("no random number: {error}")))?;
    let id = u64::from_ne_bytes(id);
    let mut files = NewFiles::default();
    let state_path = files.add(store.state_path(tag, id));

    let mut saving = Saving {
        shared: Arc::clone(shared),
        source: Source::new(
            Arc::clone(shared),
            Arc::clone(guest),
            StorageCopy::None,
            true,
        ),
        guest: Arc::clone(guest),
        paused: None,
    };
    let parameters = Parameters::default();
    // The guest is stopped after one round, however much is left.
    parameters.set_downtime_limit_ms(MAX_DOWNTIME_LIMIT.as_millis() as u64)?;
    let job = Job {
        cancel: stop.cancel.clone(),
        parameters: Arc::new(parameters),
        progress: Arc::new(Progress::new(Arc::new(MonotonicClock), None)),
        deadlines: Deadlines::default(),
        costs: costs(guest),
        postcopy: None,
    };
    match snapshot::save(&mut saving, &state_path, &job) {
        Outcome::Completed(_) => {}
        Outcome::Failed { error, guest } => {
            if let Guest::Stuck(stuck) = guest {
                error!("the guest can't run on: {stuck}");
            }
            return Err(Failed::new(error));
        }
        Outcome::Cancelled { reason, .. } => return Err(Failed::new(reason)),
        // Not without post-copy.
        Outcome::Abandoned { reason } => return Err(Failed::new(reason)),
        Outcome::HandoverUnknown { error } => {
            // Unlike a destination, a file can't run it.
            saving.go_on().map_err(Failed::new)?;
            return Err(Failed::new(error));
        }
    }
    // The guest stands still until its disks are copied.
    let copied = copy_disks(guest, store, tag, id, stop, &mut files);
    let (date, vm_clock) = (seconds_since_1970(), guest.clock());
    let stopped_ms = saving
        .paused
        .as_ref()
        .map(|p| p.since.elapsed().as_millis());
    let resumed = saving.go_on();
    copied?;
    // All of it is on the disk before there is a snapshot.
    let manifest = Manifest {
        tag: tag.to_string(),
        id,
        date,
        vm_clock: vm_clock.as_nanos() as u64,
        state: state_file(&state_path)?,
        disks: settle_copies(guest, store, tag, id)?,
    };
    let path = store.manifest_path(tag);
    let published = manifest.publish(&path);
    published.map_err(|error| StoreError::File { path, error })?;
    files.keep();
    info!(%tag, ms = began.elapsed().as_millis(), stopped_ms, "saved a snapshot");
    // What it replaces is none any more.
    if let Err(error) = store.remove_others(tag, Some(id)) {
        warn!(%tag, "what the old snapshot had can't be removed: {error}");
    }
    resumed.map_err(|error| Failed::new(format!("saved, but the guest can't run on: {error}")))
}

fn copy_disks(
    guest: &Machine,
    store: &Store,
    tag: &Tag,
    id: u64,
    stop: &Stop,
    files: &mut NewFiles,
) -> Result<(), Failed> {
    for stored in &store.disks {
        let path = stored.copy_path(tag, id);
        image(guest, stored)?.copy_file(&path, &|| stop.goes_on())?;
        files.add(path);
    }
    Ok(())
}

/// Makes the copies durable; returns what they are like.
fn settle_copies(
    guest: &Machine,
    store: &Store,
    tag: &Tag,
    id: u64,
) -> Result<Vec<SavedDisk>, Failed> {
    let mut saved = Vec::new();
    for stored in &store.disks {
        let path = stored.copy_path(tag, id);
        let synced = File::open(&path)
            .and_then(|file| file.sync_all())
            .and_then(|()| sync_directory(directory(&path)));
        saved.push(SavedDisk {
            id: stored.id.clone(),
            format: image(guest, stored)?.format().into(),
            copy: image_file(&path)?,
        });
        synced.map_err(|error| StoreError::File { path, error })?;
    }
    Ok(saved)
}

fn image<'a>(guest: &'a Machine, stored: &StoredDisk) -> Result<&'a Image, Failed> {
    let disk = guest.disks().iter().find(|disk| disk.id() == stored.id);
    Ok(disk.ok_or_else(|| Failed::new("a disk is gone"))?.image())
}

fn seconds_since_1970() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// Files that go again unless they are kept.
#[derive(Default)]
struct NewFiles(Vec<PathBuf>);

impl NewFiles {
    fn add(&mut self, path: PathBuf) -> PathBuf {
        self.0.push(path.clone());
        path
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            // It may not have come to be.
            let _ = fs::remove_file(path);
        }
    }
}

/// The engine's view of a guest that stays here.
struct Saving {
    shared: Arc<Shared>,
    source: Source,
    guest: Arc<Machine>,
    paused: Option<Paused>,
}

/// What the guest did before it was stopped.
struct Paused {
    before: RunState,
    since: Instant,
}

impl Saving {
    /// Lets the guest run on, if it was stopped and ran before.
    fn go_on(&mut self) -> Result<(), VmError> {
        let Some(paused) = self.paused.take() else {
            return Ok(());
        };
        let mut state = self.shared.state();
        if paused.before != RunState::Running {
            state.run = paused.before;
            return Ok(());
        }
        match self.guest.run_on() {
            Ok(()) => state.set_running(&self.shared),
            Err(error) => {
                state.run = RunState::InternalError;
                return Err(error.into());
            }
        }
        Ok(())
    }
}

impl SourceVm for Saving {
    fn offer(&mut self) -> Result<Offer, VmError> {
        self.source.offer()
    }

    fn open_blob(&mut self, index: usize) -> Result<Box<dyn Read + Send>, VmError> {
        self.source.open_blob(index)
    }

    fn ram(&self) -> GuestRam {
        self.source.ram()
    }

    fn start_dirty_log(&mut self) -> Result<(), VmError> {
        self.source.start_dirty_log()
    }

    fn free_pages(&mut self) -> Vec<PageRun> {
        self.source.free_pages()
    }

    fn prepare_release(&mut self) -> Result<(), VmError> {
        self.source.prepare_release()
    }

    fn harvest_dirty(&mut self, dirty: &mut PageBitmap) -> Result<(), VmError> {
        self.source.harvest_dirty(dirty)
    }

    fn protect(&mut self, dirty: &PageBitmap, first: u64, count: u64) -> Result<(), VmError> {
        self.source.protect(dirty, first, count)
    }

    fn pause(&mut self, _: bool) -> Result<Pause, VmError> {
        let since = Instant::now();
        let mut state = self.shared.state();
        // A reset that the guest has asked for is done first, and may let it run again.
        let last_instruction = loop {
            let last = self.guest.pause();
            if !self.shared.handle_guest_events(&mut state) {
                break last;
            }
        };
        let before = state.run;
        if !super::can_be_saved(before) {
            return Err(format!("the guest has stopped by itself (state '{before}')").into());
        }
        state.run = RunState::SaveVm;
        let was_running = before == RunState::Running;
        if was_running {
            self.shared.emit(EventKind::Stop);
        }
        self.paused = Some(Paused { before, since });
        Ok(Pause {
            was_running,
            last_instruction,
        })
    }

    fn save(&mut self) -> Result<Vec<Section>, VmError> {
        self.source.save()
    }

    /// The locks stay: nobody else gets the images.
    fn release(&mut self) -> Result<(), VmError> {
        Ok(backends::flush(self.guest.disks())?)
    }

    fn resume(&mut self, _: Pause) -> Result<(), VmError> {
        self.go_on()
    }

    /// The guest only stands still.
    fn handed_over(&mut self) {}

    fn stop_dirty_log(&mut self) {
        self.source.stop_dirty_log();
    }
}
