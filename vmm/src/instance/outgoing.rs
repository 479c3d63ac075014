//! The source's half of a migration: the engine's view of this process's guest, and the thread
//! that the engine runs on.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use devices::disk::Disk;
use devices::virtio::balloon::hints::FreePages;
use migration::bitmap::{PageBitmap, PageRun};
use migration::cancel::Cancel;
use migration::clock::MonotonicClock;
use migration::convergence::Costs;
use migration::disk::SourceDisk;
use migration::guest_io::GuestPages;
use migration::layout::{GuestRam, Layout, PAGE_SIZE};
use migration::link::Deadlines;
use migration::postcopy::Control;
use migration::progress::{Observer, Progress, Snapshot, Status};
use migration::section::Section;
use migration::snapshot;
use migration::source::{self, Guest, Job, Outcome, Peer};
use migration::throttle::Throttle;
use migration::uri::Uri;
use migration::vm::{Blob, Offer, Pause, SourceVm, VmError};
use tracing::{debug, error, warn};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::leaving_disk::{self, LeavingDisk};
use super::offer::{FileIdentity, INITRD, KERNEL, MovingMachine};
use super::write_limiter::WriteLimiter;
use super::{Shared, info};
use crate::control::command::{
    CommandError, CommandResult, Event, EventKind, MigrateRequest, MigrationInfo, RunState,
    StorageCopy,
};
use crate::kvm::DirtyLog;
use crate::machine::Machine;
use crate::machine::backends;

/// Why a migration ends with its process.
const ENDS: &str = "the source's process ends";

/// About as many bytes of state do the devices have, and each vCPU (with AVX-512).
const STATE_BYTES: u64 = 4 << 10;
/// Until a thread has heard that it is to do something, and has been heard.
const WAKING: Duration = Duration::from_micros(100);
/// Checking what has come, and loading it into the devices.
const DEVICES: Duration = Duration::from_micros(100);

/// See [`STATE_BYTES`].
const STATE_BYTES_PER_VCPU: u64 = 16 << 10;

/// A migration away from here, under way or over.
pub(super) struct Outgoing {
    cancel: Cancel,
    progress: Arc<Progress>,
    into_file: bool,
    /// `None` if it must not go over into post-copy.
    postcopy: Option<Control<Uri>>,
    thread: Option<JoinHandle<()>>,
}

impl Outgoing {
    /// Starts to migrate `guest` on a thread of its own; `postcopy`: it may go over into
    /// post-copy.
    pub(super) fn start(
        shared: Arc<Shared>,
        guest: Arc<Machine>,
        request: MigrateRequest,
        postcopy: bool,
    ) -> io::Result<Self> {
        let MigrateRequest { address, copy, .. } = request;
        let cancel = Cancel::new()?;
        let observer = StatusObserver(Arc::clone(&shared));
        let progress = Arc::new(Progress::new(
            Arc::new(MonotonicClock),
            Some(Box::new(observer)),
        ));
        let postcopy = postcopy.then(|| Control::new(Arc::clone(&progress)));
        let job = Job {
            cancel: cancel.clone(),
            parameters: Arc::clone(&shared.parameters),
            progress: Arc::clone(&progress),
            deadlines: Deadlines::default(),
            costs: costs(&guest),
            postcopy: postcopy.clone(),
        };
        let into_file = matches!(address, Uri::File(_));
        let thread = thread::Builder::new()
            .name("migration".to_owned())
            .spawn(move || {
                shared.settings.threads.begin_migration();
                let mut source = Source::new(shared, guest, copy, into_file);
                let outcome = match address {
                    Uri::File(path) => snapshot::save(&mut source, &path, &job),
                    uri => source::migrate(&mut source, Peer::Uri(uri), &job),
                };
                debug!(?outcome, "the migration has ended");
                if matches!(outcome, Outcome::Completed(_))
                    && job.progress.snapshot().postcopy.is_some()
                {
                    source.give_memory_back();
                }
                if let Outcome::Failed {
                    guest: Guest::Stuck(err),
                    ..
                }
                | Outcome::Cancelled {
                    guest: Guest::Stuck(err),
                    ..
                } = outcome
                {
                    error!("the guest can't run on after the migration failed: {err}");
                    let mut state = source.shared.state();
                    if state.run == RunState::FinishMigrate {
                        state.run = RunState::InternalError;
                    }
                }
            })?;
        Ok(Self {
            cancel,
            progress,
            into_file,
            postcopy,
            thread: Some(thread),
        })
    }

    /// Whether it is still under way.
    pub(super) fn is_running(&self) -> bool {
        // The engine leaves the guest alone from its last status on.
        !self.progress.status().is_over()
    }

