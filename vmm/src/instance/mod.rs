//! One `ferry` process: at most one guest, its run state, and the migrations that bring it and
//! take it away.
//!
//! [`Instance`] implements the commands ([`Control`]). [`outgoing`] and [`incoming`] are the two
//! halves of a migration, each on a thread of its own.
//!
//! There is one lock, on [`State`]. It is held for short, bounded work only: pausing the vCPUs is
//! the longest. Nobody waits for a peer under it.

mod announce;
mod arriving;
mod arriving_disk;
mod commands;
mod convergence;
mod dirty_rate;
mod forecast;
mod guest_events;
mod incoming;
mod info;
mod leaving_disk;
mod migrations;
mod network;
mod offer;
mod outgoing;
mod postcopy;
mod ready_memory;
mod snapshots;
mod vcpu_dirty_limit;
mod write_limiter;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::image::Image;
use devices::virtio::blk::errors::ErrorSink;
use devices::virtio::net::tap::Tap;
use migration::uri::Uri;
use tokio::sync::{Notify, broadcast, watch};
use tracing::{error, info};

use self::announce::Announcement;
use self::dirty_rate::DirtyRate;
use self::guest_events::GuestEvents;
pub use self::incoming::WaitError;

use self::incoming::Incoming;
use self::outgoing::Outgoing;
use self::ready_memory::ReadyMemory;
use self::snapshots::SnapshotJob;
use self::write_limiter::WriteLimiter;
use crate::affinity::Threads;
use crate::console::{Console, SerialInput};
use crate::control::command::{
    AnnounceParameters, Capabilities, Event, EventKind, RunState, ShutdownCause,
};
use crate::cpuid::GuestCpu;
use crate::kvm::Kvm;
use crate::machine::backends::{self, BackendError, Backends};
use crate::machine::config::{Given, MachineConfig};
use crate::machine::{BootFiles, Machine, MachineError};
use crate::vcpu::EventSink;

/// How many events a subscriber may lag behind.
const EVENT_BACKLOG: usize = 1024;

/// The least time between two BALLOON_CHANGE events.
const BALLOON_EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// How a process behaves, beside what its machine is made of.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The guest's name, as shown.
    pub name: Option<String>,
    /// What the command line says about the machine.
    pub given: Given,
    /// Where threads run.
    pub threads: Threads,
    /// Don't run the guest until `cont`.
    pub paused: bool,
    /// A reset by the guest ends the process instead.
    pub no_reboot: bool,
    /// A power-off by the guest stops the guest only.
    pub no_shutdown: bool,
}

/// How the process is to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// All is well.
    Success,
    /// With this message, and a status that is not zero.
    Failure(String),
}

/// A `ferry` process.
#[derive(Clone)]
pub struct Instance(Arc<Shared>);

struct Shared {
    settings: Settings,
    kvm: Kvm,
    console: Arc<Console>,
    /// The host's end of the virtio console, if it was given.
    virtio_console: Option<Arc<Console>>,
    /// Memory for a guest that is waited for.
    memory: ReadyMemory,
    state: Mutex<State>,
    guest_events: Arc<GuestEvents>,
    /// The guest has changed its balloon's size.
    balloon_changed: Arc<Notify>,
    events: broadcast::Sender<Event>,
    parameters: Arc<migration::parameters::Parameters>,
    exit: watch::Sender<Option<Exit>>,
}

struct State {
    run: RunState,
    /// The name that came with a guest, if none was given here.
    name: Option<String>,
    /// The guest, once it is here. It stays after it has moved away, until the process ends.
    guest: Option<Arc<Machine>>,
    /// The migration away from here that is under way, or else the last one.
    outgoing: Option<Outgoing>,
    /// The migration to here, for a process that was started with `--incoming`.
    incoming: Option<Incoming>,
    /// The measuring of what the guest writes, under way or the last.
    dirty_rate: Option<DirtyRate>,
    /// Holds vCPUs to their limits, if there are any.
    write_limiter: Option<WriteLimiter>,
    /// A migration, or the saving of a snapshot, uses the guest's dirty log.
    log_in_use: bool,
    /// The work on a snapshot that is under way.
    snapshot: Option<SnapshotJob>,
    /// How a guest that has arrived is announced to the network.
    announce: AnnounceParameters,
    /// The announcement under way, or the last one.
    announcement: Option<Announcement>,
    /// Whether an arriving guest is to run.
    autostart: bool,
    /// What migrations may do.
    capabilities: Capabilities,
    /// A reset that waits until all of the guest's memory has come.
    awaited_reset: Option<ShutdownCause>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emit(&self, kind: EventKind) {
        self.emit_event(Event::now(kind));
    }

