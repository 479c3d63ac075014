//! The destination: from the offer to the first instruction. See docs/design.md for who may run
//! the guest when.

mod blobs;
mod disks;
mod faults;
pub mod late;
mod postcopy;
mod recovery;
mod rest;
mod unconfirmed;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::disks::DiskError;
pub use self::unconfirmed::Unconfirmed;

use self::blobs::Blobs;
use self::disks::Disks;
use self::late::LateError;
use self::postcopy::Late;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::frame::{Kind, MAX_SECTION};
use crate::guest_io::MemoryError;
use crate::link::{Deadlines, Link, LinkError};
use crate::listener::{Incoming, ListenError, Listener};
use crate::message::{
    Accept, BlobChunk, CAPABILITIES, End, Flush, Flushed, Go, Hello, Id, Missing, REQUIRABLE,
    Ready, Running, Sync, SyncAck, decode_pages, decode_state, decode_zero, encode_reason,
};
use crate::placement::{EncodedError, Incomplete, Placement, Unpacker};
use crate::postcopy::Control;
use crate::progress::{Progress, Status};
use crate::protocol::{NEWEST_VERSION, OLDEST_VERSION, common_version};
use crate::section::{Section, SectionError};
use crate::vm::{DestinationVm, Start, VmError};

/// The most bytes of all state sections together: 64 MiB.
pub const MAX_STATE: usize = 4 * MAX_SECTION;

/// The most state sections.
pub const MAX_SECTIONS: usize = 4096;

/// The longest stop that is believed: the longest downtime limit, twice, and some.
const MAX_STOPPED: Duration = Duration::from_secs(6 * 3600);

/// What the arrival of a guest needs beside the machine.
#[derive(Clone, Debug)]
pub struct Job {
    /// Ends it early.
    pub cancel: Cancel,
    /// Where it tells how it goes.
    pub progress: Arc<Progress>,
    /// How long it waits.
    pub deadlines: Deadlines,
    /// If the migration may go over into post-copy.
    pub postcopy: Option<Control<Listener>>,
}

