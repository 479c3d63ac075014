//! The destination: from the offer to the first instruction. See docs/design.md for who may run
//! the guest when.

mod arriving;
mod blobs;
mod channels;
mod disks;
mod error;
mod faults;
pub mod late;
mod memory;
mod postcopy;
mod recovery;
mod rest;
mod unconfirmed;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::channels::PositionError;
pub use self::disks::DiskError;
pub use self::error::DestinationError;
pub use self::unconfirmed::Unconfirmed;

use self::arriving::Arriving;
use self::blobs::Blobs;
use self::disks::Disks;
use self::postcopy::Late;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::frame::{Kind, MAX_SECTION};
use crate::link::{Deadlines, Link, LinkError};
use crate::listener::{Incoming, Listener};
use crate::message::{
    Accept, BlobChunk, CAPABILITIES, End, Flush, Flushed, Go, Hello, Id, MULTIFD, Missing,
    REQUIRABLE, Ready, Running, Sync, SyncAck, UNCHECKED, decode_state, encode_reason,
};
use crate::placement::Placement;
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
    job.progress.tell_held();
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
        let picked = picked(&hello, listener.is_some());
        let multifd = picked & MULTIFD != 0;
        // If it is not wanted, the address is free for whoever comes next.
        let mut listener = listener.filter(|_| control.is_some() || multifd);
        let ram = self
            .vm
            .prepare(&hello.offer)
            .map_err(DestinationError::Refused)?;
        let placement = Placement::new(ram, picked & UNCHECKED == 0)?;
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
            capabilities: picked,
        }
        .encode(&mut self.body);
        channel.send(Kind::Accept, &self.body)?;
        self.job.progress.update(|snapshot| {
            snapshot.ram.total = hello.offer.layout.bytes();
            snapshot.ram.remaining = hello.offer.layout.bytes();
            snapshot.disk = disks.counts();
        });
        self.job.progress.set_status(Status::Active);
        let late = match control {
            Some(control) => {
                let listener = (listener.as_mut(), multifd);
                Some(Late::join(control, hello.id, listener, channel, self)?)
            }
            None => None,
        };
        let listener = listener.filter(|_| multifd);
        let agreed = (hello.id, picked);
        let mut arriving = Arriving::begin(placement, late, agreed, listener, channel, self)?;
        let (sections, end) = self
            .take_in(channel, &hello, &mut disks, &mut arriving)
            .map_err(|error| arriving.explain(error, channel))?;
        self.job.progress.hold();
        self.job.progress.set_status(Status::Device);
        let began = self.clock.now();
        let late = arriving.check_complete()?;
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
    ) -> Result<(Vec<Section>, End), DestinationError> {
        let mut blobs = Blobs::default();
        let mut sections: Vec<Section> = Vec::new();
        let mut state_bytes = 0;
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
                Kind::Pages | Kind::Zero | Kind::Compressed | Kind::Xbzrle => {
                    arriving.receive(arrived, channel)?;
                }
                Kind::Barrier => arriving.barrier(channel)?,
                Kind::Missing => {
                    arriving.all_sent(channel)?;
                    self.tell(channel, disks, arriving, 0);
                    arriving.missing(channel, self)?;
                }
                Kind::Late => {
                    let told = channel.decode(Kind::Late, Missing::decode)?;
                    arriving.late(channel, Kind::Late)?.check_told(told)?;
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
                    self.tell(channel, disks, arriving, sync.round);
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
                    arriving.all_sent(channel)?;
                    self.tell(channel, disks, arriving, 0);
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
            arriving.placed();
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
        let entered = started?.unwrap_or_else(|| self.clock.now());
        let took = entered.saturating_sub(arrived_at);
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

    fn tell(&self, channel: &Channel, disks: &Disks, arriving: &Arriving, round: u64) {
        // What comes after the guest is told by who takes it in.
        let Some(placement) = arriving.placement() else {
            return;
        };
        let counts = placement.counts();
        let (beside, bytes) = arriving.received();
        self.job.progress.update(|snapshot| {
            snapshot.round = snapshot.round.max(round);
            snapshot.bytes = channel.received().and(bytes);
            snapshot.disk = disks.counts();
            let ram = &mut snapshot.ram;
            ram.transferred = channel
                .received_bytes()
                .saturating_sub(channel.received_blocks())
                .saturating_add(beside);
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

/// The capabilities that the source may use. More connections take a `listener`.
fn picked(hello: &Hello, listener: bool) -> u32 {
    let possible = match listener {
        true => CAPABILITIES,
        false => CAPABILITIES & !MULTIFD,
    };
    hello.optional & possible
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