    /// Whether the guest, which was handed over, is not for this side to run: it is at the
    /// destination, has ended there, or may be about to begin there.
    ///
    /// Recovery needs the instance's lock, so nothing that this says is over when it has said so.
    pub(super) fn guest_is_elsewhere(&self) -> bool {
        let paused = self.postcopy.as_ref().is_some_and(Control::is_paused);
        let Snapshot {
            status, postcopy, ..
        } = self.progress.snapshot();
        let confirmed = postcopy.is_some_and(|postcopy| postcopy.confirmed);
        match status {
            Status::Completed => !self.into_file,
            // If it has run there, what is here is old.
            Status::Failed => confirmed,
            status if status.is_over() => false,
            _ => confirmed || !paused,
        }
    }

    /// The guest runs on here: it was handed over, but never confirmed to have begun there. The
    /// destination does not get the rest of its memory any more.
    pub(super) fn take_back(&self) {
        if let Some(postcopy) = &self.postcopy {
            postcopy.end("the guest was taken back at the source with 'cont'");
        }
    }

    /// How it goes.
    pub(super) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Steers post-copy, if it may go over into that.
    pub(super) fn postcopy(&self) -> Option<&Control<Uri>> {
        self.postcopy.as_ref()
    }

    /// Whether the guest is in a file, from which anybody may load it.
    pub(super) fn guest_is_in_file(&self) -> bool {
        self.progress.status() == Status::Completed && self.into_file
    }

    /// Cancels it, if it is not over.
    pub(super) fn cancel(&self) -> CommandResult<()> {
        let status = self.progress.status();
        if status.is_over() {
            return Ok(());
        }
        if status.is_postcopy() {
            return Err(CommandError::generic(
                "Postcopy migration in progress, cannot cancel: the guest runs at the destination, \
                 and this process has only old memory of it",
            ));
        }
        self.cancel
            .cancel("cancelled by the user of the source")
            .map_err(|err| CommandError::generic(err.to_string()))
    }

    /// Cancels it because the process ends; returns its thread, to be waited for.
    pub(super) fn begin_shutdown(&mut self) -> Option<JoinHandle<()>> {
        // Too late means that it is nearly over.
        let _ = self.cancel.cancel(ENDS);
        if let Some(postcopy) = &self.postcopy {
            postcopy.end(ENDS);
        }
        self.thread.take()
    }

    /// What `query-migrate` shows.
    pub(super) fn info(&self) -> MigrationInfo {
        info::outgoing(&self.progress.snapshot())
    }
}

/// Tells the process's subscribers how the migration goes.
struct StatusObserver(Arc<Shared>);

impl Observer for StatusObserver {
    fn status_changed(&self, status: Status) {
        self.0.emit_of_migration(EventKind::Migration {
            status: info::status(status),
        });
    }

    fn pass_begun(&self, pass: u64) {
        self.0.emit_of_migration(EventKind::MigrationPass { pass });
    }
}

/// What to expect of the guest's hand-over, from the time that KVM takes here to tell a vCPU's state.
/// Its threads save and load them at the same time, as far as there are CPUs; one thread stops the vCPUs and
/// reads their clocks, and at the destination sets those and lets them run. How long that
/// takes compared with a state was measured with 1 to 16 vCPUs (docs/performance.md).
pub(super) fn costs(guest: &Machine) -> Costs {
    let vcpus = guest.config().vcpus;
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32);
    let states = guest.save_time() * vcpus.div_ceil(cpus);
    let one_by_one = guest.save_time() * vcpus;
    Costs {
        pause: WAKING + one_by_one * 3 / 4,
        save: WAKING + states,
        state_bytes: STATE_BYTES + STATE_BYTES_PER_VCPU * u64::from(vcpus),
        load: WAKING + DEVICES + states + one_by_one,
        start: WAKING + one_by_one / 4,
        ..Costs::default()
    }
}

/// The engine's view of the guest.
pub(super) struct Source {
    shared: Arc<Shared>,
    guest: Arc<Machine>,
    copy: StorageCopy,
    /// The disks that travel, in the order of the offer.
    leaving: Vec<Arc<dyn SourceDisk>>,
    log: Option<DirtyLog>,
    /// Whether the guest goes into a file, and may run on here.
    into_file: bool,
    /// The run state before the guest was stopped.
    before: RunState,
    /// That it was, if nobody has been told yet.
    untold_stop: Option<Event>,
    /// Whether the guest is elsewhere.
    gone: bool,
}

