//! The destination's half of a migration: listening for a source, or opening a file.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use migration::cancel::Cancel;
use migration::clock::MonotonicClock;
use migration::destination::{self, Job};
use migration::link::Deadlines;
use migration::listener::{ListenError, Listener};
use migration::postcopy::{self, Control};
use migration::progress::{Observer, Progress, Status};
use migration::snapshot::{self, Snapshot, SnapshotError};
use migration::uri::Uri;
use tracing::{error, info};

use super::arriving::Destination;
use crate::memory::MemoryError;

use super::{Exit, Shared, info as show};
use crate::control::command::{EventKind, MigrationInfo, ShutdownCause};

/// Why no guest can be waited for.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// None can come.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// None is in the file.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// There is no room for one.
    #[error("cannot wait for a guest: {0}")]
    Memory(#[from] MemoryError),
    /// No thread.
    #[error("cannot wait for a guest: {0}")]
    Start(#[from] io::Error),
}

/// Why a migration that is paused in post-copy can't go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecoverError {
    /// It isn't paused, or can't be broken again.
    #[error(transparent)]
    Postcopy(#[from] postcopy::RecoverError),
    /// Its source can't come.
    #[error(transparent)]
    Listen(#[from] ListenError),
}

/// Why a migration ends with its process.
const ENDS: &str = "the destination's process ends";

/// Where a guest comes from.
enum Origin {
    Listener(Listener),
    File(Snapshot),
}

/// A process that waits for a guest, receives one, or has received it.
pub(super) struct Incoming {
    uri: Uri,
    cancel: Cancel,
    progress: Arc<Mutex<Arc<Progress>>>,
    /// Set when a source has come, if the migration may go over into post-copy.
    postcopy: Arc<OnceLock<Control<Listener>>>,
    thread: Option<JoinHandle<()>>,
}

impl Incoming {
    /// Listens for a source, or begins to load from a file. If `exit_on_error`, a migration that fails ends the process, as in
    /// QEMU; otherwise another address can be given.
    pub(super) fn listen(
        shared: Arc<Shared>,
        uri: &Uri,
        exit_on_error: bool,
    ) -> Result<Self, WaitError> {
        let (origin, uri) = match uri {
            Uri::File(path) => {
                let snapshot = Snapshot::open(path)?;
                info!(%uri, "loading a guest");
                (Origin::File(snapshot), uri.clone())
            }
            uri => {
                let listener = Listener::bind(uri)?;
                let uri = listener.uri().clone();
                info!(%uri, "waiting for a guest");
                (Origin::Listener(listener), uri)
            }
        };
        let cancel = Cancel::new()?;
        let progress = Arc::new(Mutex::new(new_progress(&shared)));
        let postcopy = Arc::new(OnceLock::new());
        let receiver = Receiver {
            shared,
            cancel: cancel.clone(),
            progress: Arc::clone(&progress),
            postcopy: Arc::clone(&postcopy),
            exit_on_error,
        };
        let thread = thread::Builder::new()
            .name("incoming".to_owned())
            .spawn(move || receiver.run(origin))?;
        Ok(Self {
            uri,
            cancel,
            progress,
            postcopy,
            thread: Some(thread),
        })
    }

    /// Whether a guest can still come, or is coming. Once a migration has failed none can, though
    /// the thread may still be taking leave of its source.
    pub(super) fn is_listening(&self) -> bool {
        !self.progress().status().is_over()
            && self
                .thread
                .as_ref()
                .is_some_and(|thread| !thread.is_finished())
    }

    /// How it goes.
    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the listening, and an arrival that has not come to GO; returns the thread, to be
    /// waited for.
    pub(super) fn begin_shutdown(&mut self) -> Option<JoinHandle<()>> {
        // Too late means that it is nearly over.
        let _ = self.cancel.cancel(ENDS);
        if let Some(postcopy) = self.postcopy() {
            postcopy.end(ENDS);
        }
        self.thread.take()
    }

    /// Steers post-copy, once a source has come with which it is possible.
    pub(super) fn postcopy(&self) -> Option<&Control<Listener>> {
        self.postcopy.get()
    }

    /// The guest has ended: nobody waits for its memory any more.
    pub(super) fn guest_ended(&self, reason: &str) {
        if let Some(postcopy) = self.postcopy() {
            postcopy.guest_ended(reason);
        }
    }

    /// Waits at another address for the source of a migration that is paused in post-copy.
    pub(super) fn recover(&mut self, uri: &Uri) -> Result<(), RecoverError> {
        let paused = |postcopy: &&Control<Listener>| postcopy.is_recoverable();
        let postcopy = self.postcopy().filter(paused);
        let postcopy = postcopy.ok_or(postcopy::RecoverError::NotPaused)?;
        let listener = Listener::bind(uri)?;
        let uri = listener.uri().clone();
        postcopy.recover(listener)?;
        info!(%uri, "waiting for the source");
        self.uri = uri;
        Ok(())
    }

    /// What `query-migrate` shows.
    pub(super) fn info(&self) -> MigrationInfo {
        show::incoming(&self.progress().snapshot(), &self.uri)
    }
}

fn new_progress(shared: &Arc<Shared>) -> Arc<Progress> {
    let observer = StatusObserver(Arc::clone(shared));
    Arc::new(Progress::new(
        Arc::new(MonotonicClock),
        Some(Box::new(observer)),
    ))
}

/// Tells the process's subscribers how the migration goes.
struct StatusObserver(Arc<Shared>);

impl Observer for StatusObserver {
    fn status_changed(&self, status: Status) {
        self.0.emit_of_migration(EventKind::Migration {
            status: show::status(status),
        });
        if status.is_over() {
            self.0.guest_events.memory_came();
        }
    }
}

/// The thread that listens and receives.
struct Receiver {
    shared: Arc<Shared>,
    cancel: Cancel,
    progress: Arc<Mutex<Arc<Progress>>>,
    postcopy: Arc<OnceLock<Control<Listener>>>,
    exit_on_error: bool,
}

impl Receiver {
    fn run(self, origin: Origin) {
        self.shared.settings.threads.begin_migration();
        let progress = Arc::clone(&self.progress.lock().unwrap_or_else(PoisonError::into_inner));
        let mut job = Job {
            cancel: self.cancel.clone(),
            progress,
            deadlines: Deadlines::default(),
            postcopy: None,
        };
        let mut destination = Destination::new(Arc::clone(&self.shared));
        let arrived = match origin {
            Origin::Listener(mut listener) => {
                let incoming = match listener.accept(&self.cancel, &job.deadlines) {
                    Ok(incoming) => incoming,
                    Err(ListenError::Cancelled(_)) => return,
                    Err(err) => return self.fail(&format!("cannot wait for a guest: {err}")),
                };
                info!(peer = incoming.peer(), "a guest arrives");
                // Only now: until a source comes it can be switched on and off.
                if self.shared.state().capabilities.postcopy_ram {
                    let control = || Control::new(Arc::clone(&job.progress));
                    job.postcopy = Some(self.postcopy.get_or_init(control).clone());
                }
                destination::receive(&mut destination, incoming, Some(listener), &job)
                    .map_err(|err| format!("the migration failed: {err}"))
            }
            Origin::File(snapshot) => snapshot::load(&mut destination, snapshot, &job)
                .map_err(|err| format!("the guest could not be loaded: {err}")),
        };
        match arrived {
            Ok(arrival) => {
                let stopped_ms = arrival.start.stopped_for.as_secs_f64() * 1e3;
                info!(
                    stopped_ms,
                    runs = arrival.start.run,
                    "the guest has arrived"
                );
                // Nothing that the guest came with is kept for that.
                drop(destination);
                if let Some(unconfirmed) = arrival.unconfirmed {
                    unconfirmed.serve();
                }
            }
            Err(reason) => self.fail(&reason),
        }
    }

    fn fail(&self, reason: &str) {
        self.shared.state().lose_guest(&self.shared);
        if self.exit_on_error {
            self.shared
                .exit(ShutdownCause::HostError, Exit::Failure(reason.to_owned()));
        } else {
            error!("{reason}");
        }
    }
}
