//! The source: from the offer to the hand-over. See docs/design.md for who may run the guest when.

pub(crate) mod channels;
mod convergence;
mod disks;
mod late;
mod precopy;
mod switchover;

use std::sync::Arc;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};

use self::convergence::Pressure;
use self::late::{Late, LateEnd};
use crate::blocks::{BlocksError, Disks};
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::codec::DecodeError;
use crate::connect::{ConnectError, connect};
use crate::convergence::Costs;
use crate::disk::SourceDisk;
use crate::frame::Kind;
use crate::guest_io::{GuestPages, MemoryError};
use crate::link::{Deadlines, Link, LinkError, Stream};
use crate::message::{GoneCause, Id, encode_reason};
use crate::parameters::Parameters;
use crate::postcopy::Control;
use crate::progress::{self, Downtime, Progress, Status};
use crate::read_ahead::ReadError;
use crate::rounds::{Memory, PassError};
use crate::session::Session;
use crate::uri::Uri;
use crate::vm::{Pause, SourceVm, VmError};

/// Where the migration goes.
#[derive(Debug)]
pub enum Peer {
    /// To be connected to.
    Uri(Uri),
    /// Connected already.
    Connected(Stream),
}

/// What a migration needs beside the machine.
#[derive(Clone, Debug)]
pub struct Job {
    /// Ends it early.
    pub cancel: Cancel,
    /// May change while it runs.
    pub parameters: Arc<Parameters>,
    /// Where it tells how it goes.
    pub progress: Arc<Progress>,
    /// How long it waits.
    pub deadlines: Deadlines,
    /// What a stop is expected to cost beside moving memory, on a machine like this.
    pub costs: Costs,
    /// If the migration may go over into post-copy.
    pub postcopy: Option<Control<Uri>>,
}

/// Why a migration did not complete.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection, the protocol, or what the destination says.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The machine.
    #[error("{doing} failed: {error}")]
    Vm {
        /// What the engine asked of it.
        doing: &'static str,
        /// Why it could not.
        error: VmError,
    },
    /// The guest's memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The machine offers more than the protocol carries.
    #[error("the guest cannot be described on the wire: {0}")]
    Offer(DecodeError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] ReadError),
    /// A blob's file is shorter than announced, or can't be read.
    #[error("cannot read the blob '{name}': {error}")]
    Blob {
        /// The blob.
        name: String,
        /// Why.
        error: std::io::Error,
    },
    /// The destination answered for another migration, or with what was not offered.
    #[error("the destination accepted something else than was offered: {0}")]
    Accept(String),
    /// Post-copy needs a second connection.
    #[error("post-copy needs an address, to which more than one connection can be made")]
    NoAddress,
    /// No descriptors or threads.
    #[error("cannot prepare post-copy: {0}")]
    Breaker(std::io::Error),
    /// The fault channel is gone, and the guest has not been handed over.
    #[error("{0}")]
    Broken(String),
    /// No descriptors or threads for more connections.
    #[error("cannot prepare {count} connections for multifd: {error}")]
    Multifd {
        /// How many there were to be.
        count: u8,
        /// Why not.
        error: std::io::Error,
    },
    /// What the timeout is to do is not possible.
    #[error(
        "the timeout is to go over into post-copy, which this migration may not: switch the \
         capability postcopy-ram on at both sides, or set another action"
    )]
    TimeoutAction,
    /// No thread.
    #[error("cannot watch the time: {0}")]
    Timeout(std::io::Error),
    /// No random number.
    #[error("cannot get random bytes for the migration's identifier: {0}")]
    Random(std::io::Error),
    /// Cancelled, between two frames.
    #[error("{0}")]
    Cancelled(String),
}

impl SourceError {
    /// The reason, if it was cancelled.
    pub fn cancelled(&self) -> Option<&str> {
        match self {
            Self::Channel(error) => error.cancelled(),
            Self::Connect(ConnectError::Cancelled(reason)) | Self::Cancelled(reason) => {
                Some(reason)
            }
            _ => None,
        }
    }
}

/// Where the guest is after a migration that did not complete.
#[derive(Debug)]
pub enum Guest {
    /// It was never stopped.
    Untouched,
    /// It was stopped, and goes on as it was before.
    Resumed,
    /// It was stopped, and could not be resumed.
    Stuck(VmError),
}