    /// The same of something that happened a moment ago.
    fn emit_event(&self, event: Event) {
        // Without a subscriber there is nobody to tell.
        let _ = self.events.send(event);
    }

    /// Opens what the command line says about the host's side of the devices.
    fn open_backends(&self) -> Result<Backends, BackendError> {
        let errors = Arc::clone(&self.guest_events) as Arc<dyn ErrorSink>;
        Backends::open(&self.settings.given, errors)
    }

    /// The same for a guest that arrives, where `arriving` opens the images that come with it, and
    /// `taps` are those that are open here already.
    fn open_backends_for(
        &self,
        arriving: impl FnMut(&str) -> Option<Image>,
        taps: &[Arc<Tap>],
    ) -> Result<Backends, BackendError> {
        let errors = Arc::clone(&self.guest_events) as Arc<dyn ErrorSink>;
        Backends::open_for(&self.settings.given, errors, arriving, taps)
    }

    /// Builds a machine, for a guest that has `seen` its processor already if it arrives.
    fn build(
        &self,
        config: MachineConfig,
        seen: Option<&GuestCpu>,
        mut backends: Backends,
    ) -> Result<Arc<Machine>, MachineError> {
        backends.console = self.virtio_console.clone();
        let threads = &self.settings.threads;
        threads.check_vcpus(config.vcpus)?;
        let backing = &self.settings.given.backing;
        let ram = self.memory.take(config.memory, backing)?;
        let events = Arc::clone(&self.guest_events) as Arc<dyn EventSink>;
        // A guest that arrives is built on a thread of its migration.
        let machine = threads.starting_io(|| {
            Machine::new(
                &self.kvm,
                config,
                ram,
                seen,
                &self.console,
                backends,
                &events,
            )
        })?;
        for cpu in machine.cpus() {
            threads.put_vcpu(cpu.index, cpu.thread_id)?;
        }
        Ok(Arc::new(machine))
    }

    /// Makes the machine this process's guest: it gets the console's input.
    fn install(&self, state: &mut State, machine: Arc<Machine>) {
        self.console
            .connect_guest(Arc::clone(machine.devices()) as Arc<dyn SerialInput>);
        if let (Some(host), Some(input)) = (&self.virtio_console, machine.devices().console_input())
        {
            host.connect_guest(input);
        }
        if let Some(balloon) = machine.devices().balloon() {
            let changed = Arc::clone(&self.balloon_changed);
            balloon.on_change(Box::new(move || changed.notify_one()));
        }
        state.move_write_limits(&machine);
        state.guest = Some(machine);
    }

    /// Tells of a migration, if the capability `events` is on.
    fn emit_of_migration(&self, kind: EventKind) {
        if self.state().capabilities.events {
            self.emit(kind);
        }
    }

    /// Ends the process; the first reason counts.
    fn exit(&self, cause: ShutdownCause, exit: Exit) {
        self.exit.send_if_modified(|current| {
            if current.is_some() {
                return false;
            }
            self.emit(EventKind::shutdown(cause));
            *current = Some(exit);
            true
        });
    }
}

impl State {
    /// Lets the guest run.
    fn run_guest(&mut self, shared: &Shared) -> Result<(), MachineError> {
        if let Some(guest) = &self.guest {
            // Until then there is nothing to run.
            if self.awaited_reset.is_none() {
                guest.run()?;
            }
            self.set_running(shared);
        }
        Ok(())
    }

    fn set_running(&mut self, shared: &Shared) {
        self.run = RunState::Running;
        shared.emit(EventKind::Resume);
    }

    /// Stops the guest if it runs; the run state becomes `run`.
    fn stop_guest(&mut self, shared: &Shared, run: RunState) {
        if self.run == RunState::Running {
            self.still_guest();
            shared.emit(EventKind::Stop);
        }
        self.run = run;
    }
}

