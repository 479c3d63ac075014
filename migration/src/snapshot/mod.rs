//! Snapshots: a guest in a file, saved while it runs and loaded by another process.
//!
//! To the engine a file is a peer: [`save`] runs the ordinary source, and [`load`] the ordinary
//! destination, over a socket pair whose other end is the file, on a thread of its own. So the
//! rounds, the pacing, the numbers, cancelling, the order of the hand-over and all checks of what
//! arrives are those of a live migration. What the words mean for a file: SYNC-ACK says that what
//! came is on the disk, but for a little; READY, that all is but the header; GO adds the header
//! and gives the file its name; RUNNING, that it is there to stay.

mod error;
mod format;
mod reader;
mod receive;
mod send;
mod writer;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub use self::error::{SnapshotError, TransferError};
pub use self::format::{MAGIC, VERSION};
pub use self::reader::Snapshot;

use crate::cancel::Cancel;
use crate::connect::ConnectError;
use crate::destination::{self, Arrival, DestinationError};
use crate::link::Deadlines;
use crate::listener::Incoming;
use crate::progress::Status;
use crate::source::{self, Guest, Outcome, Peer, SourceError};
use crate::uri::Uri;
use crate::vm::{DestinationVm, SourceVm};

/// How long one side waits for a disk: nobody else is to be found at the other end.
const PATIENCE: Duration = Duration::from_secs(300);

/// The job's deadlines, but with patience for a slow disk.
fn patient(deadlines: &Deadlines) -> Deadlines {
    Deadlines {
        progress: PATIENCE,
        stop_margin: PATIENCE,
        go: PATIENCE,
        running: PATIENCE,
        ..deadlines.clone()
    }
}

/// Saves the guest of `vm` into a file at `path`, replacing what is there only once the new one is
/// whole. On success the guest is stopped here, as after any migration; otherwise it goes on, and
/// the new file is gone when this returns.
pub fn save(vm: &mut dyn SourceVm, path: &Path, job: &source::Job) -> Outcome {
    let job = source::Job {
        deadlines: patient(&job.deadlines),
        ..job.clone()
    };
    let begin = || {
        let (here, there) = UnixStream::pair()?;
        let (path, deadlines) = (path.to_owned(), job.deadlines.clone());
        let clock = Arc::clone(job.progress.clock());
        let thread = thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(move || receive::run(&path, there.into(), &deadlines, clock))?;
        Ok((here, thread))
    };
    let (stream, thread) = match begin() {
        Ok(begun) => begun,
        Err(error) => {
            let error = SourceError::Connect(ConnectError::Refused {
                uri: Uri::File(path.to_owned()),
                error,
            });
            job.progress.set_status(Status::Setup);
            job.progress
                .update(|snapshot| snapshot.error = Some(error.to_string()));
            job.progress.set_status(Status::Failed);
            let guest = Guest::Untouched;
            return Outcome::Failed { error, guest };
        }
    };
    let outcome = source::migrate(vm, Peer::Connected(stream.into()), &job);
    if thread.join().is_err() {
        tracing::error!("the thread that writes the snapshot panicked");
    }
    outcome
}

/// Loads the guest of `snapshot` into `vm`, as [`destination::receive`] does from a connection:
/// it runs if it ran when it was saved. The time in between is not told to it: its clocks go on
/// where they stopped.
pub fn load(
    vm: &mut dyn DestinationVm,
    snapshot: Snapshot,
    job: &destination::Job,
) -> Result<Arrival, LoadError> {
    let job = destination::Job {
        deadlines: patient(&job.deadlines),
        ..job.clone()
    };
    let (here, there) = UnixStream::pair().map_err(TransferError::Begin)?;
    let thread = thread::Builder::new().name("snapshot".to_owned()).spawn({
        let deadlines = job.deadlines.clone();
        let clock = Arc::clone(job.progress.clock());
        move || send::run(&snapshot, there.into(), &deadlines, clock)
    });
    let thread = thread.map_err(TransferError::Begin)?;
    let result = Incoming::from_stream(here.into(), &job.cancel, &job.deadlines)
        .map_err(|error| LoadError::File(error.into()))
        .and_then(|incoming| Ok(destination::receive(vm, incoming, None, &job)?));
    match (result, thread.join()) {
        (Ok(arrival), _) => Ok(arrival),
        // What the file's end knows says more than what it told.
        (Err(_), Ok(Err(TransferError::Snapshot(error)))) => Err(LoadError::File(error.into())),
        (Err(error), _) => Err(error),
    }
}

/// Why a guest could not be loaded. It has not run here and never will.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file, or the way from it.
    #[error(transparent)]
    File(#[from] TransferError),
    /// The machine that it was to be loaded into.
    #[error(transparent)]
    Machine(#[from] DestinationError),
}

/// A cancel that nobody uses: the engine's end is cancelled, and then closes the connection.
fn never() -> Result<Cancel, TransferError> {
    Cancel::new().map_err(TransferError::Begin)
}