/// How a migration ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest is at the destination. Its downtime is not known if the connection broke before
    /// the destination said that it runs, and post-copy was recovered.
    Completed(Option<Downtime>),
    /// The guest is at the destination, not all of its memory is, and nobody waits any more to
    /// send the rest.
    Abandoned {
        /// Why.
        reason: String,
    },
    /// It failed.
    Failed {
        /// Why.
        error: SourceError,
        /// Where the guest is.
        guest: Guest,
    },
    /// It was cancelled.
    Cancelled {
        /// Why.
        reason: String,
        /// Where the guest is.
        guest: Guest,
    },
    /// The destination was told to run the guest and has not answered: it may run there, so it
    /// stays stopped here until a person decides.
    HandoverUnknown {
        /// What happened.
        error: SourceError,
    },
}

/// What the source is doing, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Connect,
    Offer,
    Blobs,
    Disks,
    Rounds,
    Stop,
    LastBlocks,
    LastPages,
    Save,
    Load,
    HandOver,
    Late,
}

/// Who may run the guest.
#[derive(Debug)]
enum Owner {
    /// This side; it runs.
    Running,
    /// This side; it is stopped for the switch-over.
    Stopped(Pause),
    /// The destination: GO may have left.
    HandedOver(Pause),
}

/// How a conversation ended that was not broken off.
enum Moved {
    /// With all of the guest at the destination.
    Whole(Downtime),
    /// In post-copy.
    Late(Option<Downtime>, LateEnd),
}

/// What the rounds led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The rest fits.
    SwitchOver,
    /// The rest is to come after the guest.
    Postcopy,
}

/// What moves while the guest runs.
struct Contents {
    disks: Disks,
    memory: Memory,
}

struct Source<'a> {
    vm: &'a mut dyn SourceVm,
    job: &'a Job,
    clock: Arc<dyn Clock>,
    session: Option<Session>,
    owner: Owner,
    logging: bool,
    /// The disks whose writes are logged.
    logged: Vec<Arc<dyn SourceDisk>>,
    id: Id,
    step: Step,
    step_began: Duration,
    pressure: Pressure,
}

/// Migrates the guest of `vm`. Returns when it is clear where the guest is; the progress then has
/// its last status.
pub fn migrate(vm: &mut dyn SourceVm, peer: Peer, job: &Job) -> Outcome {
    job.progress.set_status(Status::Setup);
    let clock = Arc::clone(job.progress.clock());
    let mut source = Source {
        step_began: clock.now(),
        vm,
        job,
        clock,
        session: None,
        owner: Owner::Running,
        logging: false,
        logged: Vec::new(),
        id: Id([0; 16]),
        step: Step::Connect,
        pressure: Pressure::default(),
    };
    let result = source.run(peer);
    source.end(result)
}