impl Instance {
    /// A process without a guest yet: follow with [`boot`](Self::boot) or
    /// [`wait_for_guest`](Self::wait_for_guest).
    pub fn new(
        settings: Settings,
        kvm: Kvm,
        console: Arc<Console>,
        virtio_console: Option<Arc<Console>>,
    ) -> Self {
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let (exit, _) = watch::channel(None);
        let state = State {
            run: RunState::Prelaunch,
            name: settings.name.clone(),
            guest: None,
            outgoing: None,
            incoming: None,
            dirty_rate: None,
            write_limiter: None,
            log_in_use: false,
            snapshot: None,
            announce: AnnounceParameters::default(),
            announcement: None,
            autostart: !settings.paused,
            capabilities: Capabilities::default(),
            awaited_reset: None,
        };
        Self(Arc::new(Shared {
            settings,
            kvm,
            console,
            virtio_console,
            memory: ReadyMemory::default(),
            state: Mutex::new(state),
            guest_events: Arc::default(),
            balloon_changed: Arc::default(),
            events,
            parameters: Arc::default(),
            exit,
        }))
    }

    /// Builds the machine of the command line, loads its kernel, and runs it unless it is to be
    /// paused.
    pub fn boot(&self, files: BootFiles) -> Result<(), MachineError> {
        let shared = &*self.0;
        let given = &shared.settings.given;
        let backends = shared.open_backends()?;
        // Before anything is read of them.
        backends::lock(backends.disks())?;
        let machine = shared.build(given.configuration(&backends), None, backends)?;
        machine.set_files(files);
        machine.boot()?;
        let mut state = shared.state();
        shared.install(&mut state, machine);
        if state.autostart {
            state.run_guest(shared)?;
        }
        Ok(())
    }

    /// Resolves when the process is to end.
    pub async fn ended(&self) -> Exit {
        let mut exit = self.0.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(Exit::Success),
            Err(_) => Exit::Success,
        }
    }

    /// Does what guests' own resets and power-offs ask for, as they come, and tells of their
    /// balloons. Never returns.
    pub async fn serve_guest_events(&self) {
        tokio::join!(self.serve_vcpu_events(), self.tell_balloon_changes());
    }

    /// A guest could fill the events' queue: they come once a second at most, as in QEMU.
    async fn tell_balloon_changes(&self) {
        loop {
            self.0.balloon_changed.notified().await;
            let guest = self.0.state().guest.clone();
            if let Some(balloon) = guest.as_ref().and_then(|guest| guest.devices().balloon()) {
                let actual = balloon.actual();
                self.0.emit(EventKind::BalloonChange { actual });
            }
            tokio::time::sleep(BALLOON_EVENT_INTERVAL).await;
        }
    }

    async fn serve_vcpu_events(&self) {
        loop {
            self.0.guest_events.arrived().await;
            let mut state = self.0.state();
            self.0.handle_guest_events(&mut state);
        }
    }

    /// Stops everything before the process ends: migrations under way are cancelled, the guest is
    /// stopped.
    pub fn shut_down(&self) {
        let shared = &*self.0;
        let threads = {
            let mut state = shared.state();
            // Before the memory that it waits for is given up, and reads as zero.
            if state.memory_missing().is_some() {
                state.still_guest();
            }
            if let Some(incoming) = &state.incoming
                && state.run == RunState::Shutdown
            {
                incoming.guest_ended("it has shut down, and its process ends");
            }
            let outgoing = state.outgoing.as_mut().and_then(Outgoing::begin_shutdown);
            let incoming = state.incoming.as_mut().and_then(Incoming::begin_shutdown);
            let snapshot = state.snapshot.as_mut();
            let snapshot = snapshot.and_then(SnapshotJob::begin_shutdown);
            [outgoing, incoming, snapshot]
        };
        // Not under the lock: they need it to end.
        for thread in threads.into_iter().flatten() {
            if thread.join().is_err() {
                error!("a thread of a migration or a snapshot panicked");
            }
        }
        let mut state = shared.state();
        state.announcement = None;
        state.write_limiter = None;
        if let Some(guest) = &state.guest
            && state.still_guest_to_end()
        {
            // What the guest has not flushed is not lost with the process.
            if let Err(error) = backends::unlock(guest.disks()) {
                error!("{error}");
            }
        }
        info!("the process ends");
    }

    /// Waits for a guest at `address`, or loads it from there if it is a file, or waits for `migrate-incoming` to say where. Its
    /// memory is there before, if it is to be preallocated and its size is known. `exit_on_error` as in QEMU: a migration that fails ends the process.
    pub fn wait_for_guest(
        &self,
        address: Option<&Uri>,
        exit_on_error: bool,
    ) -> Result<(), WaitError> {
        let given = &self.0.settings.given;
        self.0.memory.prepare(given.memory, &given.backing)?;
        let mut state = self.0.state();
        state.run = RunState::Inmigrate;
        if let Some(address) = address {
            let incoming = Incoming::listen(Arc::clone(&self.0), address, exit_on_error)?;
            state.incoming = Some(incoming);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
