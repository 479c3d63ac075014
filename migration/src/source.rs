//! The source: from the offer to the hand-over. See docs/design.md for who may run the guest when.

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::codec::DecodeError;
use crate::connect::{ConnectError, connect};
use crate::convergence::{Costs, Decision};
use crate::frame::{Kind, MAX_CHUNK};
use crate::guest_io::{GuestPages, MemoryError};
use crate::link::{Deadlines, Link, LinkError, Stream};
use crate::message::{
    Accept, BlobChunk, CAPABILITIES, End, Go, Hello, Id, Preamble, Ready, Running, encode_reason,
    encode_state,
};
use crate::parameters::Parameters;
use crate::progress::{Downtime, Progress, Round, Status};
use crate::protocol::{NEWEST_VERSION, OLDEST_VERSION};
use crate::rounds::{Memory, Pass, PassError, Sent};
use crate::session::Session;
use crate::uri::Uri;
use crate::vm::{Offer, Pause, SourceVm, VmError};

/// The pause between looks at a guest for which even an empty rest would not fit.
const IDLE: Duration = Duration::from_millis(100);

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
    /// The guest is at the destination.
    Completed(Downtime),
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
    Rounds,
    Stop,
    LastPages,
    Save,
    Load,
    HandOver,
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

struct Source<'a> {
    vm: &'a mut dyn SourceVm,
    job: &'a Job,
    clock: Arc<dyn Clock>,
    session: Option<Session>,
    owner: Owner,
    logging: bool,
    id: Id,
    step: Step,
    step_began: Duration,
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
        id: Id([0; 16]),
        step: Step::Connect,
    };
    let result = source.run(peer);
    source.end(result)
}