impl SourceVm for Source {
    fn offer(&mut self) -> Result<Offer, VmError> {
        let guest = &self.guest;
        let files = guest.files().ok_or(NO_FILES)?;
        let mut identities = vec![FileIdentity::of(KERNEL, &files.kernel)?];
        if let Some(initrd) = &files.initrd {
            identities.push(FileIdentity::of(INITRD, initrd)?);
        }
        let blobs = identities
            .iter()
            .map(|file| Blob {
                name: file.name.clone(),
                len: file.len,
            })
            .collect();
        let moving = leaving_disk::leaving(guest.disks(), self.copy)?;
        let mut disks = Vec::new();
        for moving in &moving {
            let find = |disk: &&Arc<Disk>| disk.id() == moving.id;
            let disk = guest.disks().iter().find(find).ok_or("a disk is gone")?;
            disks.push(migration::disk::Disk {
                name: moving.id.clone(),
                capacity: disk.image().capacity(),
            });
            let incremental = moving.backing.is_some();
            let leaving = LeavingDisk::new(Arc::clone(disk), incremental);
            self.leaving.push(Arc::new(leaving));
        }
        let machine = MovingMachine {
            name: self.shared.state().name.clone(),
            config: guest.config().clone(),
            devices: guest.devices().inventory(),
            files: identities,
            cpu: guest.cpu().clone(),
            disks: moving,
        };
        Ok(Offer {
            layout: Layout::of(guest.ram())?,
            configuration: machine.to_sections()?,
            blobs,
            disks,
        })
    }

    fn open_blob(&mut self, index: usize) -> Result<Box<dyn Read + Send>, VmError> {
        let files = self.guest.files().ok_or(NO_FILES)?;
        let file = match (index, &files.initrd) {
            (0, _) => &files.kernel,
            (1, Some(initrd)) => initrd,
            _ => return Err(format!("there is no blob {index}").into()),
        };
        Ok(Box::new(FromStart {
            file: file.try_clone()?,
            offset: 0,
        }))
    }

    fn open_disk(&mut self, index: usize) -> Result<Arc<dyn SourceDisk>, VmError> {
        let disk = self.leaving.get(index);
        Ok(Arc::clone(disk.ok_or("there is no such disk")?))
    }

    fn ram(&self) -> GuestRam {
        self.guest.ram().clone()
    }

    fn start_dirty_log(&mut self) -> Result<(), VmError> {
        // There is one log.
        let lender = {
            let mut state = self.shared.state();
            if let Some(rate) = &mut state.dirty_rate {
                rate.end();
            }
            state.log_in_use = true;
            state.write_limiter.as_ref().map(WriteLimiter::lender)
        };
        // Not under the lock: it may be read just now.
        if let Some(lender) = lender {
            lender.lend();
        }
        let started = self.start_log();
        if started.is_err() {
            self.stop_dirty_log();
        }
        started
    }

    fn free_pages(&mut self) -> Vec<PageRun> {
        let Some(balloon) = self.guest.devices().balloon() else {
            return Vec::new();
        };
        let hints = balloon.take_hints();
        if !hints.is_empty() {
            let bytes: u64 = hints.iter().map(|hint| hint.len).sum();
            debug!(hints = hints.len(), bytes, "the guest has free pages");
        }
        hints
            .iter()
            .flat_map(|hint| page_runs(self.guest.ram(), hint))
            .collect()
    }

    fn prepare_release(&mut self) -> Result<(), VmError> {
        Ok(backends::flush(self.guest.disks())?)
    }

    fn harvest_dirty(&mut self, dirty: &mut PageBitmap) -> Result<(), VmError> {
        self.stop_hints();
        let log = self.log.as_mut().ok_or(LOG_IS_OFF)?;
        Ok(log.harvest(self.guest.vm(), dirty)?)
    }