/// Why a guest did not arrive. It has not run here and never will.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The connection, the protocol, or what the source says.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No version in common.
    #[error(
        "the source speaks versions {oldest} to {newest} of the migration protocol, this destination {OLDEST_VERSION} to {NEWEST_VERSION}"
    )]
    Version {
        /// The source's oldest.
        oldest: u16,
        /// The source's newest.
        newest: u16,
    },
    /// Something that this build can't do.
    #[error("the source requires capabilities that this destination does not have (bits {0:#x})")]
    Capabilities(u32),
    /// The machine refuses the offer.
    #[error("{0}")]
    Refused(VmError),
    /// The machine.
    #[error("{doing} failed: {error}")]
    Vm {
        /// What the engine asked of it.
        doing: &'static str,
        /// Why it could not.
        error: VmError,
    },
    /// Memory that isn't there.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A piece of a blob that is not the next one.
    #[error("a piece of blob {index} at {offset} came, but {expected}")]
    Blob {
        /// The blob's index.
        index: u16,
        /// Where the piece begins.
        offset: u64,
        /// What was due.
        expected: String,
    },
    /// Memory came before all blobs were there.
    #[error("{0} of the blobs never came")]
    BlobsMissing(usize),
    /// A blob cannot be kept.
    #[error("cannot write the blob '{name}': {error}")]
    BlobWrite {
        /// The blob.
        name: String,
        /// Why.
        error: std::io::Error,
    },
    /// The state sections are not a set.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The state is too large.
    #[error("the state has more than {MAX_SECTIONS} sections or {MAX_STATE} bytes")]
    StateTooLarge,
    /// Not as many as were sent.
    #[error("{found} state sections came, but the source says that it sent {stated}")]
    SectionCount {
        /// How many came.
        found: usize,
        /// How many should have.
        stated: u32,
    },
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Pages that don't come as they are.
    #[error(transparent)]
    Encoded(#[from] EncodedError),
    /// Memory is not whole.
    #[error(transparent)]
    Incomplete(#[from] Incomplete),
    /// The source's other connection.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Memory that comes later.
    #[error(transparent)]
    Late(#[from] LateError),
    /// No descriptors or threads.
    #[error("cannot prepare post-copy: {0}")]
    Resources(std::io::Error),
    /// What was told as missing is not what is.
    #[error("{ours} pages of guest memory are missing here, the source says {theirs}")]
    Disagreement {
        /// Here.
        ours: u64,
        /// There.
        theirs: u64,
    },
    /// The source says that it has sent everything.
    #[error("{0} pages of guest memory have not come, though the source has sent everything")]
    NeverPushed(u64),
    /// The fault channel is gone, and the guest has not been started.
    #[error("{0}")]
    Broken(String),
    /// GO contradicts what went before.
    #[error("the source's GO is not for this migration: {0}")]
    Go(String),
    /// Cancelled, between two frames.
    #[error("{0}")]
    Cancelled(String),
}

impl DestinationError {
    /// The reason, if it was cancelled here.
    pub fn cancelled(&self) -> Option<&str> {
        match self {
            Self::Channel(error) => error.cancelled(),
            Self::Cancelled(reason) => Some(reason),
            _ => None,
        }
    }
}

/// A guest that has arrived.
#[derive(Debug)]
pub struct Arrival {
    /// The migration.
    pub id: Id,
    /// How it was started.
    pub start: Start,
    /// After post-copy, if the source may not know how it ended: to be served.
    pub unconfirmed: Option<Unconfirmed>,
}

/// A guest that runs without all of its memory, and why its connection is broken already, if so.
type Rest = (Late, Option<ChannelError>);

/// The memory of the arriving guest.
enum Arriving {
    /// All of it comes before the guest.
    Early(Box<Placement>),
    /// The rest comes after.
    Late,
}

struct Destination<'a> {
    vm: &'a mut dyn DestinationVm,
    job: &'a Job,
    clock: Arc<dyn Clock>,
    body: Vec<u8>,
}

/// Receives a guest into `vm`. On success it runs, or is paused as it was at the source. On
/// failure it has not run and never will, and the source has been told why. `listener` is where the
/// connection came from, and where post-copy's second one comes from; it is closed as soon as it is
/// of no more use. In post-copy this returns when all of the guest's memory is here, or nobody waits
/// for it any more.
pub fn receive(
    vm: &mut dyn DestinationVm,
    incoming: Incoming,
    listener: Option<Listener>,
    job: &Job,
) -> Result<Arrival, DestinationError> {
    job.progress.set_status(Status::Setup);
    let clock = Arc::clone(job.progress.clock());
    let peer = incoming.peer().to_owned();
    tracing::info!(peer, "a guest arrives");
    let link = Link::new(incoming.stream, job.cancel.clone(), &job.deadlines)
        .map_err(ChannelError::from)?;
    let mut channel = Channel::new(link, Arc::clone(&clock), false);
    let mut destination = Destination {
        vm,
        job,
        clock,
        body: Vec::new(),
    };
    let version = common_version(
        (OLDEST_VERSION, NEWEST_VERSION),
        (incoming.preamble.oldest, incoming.preamble.newest),
    );
    let result = match version {
        Some(version) => destination.converse(&mut channel, version, listener),
        None => Err(DestinationError::Version {
            oldest: incoming.preamble.oldest,
            newest: incoming.preamble.newest,
        }),
    };
    match result {
        Ok((mut arrival, late)) => {
            tracing::info!(id = ?arrival.id, start = ?arrival.start, "the guest has arrived");
            match late {
                Some((late, broken)) => {
                    arrival.unconfirmed = destination.take_in_rest(channel, late, broken);
                }
                None => {
                    job.progress.set_status(Status::Completed);
                    channel.linger(Instant::now() + job.deadlines.linger);
                }
            }
            Ok(arrival)
        }
        Err(error) => {
            destination.fail(channel, &error);
            Err(error)
        }
    }
}

impl Destination<'_> {
    fn converse(
        &mut self,
        channel: &mut Channel,
        version: u16,
        listener: Option<Listener>,
    ) -> Result<(Arrival, Option<Rest>), DestinationError> {
        let deadline = Instant::now() + self.job.deadlines.handshake;
        channel.link().set_until(Some(deadline));
        channel.receive()?;
        channel.link().set_until(None);
        let hello = channel.decode(Kind::Hello, Hello::decode)?;
        let unknown = hello.required & !REQUIRABLE;
        if unknown != 0 {
            return Err(DestinationError::Capabilities(unknown));
        }
        tracing::info!(id = ?hello.id, version, bytes = hello.offer.layout.bytes(), "offered");
        let control = Late::check(&hello, self.job)
            .map_err(|reason| DestinationError::Refused(reason.into()))?;
        // If it is not wanted, the address is free for whoever comes next.
        let listener = listener.filter(|_| control.is_some());
        let ram = self
            .vm
            .prepare(&hello.offer)
            .map_err(DestinationError::Refused)?;
        let placement = Placement::new(ram)?;
        if *placement.layout() != hello.offer.layout {
            return Err(DestinationError::Vm {
                doing: "building the guest's memory",
                error: "its layout is not the one that was offered".into(),
            });
        }
        if control.is_some() {
            Late::check_memory(&placement)
                .map_err(|reason| DestinationError::Refused(reason.into()))?;
        }
        let mut disks = Disks::open(self.vm, &hello.offer)?;
        Accept {
            id: hello.id,
            version,
            capabilities: picked(&hello),
        }
        .encode(&mut self.body);
        channel.send(Kind::Accept, &self.body)?;
        self.job.progress.update(|snapshot| {
            snapshot.ram.total = hello.offer.layout.bytes();
            snapshot.ram.remaining = hello.offer.layout.bytes();
            snapshot.disk = disks.counts();
        });
        self.job.progress.set_status(Status::Active);
        let mut late = match control {
            Some(control) => Some(Late::join(control, hello.id, listener, channel, self)?),
            None => None,
        };

        let mut arriving = Arriving::Early(Box::new(placement));
        let (sections, end) =
            self.take_in(channel, &hello, &mut disks, &mut arriving, &mut late)?;
        self.job.progress.set_status(Status::Device);
        let began = self.clock.now();
        if let Arriving::Early(placement) = &arriving {
            placement.check_complete()?;
        }
        disks.check_complete()?;
        // Whatever becomes of this host, what the source gives up with GO is on the disks.
        disks.flush()?;
        drop(disks);
        self.vm.load(sections).map_err(vm("loading the state"))?;
        if let Some(late) = &late {
            late.check_connected()?;
        }
        let took = self.clock.now().saturating_sub(began);
        Ready {
            load_ns: nanoseconds(took),
        }
        .encode(&mut self.body);
        channel.send(Kind::Ready, &self.body)?;
        tracing::info!(id = ?hello.id, load_us = took.as_micros(), "ready");
        let mut late = late.filter(Late::is_switched);
        let (arrival, broken) = self.start(channel, hello.id, end, late.as_mut())?;
        Ok((arrival, late.map(|late| (late, broken))))
    }

    /// Everything up to END: blobs, disks, memory, state.
    fn take_in(
        &mut self,
        channel: &mut Channel,
        hello: &Hello,
        disks: &mut Disks,
        arriving: &mut Arriving,
        late: &mut Option<Late>,
    ) -> Result<(Vec<Section>, End), DestinationError> {
        let mut blobs = Blobs::default();
        let mut sections: Vec<Section> = Vec::new();
        let mut state_bytes = 0;
        let (mut runs, mut crcs) = (Vec::new(), Vec::new());
        let mut unpacker = Unpacker::new(picked(hello));
        let offer = &hello.offer;
        loop {
            let arrived = channel.receive()?;
            if arrived.kind != Kind::Blob && !blobs.complete(offer) {
                return Err(DestinationError::BlobsMissing(
                    offer.blobs.len() - blobs.done,
                ));
            }
            match arrived.kind {
                Kind::Blob => {
                    let body = channel.body();
                    let (chunk, data) =
                        BlobChunk::decode(body).map_err(|error| ChannelError::Body {
                            kind: Kind::Blob,
                            error,
                        })?;
                    blobs.write(self.vm, offer, chunk, data)?;
                }
                Kind::Blocks => disks.receive(channel, arrived.payload_len)?,
                Kind::Flush => {
                    let flush = channel.decode(Kind::Flush, Flush::decode)?;
                    let began = self.clock.now();
                    disks.flush()?;
                    let took = self.clock.now().saturating_sub(began);
                    tracing::debug!(round = flush.round, us = took.as_micros(), "disks flushed");
                    Flushed {
                        flush_ns: nanoseconds(took),
                    }
                    .encode(&mut self.body);
                    channel.send(Kind::Flushed, &self.body)?;
                }
                Kind::Pages => {
                    channel.decode(Kind::Pages, |body| {
                        decode_pages(body, arrived.payload_len, &mut runs, &mut crcs)
                    })?;
                    arriving
                        .early(channel, Kind::Pages)?
                        .receive(channel, &runs, &crcs)?;
                }
                kind @ (Kind::Compressed | Kind::Xbzrle) => {
                    let placement = arriving.early(channel, kind)?;
                    unpacker.receive(arrived, channel, placement)?;
                }
                Kind::Zero => {
                    channel.decode(Kind::Zero, |body| decode_zero(body, &mut runs))?;
                    arriving.early(channel, Kind::Zero)?.zero(&runs)?;
                }
                Kind::Missing => {
                    let late = late
                        .as_mut()
                        .ok_or_else(|| out_of_order(channel, Kind::Missing))?;
                    if let Arriving::Early(placement) = std::mem::replace(arriving, Arriving::Late)
                    {
                        self.tell(channel, disks, &placement, 0);
                        late.switch(*placement, self)?;
                    }
                    late.drop_missing(channel)?;
                }
                Kind::Late => {
                    let told = channel.decode(Kind::Late, Missing::decode)?;
                    let late = late
                        .as_ref()
                        .ok_or_else(|| out_of_order(channel, Kind::Late))?;
                    late.check_told(told)?;
                }
                Kind::Sync => {
                    let sync = channel.decode(Kind::Sync, Sync::decode_padded)?;
                    SyncAck { mark: sync.mark }.encode(&mut self.body);
                    match channel.send(Kind::SyncAck, &self.body) {
                        // What the source said before it closed is still to be read.
                        Err(ChannelError::Link {
                            error: LinkError::Closed,
                            ..
                        }) => {}
                        result => result?,
                    }
                    if let Arriving::Early(placement) = arriving {
                        self.tell(channel, disks, placement, sync.round);
                    }
                }
                Kind::State => {
                    let section = channel.decode(Kind::State, decode_state)?;
                    if sections.iter().any(|other| other.name == section.name) {
                        return Err(SectionError::Duplicate(section.name).into());
                    }
                    state_bytes += section.body.len();
                    sections.push(section);
                    if state_bytes > MAX_STATE || sections.len() > MAX_SECTIONS {
                        return Err(DestinationError::StateTooLarge);
                    }
                }
                Kind::End => {
                    let end = channel.decode(Kind::End, End::decode)?;
                    if let Arriving::Early(placement) = arriving {
                        self.tell(channel, disks, placement, 0);
                    }
                    if end.sections as usize != sections.len() {
                        return Err(DestinationError::SectionCount {
                            found: sections.len(),
                            stated: end.sections,
                        });
                    }
                    return Ok((sections, end));
                }
                kind => return Err(out_of_order(channel, kind)),
            }
        }
    }

    /// Waits for GO, without which the guest never runs, and lets the guest go.
    fn start(
        &mut self,
        channel: &mut Channel,
        id: Id,
        end: End,
        late: Option<&mut Late>,
    ) -> Result<(Arrival, Option<ChannelError>), DestinationError> {
        let deadline = Instant::now() + self.job.deadlines.go;
        channel.link().set_until(Some(deadline));
        let arrived = channel.receive()?;
        if arrived.kind != Kind::Go {
            return Err(out_of_order(channel, arrived.kind));
        }
        let arrived_at = channel.arrived_at();
        let go = channel.decode(Kind::Go, Go::decode)?;
        if !self.job.cancel.commit() {
            let reason = self.job.cancel.cancelled().unwrap_or("cancelled");
            return Err(DestinationError::Cancelled(reason.to_owned()));
        }
        channel.link().ignore_cancel();
        let stopped = Duration::from_nanos(go.stopped_ns);
        let one_way = Duration::from_nanos(go.round_trip_ns) / 2;
        if go.id != id || go.run && !end.was_running || stopped + one_way > MAX_STOPPED {
            return Err(DestinationError::Go(format!("{go:?} after {end:?}")));
        }
        let stopped_for = if go.run {
            stopped + one_way + self.clock.now().saturating_sub(arrived_at)
        } else {
            Duration::ZERO
        };
        let start = Start {
            run: go.run,
            stopped_for,
        };
        let started = match late.as_ref() {
            Some(late) => late.guest_runs(self.job),
            None => Ok(()),
        }
        .and_then(|()| self.vm.start(start).map_err(vm("starting the guest")));
        if let (Err(_), Some(late)) = (&started, late) {
            late.guest_never_runs();
        }
        started?;
        let took = self.clock.now().saturating_sub(arrived_at);
        Running {
            start_ns: nanoseconds(took),
        }
        .encode(&mut self.body);
        channel
            .link()
            .set_until(Some(Instant::now() + self.job.deadlines.linger));
        let told = channel.send(Kind::Running, &self.body);
        if let Err(error) = &told {
            // The guest is here, whatever the source thinks.
            tracing::warn!(?id, "cannot tell the source that the guest runs: {error}");
        }
        let arrival = Arrival {
            id,
            start,
            unconfirmed: None,
        };
        Ok((arrival, told.err()))
    }

    fn tell(&self, channel: &Channel, disks: &Disks, placement: &Placement, round: u64) {
        let counts = placement.counts();
        self.job.progress.update(|snapshot| {
            snapshot.round = snapshot.round.max(round);
            snapshot.bytes = channel.received();
            snapshot.disk = disks.counts();
            let ram = &mut snapshot.ram;
            ram.transferred = channel
                .received_bytes()
                .saturating_sub(channel.received_blocks());
            ram.normal = counts.pages;
            ram.normal_bytes = counts.pages * crate::layout::PAGE_SIZE;
            ram.duplicate = counts.zero;
            ram.remaining = placement.missing() * crate::layout::PAGE_SIZE;
        });
    }

    fn fail(&mut self, mut channel: Channel, error: &DestinationError) {
        let text = error.to_string();
        let gone = matches!(
            error,
            DestinationError::Channel(
                ChannelError::Peer { .. }
                    | ChannelError::Link {
                        error: LinkError::Closed,
                        ..
                    }
            )
        );
        if !gone {
            encode_reason(&text, &mut self.body);
            // The one is refused before anything was accepted, the other after.
            let _ = channel.send_now(Kind::Refuse, &self.body)
                || channel.send_now(Kind::Failed, &self.body);
        }
        self.vm.abandon();
        self.job
            .progress
            .update(|snapshot| snapshot.error = Some(text.clone()));
        if error.cancelled().is_some() {
            tracing::info!("the arrival of the guest was cancelled: {text}");
            self.job.progress.set_status(Status::Cancelled);
        } else {
            tracing::error!("the guest did not arrive: {text}");
            self.job.progress.set_status(Status::Failed);
        }
        channel.linger(Instant::now() + self.job.deadlines.linger);
    }
}

impl Arriving {
    fn early(&mut self, channel: &Channel, kind: Kind) -> Result<&mut Placement, DestinationError> {
        match self {
            Self::Early(placement) => Ok(placement),
            Self::Late => Err(out_of_order(channel, kind)),
        }
    }
}

/// The capabilities that the source may use.
fn picked(hello: &Hello) -> u32 {
    hello.optional & CAPABILITIES
}

fn out_of_order(channel: &Channel, kind: Kind) -> DestinationError {
    let phase = channel.phase();
    ChannelError::OutOfOrder(crate::protocol::OutOfOrder { kind, phase }).into()
}

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}

fn vm(doing: &'static str) -> impl FnOnce(VmError) -> DestinationError {
    move |error| DestinationError::Vm { doing, error }
}