impl Source<'_> {
    fn run(&mut self, peer: Peer) -> Result<Downtime, SourceError> {
        getrandom(&mut self.id.0, GetRandomFlags::empty())
            .map_err(|error| SourceError::Random(error.into()))?;
        let stream = match peer {
            Peer::Connected(stream) => stream,
            Peer::Uri(uri) => connect(&uri, &self.job.cancel, &self.job.deadlines)?,
        };
        tracing::info!(id = ?self.id, peer = stream.peer(), "migration begins");
        let link = Link::new(stream, self.job.cancel.clone(), &self.job.deadlines)
            .map_err(ChannelError::from)?;
        let channel = Channel::new(link, Arc::clone(&self.clock), true);
        let mut session = Session::new(
            channel,
            Arc::clone(&self.clock),
            Arc::clone(&self.job.parameters),
        );
        session.convergence.costs = self.job.costs;
        let result = self.converse(&mut session);
        self.session = Some(session);
        result
    }

    fn converse(&mut self, session: &mut Session) -> Result<Downtime, SourceError> {
        self.enter(Step::Offer);
        let offer = self.vm.offer().map_err(vm("describing the guest"))?;
        self.offer(session, &offer)?;
        self.enter(Step::Blobs);
        self.send_blobs(session, &offer)?;
        for _ in 0..2 {
            session.measure_round_trip()?;
        }
        let mut memory = Memory::new(GuestPages::new(self.vm.ram())?);
        self.vm
            .start_dirty_log()
            .map_err(vm("switching the dirty log on"))?;
        self.logging = true;
        self.job.progress.update(|snapshot| {
            snapshot.ram.total = offer.layout.bytes();
            snapshot.ram.remaining = offer.layout.bytes();
        });
        self.job.progress.set_status(Status::Active);

        self.enter(Step::Rounds);
        let rounds = self.rounds(session, &mut memory)?;
        let precopy_bytes = session.channel.sent_bytes();
        self.job
            .progress
            .update(|snapshot| snapshot.ram.precopy_bytes = precopy_bytes);
        self.switch_over(session, &mut memory, rounds + 1)
    }

    fn offer(&mut self, session: &mut Session, offer: &Offer) -> Result<(), SourceError> {
        let hello = Hello {
            id: self.id,
            required: 0,
            optional: CAPABILITIES,
            offer: offer.clone(),
        };
        let mut body = Vec::new();
        hello.encode(&mut body).map_err(SourceError::Offer)?;
        let channel = &mut session.channel;
        let deadline = Instant::now() + self.job.deadlines.handshake;
        channel.link().set_until(Some(deadline));
        channel.send_raw(&Preamble::OURS.encode())?;
        channel.send(Kind::Hello, &body)?;
        session.receive(Kind::Accept)?;
        let channel = &mut session.channel;
        channel.link().set_until(None);
        let accept = channel.decode(Kind::Accept, Accept::decode)?;
        let Accept {
            id,
            version,
            capabilities,
        } = accept;
        if id != self.id
            || !(OLDEST_VERSION..=NEWEST_VERSION).contains(&version)
            || capabilities & !CAPABILITIES != 0
        {
            return Err(SourceError::Accept(format!("{accept:?}")));
        }
        Ok(())
    }

    fn send_blobs(&mut self, session: &mut Session, offer: &Offer) -> Result<(), SourceError> {
        let mut body = Vec::new();
        for (index, blob) in offer.blobs.iter().enumerate() {
            let mut file = self.vm.open_blob(index).map_err(vm("opening a blob"))?;
            let mut offset = 0;
            loop {
                let chunk = BlobChunk {
                    index: index as u16,
                    offset,
                };
                let piece = session.frame_pages() * crate::layout::PAGE_SIZE;
                let len = (blob.len - offset).min(piece).min(MAX_CHUNK as u64);
                body.clear();
                body.extend(chunk.encode());
                body.resize(BlobChunk::LEN + len as usize, 0);
                file.read_exact(&mut body[BlobChunk::LEN..])
                    .map_err(|error| SourceError::Blob {
                        name: blob.name.clone(),
                        error,
                    })?;
                session.send(Kind::Blob, &body, 0)?;
                offset += len;
                if offset >= blob.len {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Rounds with the guest running, until the rest fits. Returns how many.
    fn rounds(&mut self, session: &mut Session, memory: &mut Memory) -> Result<u64, SourceError> {
        let mut number = 0;
        let mut harvested_at = self.clock.now();
        loop {
            number += 1;
            let began = self.clock.now();
            let before = session.channel.sent_bytes();
            let pass = if number == 1 {
                Pass::First
            } else {
                Pass::Dirty
            };
            self.job.progress.begin_round(number);
            let sent = memory
                .send(pass, number, self.vm, session, &self.job.progress)
                .map_err(pass_error)?;
            let mark = session.mark(number)?;

            let harvest_began = self.clock.now();
            self.harvest(memory)?;
            let now = self.clock.now();
            session.convergence.costs.pause =
                now.saturating_sub(harvest_began) + self.job.costs.pause;
            let dirty = memory.pending.count();
            session
                .convergence
                .dirtied(dirty, now.saturating_sub(harvested_at));
            harvested_at = now;

            // Not before what was sent has arrived is it known what the stop would cost: the
            // rest would have to wait behind it.
            let mut decision = self.decide(session, dirty);
            if decision != Decision::AnotherRound || number == 1 {
                session.wait_for(mark)?;
                session.measure_bandwidth(number)?;
                self.harvest(memory)?;
                decision = self.decide(session, memory.pending.count());
            }
            let dirty = memory.pending.count();
            let round = Round {
                number,
                pages: sent.pages,
                zero: sent.zero,
                bytes: session.channel.sent_bytes() - before,
                time: self.clock.now().saturating_sub(began),
                dirty,
                dirty_rate: session.convergence.dirty_rate(),
                bandwidth: session.convergence.bandwidth.estimate().unwrap_or(0.0),
            };
            self.tell_round(session, &round, sent, dirty);
            match decision {
                Decision::SwitchOver => return Ok(number),
                Decision::AnotherRound => {}
                Decision::NeverFits => session.idle(IDLE)?,
            }
        }
    }

    fn harvest(&mut self, memory: &mut Memory) -> Result<(), SourceError> {
        self.vm
            .harvest_dirty(&mut memory.pending)
            .map_err(vm("reading the dirty log"))
    }

    fn decide(&self, session: &Session, rest: u64) -> Decision {
        let parameters = &self.job.parameters;
        session.convergence.decide(
            rest,
            parameters.downtime_limit(),
            parameters.avail_switchover_bandwidth(),
        )
    }

    fn tell_round(&self, session: &Session, round: &Round, sent: Sent, dirty: u64) {
        let assumed = self.job.parameters.avail_switchover_bandwidth();
        let expected = session.convergence.expected_downtime(dirty, assumed);
        let seconds = round.time.as_secs_f64().max(1e-6);
        self.job.progress.update(|snapshot| {
            snapshot.expected_downtime = expected;
            let ram = &mut snapshot.ram;
            ram.transferred = session.channel.sent_bytes();
            ram.remaining = dirty * crate::layout::PAGE_SIZE;
            ram.dirty_sync_count = round.number;
            ram.dirty_pages_rate = round.dirty_rate as u64;
            ram.pages_per_second = ((round.pages + round.zero) as f64 / seconds) as u64;
            ram.mbps = round.bytes as f64 * 8.0 / 1e6 / seconds;
        });
        tracing::debug!(
            round = round.number,
            pages = round.pages,
            zero = round.zero,
            skipped = sent.skipped,
            bytes = round.bytes,
            ms = round.time.as_millis(),
            dirty,
            ?expected,
            "round ended"
        );
        self.job.progress.end_round(*round);
    }

    /// Stops the guest and hands it over.
    fn switch_over(
        &mut self,
        session: &mut Session,
        memory: &mut Memory,
        round: u64,
    ) -> Result<Downtime, SourceError> {
        // The guest is not stopped for a migration that is over.
        session.channel.check_cancel()?;
        self.enter(Step::Stop);
        self.job.progress.set_status(Status::Device);
        let stop_began = self.clock.now();
        let deadline = Instant::now()
            + 2 * self.job.parameters.downtime_limit()
            + self.job.deadlines.stop_margin;
        session.channel.link().set_until(Some(deadline));
        session.stop_pacing();
        let pause = self.vm.pause().map_err(vm("stopping the guest"))?;
        self.owner = Owner::Stopped(pause);
        let bytes_before = session.channel.sent_bytes();
        // A guest that its user had paused long ago has no downtime but what is added here.
        let last_instruction = if pause.was_running {
            pause.last_instruction
        } else {
            stop_began
        };
        let stopped = self.clock.now();

        self.enter(Step::LastPages);
        self.job.progress.begin_round(round);
        self.harvest(memory)?;
        let sent = memory
            .send(Pass::Last, round, self.vm, session, &self.job.progress)
            .map_err(pass_error)?;
        let pages_sent = self.clock.now();

        self.enter(Step::Save);
        let sections = self.vm.save().map_err(vm("saving the state"))?;
        let saved = self.clock.now();

        self.enter(Step::Load);
        let mut body = Vec::new();
        for section in &sections {
            encode_state(section, &mut body).map_err(|error| SourceError::Vm {
                doing: "describing the state",
                error: format!("section '{}': {error}", section.name).into(),
            })?;
            session.send(Kind::State, &body, round)?;
        }
        End {
            sections: sections.len() as u32,
            was_running: pause.was_running,
        }
        .encode(&mut body);
        session.send(Kind::End, &body, round)?;
        session.receive(Kind::Ready)?;
        let ready_at = session.channel.arrived_at();
        let ready = session.channel.decode(Kind::Ready, Ready::decode)?;

        self.enter(Step::HandOver);
        let (go_sent, running) = self.hand_over(session, pause, last_instruction)?;
        let arrived = session.channel.arrived_at();

        // RUNNING comes half a round trip after the first instruction, more or less; the guest
        // can't have run later than that.
        let start = Duration::from_nanos(running.start_ns);
        let first_instruction = (go_sent + session.convergence.round_trip() / 2 + start)
            .min(arrived)
            .max(go_sent);
        let load = Duration::from_nanos(ready.load_ns).min(ready_at.saturating_sub(saved));
        let downtime = Downtime {
            total: first_instruction.saturating_sub(last_instruction),
            stop: stopped.saturating_sub(last_instruction),
            last_pages: pages_sent.saturating_sub(stopped),
            save: saved.saturating_sub(pages_sent),
            send: ready_at.saturating_sub(saved).saturating_sub(load),
            load,
            start: first_instruction.saturating_sub(ready_at),
        };
        let round = Round {
            number: round,
            pages: sent.pages,
            zero: sent.zero,
            bytes: session.channel.sent_bytes() - bytes_before,
            time: downtime.total,
            dirty: 0,
            dirty_rate: 0.0,
            bandwidth: session.convergence.bandwidth.estimate().unwrap_or(0.0),
        };
        self.job.progress.update(|snapshot| {
            snapshot.downtime = Some(downtime);
            let ram = &mut snapshot.ram;
            ram.transferred = session.channel.sent_bytes();
            ram.downtime_bytes = session.channel.sent_bytes() - bytes_before;
            ram.dirty_sync_count = round.number;
            ram.remaining = 0;
        });
        self.job.progress.end_round(round);
        Ok(downtime)
    }

    /// Sends GO and waits for what becomes of it. Returns when GO was sent, and the answer.
    fn hand_over(
        &mut self,
        session: &mut Session,
        pause: Pause,
        last_instruction: Duration,
    ) -> Result<(Duration, Running), SourceError> {
        self.vm
            .release()
            .map_err(vm("giving up what only one side may hold"))?;
        // From here on it is too late to cancel; it is the last moment at which it was not.
        if !self.job.cancel.commit() {
            let reason = self.job.cancel.cancelled().unwrap_or("cancelled");
            return Err(SourceError::Cancelled(reason.to_owned()));
        }
        let link = session.channel.link();
        link.ignore_cancel();
        link.set_until(Some(Instant::now() + self.job.deadlines.running));
        let now = self.clock.now();
        let stopped = if pause.was_running {
            now.saturating_sub(last_instruction)
        } else {
            Duration::ZERO
        };
        let mut body = Vec::new();
        Go {
            id: self.id,
            run: pause.was_running,
            stopped_ns: nanoseconds(stopped),
            round_trip_ns: nanoseconds(session.convergence.round_trip()),
        }
        .encode(&mut body);
        session.channel.send_go(&body).map_err(|(left, error)| {
            if left {
                self.owner = Owner::HandedOver(pause);
            }
            error
        })?;
        self.owner = Owner::HandedOver(pause);
        session.receive(Kind::Running)?;
        let running = session.channel.decode(Kind::Running, Running::decode);
        // Whatever else it says, it says that the guest is there.
        Ok((now, running.unwrap_or(Running { start_ns: 0 })))
    }

    /// Puts the guest where it belongs, tells the peer, and says how it ended.
    fn end(&mut self, result: Result<Downtime, SourceError>) -> Outcome {
        let error = match result {
            Ok(downtime) => {
                self.stop_logging();
                tracing::info!(id = ?self.id, downtime_us = downtime.total.as_micros(), "migration completed");
                self.job.progress.complete();
                return Outcome::Completed(downtime);
            }
            Err(error) => error,
        };
        // First of all the guest goes on, before anything that takes time.
        let failed_by_destination = matches!(
            error,
            SourceError::Channel(ChannelError::Peer {
                kind: Kind::Failed,
                ..
            })
        );
        let guest = match self.owner {
            Owner::Running => Guest::Untouched,
            Owner::HandedOver(_) if !failed_by_destination => return self.unknown(error),
            Owner::Stopped(pause) | Owner::HandedOver(pause) => match self.vm.resume(pause) {
                Ok(()) => Guest::Resumed,
                Err(error) => Guest::Stuck(error),
            },
        };
        let reason = error.cancelled().map(str::to_owned);
        if reason.is_some() {
            self.job.progress.set_status(Status::Cancelling);
        }
        self.stop_logging();
        let text = error.to_string();
        self.tell_peer(&error, &text);
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

    fn unknown(&mut self, error: SourceError) -> Outcome {
        self.stop_logging();
        self.job
            .progress
            .update(|snapshot| snapshot.error = Some(error.to_string()));
        tracing::error!(
            id = ?self.id,
            "the guest was handed over, but the destination has not confirmed that it runs ({error}): it stays stopped here, and may be running there"
        );
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
        if std::mem::take(&mut self.logging) {
            self.vm.stop_dirty_log();
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

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
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