    fn protect(&mut self, dirty: &PageBitmap, first: u64, count: u64) -> Result<(), VmError> {
        let log = self.log.as_mut().ok_or(LOG_IS_OFF)?;
        Ok(log.protect(self.guest.vm(), dirty, first, count)?)
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<(), VmError> {
        self.guest.throttle(throttle);
        Ok(())
    }

    fn pause(&mut self, brief: bool) -> Result<Pause, VmError> {
        let mut state = self.shared.state();
        // From here on it is the destination that tells the network.
        state.announcement = None;
        // A reset that the guest has asked for is done here first, and may let it run again.
        let last_instruction = loop {
            let last = self.guest.pause();
            if !self.shared.handle_guest_events(&mut state) {
                break last;
            }
        };
        match state.run {
            RunState::Running
            | RunState::Paused
            | RunState::Prelaunch
            | RunState::IoError
            | RunState::Debug => {}
            run => return Err(format!("the guest has stopped by itself (state '{run}')").into()),
        }
        // It goes on while the last pages are sent.
        self.guest.begin_save();
        self.before = state.run;
        let was_running = state.run == RunState::Running;
        state.run = RunState::FinishMigrate;
        drop(state);
        self.untold_stop = was_running.then(|| Event::now(EventKind::Stop));
        if !brief {
            self.tell_stop();
        }
        Ok(Pause {
            was_running,
            last_instruction,
        })
    }

    fn save(&mut self) -> Result<Vec<Section>, VmError> {
        Ok(self.guest.save()?)
    }

    fn release(&mut self) -> Result<(), VmError> {
        Ok(backends::unlock(self.guest.disks())?)
    }

    fn resume(&mut self, pause: Pause) -> Result<(), VmError> {
        self.tell_stop();
        let mut state = self.shared.state();
        if let Err(error) = backends::lock(self.guest.disks()) {
            // Somebody else writes to them: `cont` tries again.
            state.run = RunState::Paused;
            return Err(error.into());
        }
        if pause.was_running {
            self.guest.run_on()?;
            state.set_running(&self.shared);
        } else {
            state.run = self.before;
        }
        Ok(())
    }

    fn handed_over(&mut self) {
        self.tell_stop();
        self.shared.state().run = RunState::Postmigrate;
        self.gone = !self.into_file;
    }

    fn stop_dirty_log(&mut self) {
        self.stop_hints();
        let Some(mut log) = self.log.take() else {
            return;
        };
        // A guest that is gone for good never writes here again, and switching the log off takes
        // milliseconds of a CPU, on which it may just begin to run: if it went to this host.
        if !self.gone {
            log.stop(self.guest.vm());
        }
        let mut state = self.shared.state();
        state.log_in_use = false;
        if let Some(limiter) = &state.write_limiter {
            limiter.lender().give_back();
        }
    }
}

impl Source {
    pub(super) fn new(
        shared: Arc<Shared>,
        guest: Arc<Machine>,
        copy: StorageCopy,
        into_file: bool,
    ) -> Self {
        Self {
            shared,
            guest,
            copy,
            leaving: Vec::new(),
            log: None,
            into_file,
            before: RunState::Running,
            untold_stop: None,
            gone: false,
        }
    }

    fn tell_stop(&mut self) {
        if let Some(stop) = self.untold_stop.take() {
            self.shared.emit_event(stop);
        }
    }

    /// Gives the guest's memory back to the host: all of it is at the destination, or the guest has
    /// ended there. The engine has let go of it, vCPUs and devices stand still, and no command lets
    /// them run or reads memory from here on: they are refused in the state `postmigrate` if the
    /// guest [is elsewhere](Outgoing::guest_is_elsewhere). Not under the lock, as it takes a while.
    fn give_memory_back(&self) {
        let pages = GuestPages::new(self.guest.ram().clone()).map_err(VmError::from);
        match pages.and_then(|pages| Ok(pages.discard_all()?)) {
            Ok(()) => debug!("the host has the guest's memory back"),
            Err(err) => warn!("the guest has moved, but its memory stays in use here: {err}"),
        }
    }

    fn start_log(&mut self) -> Result<(), VmError> {
        let mut log = self.guest.vm().dirty_log()?;
        log.start(self.guest.vm())?;
        self.log = Some(log);
        self.start_hints()
    }

    /// Asks the guest for pages that need not be sent, if it gives such.
    fn start_hints(&mut self) -> Result<(), VmError> {
        let (Some(log), Some(balloon)) = (&mut self.log, self.guest.devices().balloon()) else {
            return Ok(());
        };
        if balloon.gives_hints() {
            // Armed for all of the RAM before the guest is asked: see `hints` of the balloon.
            let pages = Layout::of(self.guest.ram())?.pages();
            let all = PageBitmap::full(pages);
            for first in (0..pages).step_by(ARM_PAGES as usize) {
                log.protect(self.guest.vm(), &all, first, ARM_PAGES.min(pages - first))?;
            }
            balloon.start_hints();
        }
        Ok(())
    }

    fn stop_hints(&self) {
        if let Some(balloon) = self.guest.devices().balloon() {
            balloon.stop_hints();
        }
    }
}

/// The numbers of free pages, which may lie in more than one region.
fn page_runs(ram: &GuestRam, free: &FreePages) -> Vec<PageRun> {
    let mut runs = Vec::new();
    let mut first = 0;
    for region in ram.iter() {
        let start = region.start_addr().0;
        let from = free.address.max(start);
        let to = (free.address + free.len).min(start + region.len());
        if from < to {
            runs.push(PageRun {
                first: first + (from - start) / PAGE_SIZE,
                count: (to - from) / PAGE_SIZE,
            });
        }
        first += region.len() / PAGE_SIZE;
    }
    runs
}

/// How many pages of the log are armed at a time for hints: 1 GiB. KVM holds up page faults
/// meanwhile.
pub(super) const ARM_PAGES: u64 = 1 << 18;

const LOG_IS_OFF: &str = "the dirty log is off";
const NO_FILES: &str = "the machine has no kernel";

/// Reads a file from its start without moving its position, which other users may rely on.
struct FromStart {
    file: File,
    offset: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}