impl Source<'_> {
    fn run(&mut self, peer: Peer) -> Result<Moved, SourceError> {
        self.start_timeout()?;
        getrandom(&mut self.id.0, GetRandomFlags::empty())
            .map_err(|error| SourceError::Random(error.into()))?;
        let (stream, uri) = match peer {
            Peer::Connected(stream) => (stream, None),
            Peer::Uri(uri) => {
                let stream = connect(&uri, &self.job.cancel, &self.job.deadlines)?;
                let uri = same_host(uri, &stream);
                (stream, Some(uri))
            }
        };
        tracing::info!(id = ?self.id, peer = stream.peer(), "migration begins");
        let link = Link::new(stream, self.job.cancel.clone(), &self.job.deadlines)
            .map_err(ChannelError::from)?;
        let channel = Channel::new(link, Arc::clone(&self.clock), true);
        let mut session = Session::new(
            channel,
            &self.job.deadlines,
            Arc::clone(&self.clock),
            Arc::clone(&self.job.parameters),
        );
        session.convergence.costs = self.job.costs;
        session.hurry_if(&self.pressure.hurry());
        let mut late = None;
        let result = self.converse(&mut session, uri, &mut late);
        let moved = match &result {
            Ok(_) => true,
            Err(error) => self.may_run_there(error),
        };
        if let Some(mut late) = late.filter(|late| moved && late.is_switched()) {
            let (downtime, broken) = match result {
                Ok(downtime) => (Some(downtime), None),
                Err(error) => (None, Some(error)),
            };
            self.stop_logging();
            self.vm.handed_over();
            self.job.progress.tell_held();
            self.enter(Step::Late);
            let end = self.run_late(session.channel, &mut late, broken);
            return Ok(Moved::Late(downtime, end));
        }
        self.session = Some(session);
        result.map(Moved::Whole)
    }

    fn converse(
        &mut self,
        session: &mut Session,
        uri: Option<Uri>,
        late: &mut Option<Late>,
    ) -> Result<Downtime, SourceError> {
        self.enter(Step::Offer);
        let offer = self.vm.offer().map_err(vm("describing the guest"))?;
        self.offer(session, &offer, uri.is_some())?;
        *late = self.join(session, uri.as_ref())?;
        let memory = Arc::new(GuestPages::new(self.vm.ram())?);
        self.enter(Step::Blobs);
        self.send_blobs(session, &offer)?;
        session.measure_round_trip()?;
        self.connect_more(session, uri.as_ref(), &memory)?;
        let mut guest = Contents {
            disks: Disks::open(self.vm, &offer).map_err(vm("opening a disk"))?,
            memory: Memory::new(memory),
        };
        self.job.progress.update(|snapshot| {
            session.tell(snapshot);
            snapshot.ram.total = offer.layout.bytes();
            snapshot.ram.remaining = offer.layout.bytes();
            snapshot.disk = (!guest.disks.is_empty()).then(|| progress::Disk {
                total: guest.disks.capacity(),
                remaining: guest.disks.capacity(),
                ..progress::Disk::default()
            });
        });
        self.job.progress.set_status(Status::Active);

        self.enter(Step::Disks);
        self.bulk_pass(session, &mut guest.disks)?;
        self.enter(Step::Rounds);
        // Not before the disks have moved: it slows the guest's writes down.
        self.vm
            .start_dirty_log()
            .map_err(vm("switching the dirty log on"))?;
        self.logging = true;
        let (rounds, next) = self.rounds(session, &mut guest)?;
        let mut late = late.as_mut().filter(|_| next == Next::Postcopy);
        if let Some(late) = &mut late {
            session.end_channels()?;
            self.tell_missing(session, &mut guest, late, rounds)?;
        }
        self.job.progress.update(|snapshot| {
            session.tell(snapshot);
            snapshot.ram.precopy_bytes = snapshot.ram.transferred;
        });
        self.switch_over(session, &mut guest, rounds + 1, late)
    }

    /// Whether, after that, the guest may be running at the destination.
    fn may_run_there(&self, error: &SourceError) -> bool {
        matches!(self.owner, Owner::HandedOver(_)) && !failed_by_destination(error)
    }

    /// Puts the guest where it belongs, tells the peer, and says how it ended.
    fn end(&mut self, result: Result<Moved, SourceError>) -> Outcome {
        let error = match result {
            Ok(Moved::Whole(downtime)) => {
                tracing::info!(id = ?self.id, downtime_us = downtime.total.as_micros(), "migration completed");
                self.vm.handed_over();
                self.job.progress.tell_held();
                self.stop_logging();
                self.job.progress.complete();
                return Outcome::Completed(Some(downtime));
            }
            Ok(Moved::Late(downtime, end)) => return self.end_late(downtime, end),
            Err(error) => error,
        };
        // First of all the guest goes on, as it likes, before anything that takes time.
        self.end_pressure();
        let failed_by_destination = failed_by_destination(&error);
        let guest = match self.owner {
            Owner::Running => Guest::Untouched,
            Owner::HandedOver(_) if !failed_by_destination => return self.unknown(error),
            Owner::Stopped(pause) | Owner::HandedOver(pause) => match self.vm.resume(pause) {
                Ok(()) => Guest::Resumed,
                Err(error) => Guest::Stuck(error),
            },
        };
        self.job.progress.tell_held();
        let reason = error.cancelled().map(str::to_owned);
        if reason.is_some() {
            self.job.progress.set_status(Status::Cancelling);
        }
        self.stop_logging();
        let text = error.to_string();
        self.tell_peer(&error, &text);
        if let Some(session) = &mut self.session {
            session.drop_channels();
        }
        self.job
            .progress
            .update(|snapshot| snapshot.error = Some(text.clone()));
        match reason {
            Some(reason) => {
                tracing::info!(id = ?self.id, step = ?self.step, ?guest, "migration cancelled: {reason}");
                self.job.progress.set_status(Status::Cancelled);
                Outcome::Cancelled { reason, guest }
            }
            None => {
                tracing::error!(id = ?self.id, step = ?self.step, ?guest, "migration failed: {text}");
                self.job.progress.set_status(Status::Failed);
                Outcome::Failed { error, guest }
            }
        }
    }

    fn end_late(&mut self, downtime: Option<Downtime>, end: LateEnd) -> Outcome {
        let (error, given_up) = match end {
            LateEnd::Complete => (None, None),
            LateEnd::Gone(gone) => {
                let lost = gone.cause == GoneCause::Lost;
                (Some(gone.to_string()), lost.then_some(gone.reason))
            }
            LateEnd::Abandoned(reason) => (Some(reason.clone()), Some(reason)),
        };
        self.job
            .progress
            .update(|snapshot| snapshot.error.clone_from(&error));
        if let Some(reason) = given_up {
            tracing::error!(id = ?self.id, "post-copy was given up: {}", error.unwrap_or_default());
            self.job.progress.set_status(Status::Failed);
            return Outcome::Abandoned { reason };
        }
        if let Some(gone) = error {
            tracing::warn!(id = ?self.id, "{gone}");
        }
        let downtime_us = downtime.map(|downtime| downtime.total.as_micros());
        tracing::info!(id = ?self.id, downtime_us, "post-copy completed");
        self.job.progress.complete();
        Outcome::Completed(downtime)
    }

    fn unknown(&mut self, error: SourceError) -> Outcome {
        self.stop_logging();
        self.job
            .progress
            .update(|snapshot| snapshot.error = Some(error.to_string()));
        tracing::error!(
            id = ?self.id,
            "the guest was handed over, but the destination has not confirmed that it runs ({error}): it stays stopped here, and may be running there"
        );
        self.vm.handed_over();
        self.job.progress.tell_held();
        self.job.progress.set_status(Status::HandoverUnknown);
        Outcome::HandoverUnknown { error }
    }

    fn tell_peer(&mut self, error: &SourceError, text: &str) {
        let Some(session) = &mut self.session else {
            return;
        };
        let gone = matches!(
            error,
            SourceError::Channel(
                ChannelError::Peer { .. }
                    | ChannelError::Link {
                        error: LinkError::Closed,
                        ..
                    }
            )
        );
        if !gone {
            let mut body = Vec::new();
            encode_reason(text, &mut body);
            session.channel.send_now(Kind::Cancel, &body);
        }
        session.channel.link().finish();
        // Answers left unread would make the closing of the socket discard the last words.
        let _ = session.look_at_answers();
    }

    fn stop_logging(&mut self) {
        self.end_pressure();
        if std::mem::take(&mut self.logging) {
            self.vm.stop_dirty_log();
        }
        for disk in self.logged.drain(..) {
            disk.stop_log();
        }
    }

    fn enter(&mut self, step: Step) {
        let now = self.clock.now();
        let took_us = now.saturating_sub(self.step_began).as_micros();
        tracing::debug!(id = ?self.id, ended = ?self.step, took_us, begins = ?step, "step");
        self.step = step;
        self.step_began = now;
    }
}

/// Where further connections go: a name may have several addresses, of several hosts.
fn same_host(uri: Uri, stream: &Stream) -> Uri {
    match uri {
        Uri::Tcp { .. } => stream.peer().parse().unwrap_or(uri),
        _ => uri,
    }
}

fn failed_by_destination(error: &SourceError) -> bool {
    matches!(
        error,
        SourceError::Channel(ChannelError::Peer {
            kind: Kind::Failed,
            ..
        })
    )
}

fn vm(doing: &'static str) -> impl FnOnce(VmError) -> SourceError {
    move |error| SourceError::Vm { doing, error }
}

fn pass_error(error: PassError) -> SourceError {
    match error {
        PassError::Channel(error) => error.into(),
        PassError::Protect(error) => vm("protecting memory")(error),
    }
}

fn blocks_error(error: BlocksError) -> SourceError {
    match error {
        BlocksError::Channel(error) => error.into(),
        BlocksError::Read(error) => error.into(),
    }
}
