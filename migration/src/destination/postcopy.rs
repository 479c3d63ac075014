//! Post-copy at the destination: the guest runs here, and its memory follows. See docs/design.md.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::faults::FaultThread;
use super::late::{LateMemory, LateStats, Via};
use super::recovery::recover;
use super::{Destination, DestinationError, Job};
use crate::bitmap::PageRun;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::codec::Reader;
use crate::frame::Kind;
use crate::guest_io::MemoryError;
use crate::layout::PAGE_SIZE;
use crate::link::Link;
use crate::listener::{Awaited, ListenError, Listener};
use crate::message::{
    AddressRun, Hello, Id, Missing, POSTCOPY, decode_bits, decode_pages, decode_zero, encode_reason,
};
use crate::placement::Placement;
use crate::postcopy::Control;
use crate::priority::Background;
use crate::progress::{self, Status};
use crate::protocol::OutOfOrder;
use crate::userfault::Userfault;

/// How often what is waited for is looked at, while nothing comes.
const STEP: Duration = Duration::from_millis(20);

/// How often it is told how it goes.
const TELL: Duration = Duration::from_millis(20);

/// A migration that may go over into post-copy.
pub(super) struct Late {
    pub(super) id: Id,
    pub(super) control: Control<Listener>,
    /// Breaks the connection in use.
    pub(super) breaker: Cancel,
    /// The fault channel until memory is missing.
    joined: Option<Channel>,
    switched: Option<Switched>,
    /// The number of the last connection.
    pub(super) attempt: u32,
}

/// What there is once the destination knows that memory will be missing.
struct Switched {
    memory: Arc<LateMemory>,
    faults: FaultThread,
}

/// How post-copy ended.
enum LateEnd {
    Complete,
    Abandoned(String),
}

impl Late {
    /// Checks whether post-copy is possible here, if the source may want it.
    pub(super) fn check(hello: &Hello, job: &Job) -> Result<Option<Control<Listener>>, String> {
        if hello.required & POSTCOPY == 0 {
            return Ok(None);
        }
        let Some(control) = job.postcopy.clone() else {
            return Err(
                "the source may go over into post-copy, which is not enabled here: set the \
                 capability postcopy-ram at both sides"
                    .to_owned(),
            );
        };
        Userfault::probe().map_err(|error| format!("post-copy is not possible here: {error}"))?;
        Ok(Some(control))
    }

    /// Checks that guest memory can be dropped here, as it will be at the switch, while nothing is
    /// in it yet.
    pub(super) fn check_memory(placement: &Placement) -> Result<(), String> {
        placement.drop_all().map_err(|error| {
            format!(
                "post-copy is not possible here: {error}; unlock it, or switch the capability \
                 postcopy-ram off at both sides"
            )
        })
    }

    /// Waits for the fault channel, which the source connects once it is accepted.
    pub(super) fn join(
        control: Control<Listener>,
        id: Id,
        listener: Option<Listener>,
        main: &mut Channel,
        destination: &Destination<'_>,
    ) -> Result<Self, DestinationError> {
        let job = destination.job;
        let mut listener = listener.ok_or(ListenError::Nobody)?;
        let awaited = Awaited {
            kind: Kind::Join,
            id,
            attempts: 0..=0,
            until: Some(Instant::now() + job.deadlines.handshake),
            beside: Some(main.fd()),
        };
        let returned = listener.accept_returning(awaited, &job.cancel, &job.deadlines);
        if let Err(ListenError::Nobody) = returned {
            // The source may have said why.
            main.try_receive()?;
        }
        let returned = returned?;
        let breaker = Cancel::new().map_err(DestinationError::Resources)?;
        let link = Link::new(returned.stream, breaker.clone(), &job.deadlines)
            .map_err(ChannelError::from)?;
        let channel = Channel::returned(link, Arc::clone(&destination.clock), Kind::Join)
            .map_err(ChannelError::from)?;
        Ok(Self {
            id,
            control,
            breaker,
            joined: Some(channel),
            switched: None,
            attempt: 0,
        })
    }

    /// Whether memory is missing.
    pub(super) fn is_switched(&self) -> bool {
        self.switched.is_some()
    }

    /// MISSING: drops the pages that it names.
    pub(super) fn drop_missing(&self, channel: &Channel) -> Result<(), DestinationError> {
        if let Some(memory) = self.memory() {
            let (first, words) = channel.decode(Kind::Missing, |body| {
                decode_bits(body, memory.memory().layout().pages())
            })?;
            memory.drop_pages(first, &words)?;
        }
        Ok(())
    }

    /// LATE: what is missing is what the source has told, and nothing was damaged.
    pub(super) fn check_told(&self, told: Missing) -> Result<(), DestinationError> {
        if let Some(memory) = self.memory() {
            memory.check_suspects()?;
            let (ours, theirs) = (memory.missing(), told.pages);
            if ours != theirs {
                return Err(DestinationError::Disagreement { ours, theirs });
            }
        }
        Ok(())
    }

    /// Fails if the fault channel broke: whoever waited for memory has been let go without it.
    pub(super) fn check_connected(&self) -> Result<(), DestinationError> {
        match self.breaker.cancelled() {
            Some(reason) => Err(DestinationError::Broken(reason.to_owned())),
            None => Ok(()),
        }
    }

    /// From here on whoever waits for memory waits until it comes. A connection that is broken
    /// already is no reason to fail: the source has handed over, and can be asked again. But nobody
    /// may have been let go without the memory that they waited for.
    pub(super) fn guest_runs(&self, job: &Job) -> Result<(), DestinationError> {
        if let Some(switched) = &self.switched {
            if !switched.faults.guest_runs() {
                let reason = self.breaker.cancelled().unwrap_or_default();
                return Err(DestinationError::Broken(reason.to_owned()));
            }
            switched.memory.guest_runs();
            tell_memory(&switched.memory, job);
        }
        Ok(())
    }

    /// It will not run after all: whoever waits for memory is let go without it.
    pub(super) fn guest_never_runs(&self) {
        if let Some(switched) = &self.switched {
            switched.memory.guest_never_runs();
        }
    }

    pub(super) fn memory(&self) -> Option<&Arc<LateMemory>> {
        self.switched.as_ref().map(|switched| &switched.memory)
    }

    pub(super) fn faults(&self) -> Option<&FaultThread> {
        self.switched.as_ref().map(|switched| &switched.faults)
    }

    /// The first MISSING: from here on what is not there is waited for.
    pub(super) fn switch(
        &mut self,
        placement: Placement,
        destination: &Destination<'_>,
    ) -> Result<(), DestinationError> {
        let (memory, missing, suspect) = placement.into_parts();
        let threads = destination.vm.vcpu_threads();
        let memory = Arc::new(LateMemory::new(
            memory,
            missing,
            suspect,
            &threads,
            Arc::clone(&destination.clock),
        )?);
        let clock = Arc::clone(&destination.clock);
        let patience = destination.job.deadlines.progress;
        let faults = FaultThread::start(Arc::clone(&memory), clock, patience)
            .map_err(DestinationError::Resources)?;
        if let Some(channel) = self.joined.take() {
            faults.attach(channel, self.breaker.clone());
        }
        self.switched = Some(Switched { memory, faults });
        Ok(())
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        let _ = self.breaker.cancel("the migration is over");
        if let Some(switched) = self.switched.take() {
            switched.faults.end();
        }
    }
}

impl Destination<'_> {
    /// Takes in the rest of the guest's memory, over as many connections as it takes. `broken` is
    /// why the first one is of no more use already.
    pub(super) fn run_late(&mut self, main: Channel, mut late: Late, broken: Option<ChannelError>) {
        let Some(memory) = late.memory().map(Arc::clone) else {
            return;
        };
        let end = self.take_in_late(main, &mut late, &memory, broken);
        late.control.finish();
        let _ = late.breaker.cancel("post-copy is over");
        if let Some(switched) = late.switched.take() {
            switched.faults.end();
        }
        tell_memory(&memory, self.job);
        match end {
            LateEnd::Complete => {
                if let Err(error) = memory.finish() {
                    tracing::warn!(id = ?late.id, "the guest's memory stays watched: {error}");
                }
                self.job.progress.update(|snapshot| snapshot.error = None);
                tracing::info!(id = ?late.id, stats = ?memory.stats(), "all of the guest's memory is here");
                self.job.progress.set_status(Status::Completed);
            }
            LateEnd::Abandoned(reason) => {
                let missing = memory.missing();
                tracing::error!(id = ?late.id, missing, "post-copy ends early: {reason}");
                self.job
                    .progress
                    .update(|snapshot| snapshot.error = Some(reason));
                self.job.progress.set_status(Status::Failed);
            }
        }
    }

    fn take_in_late(
        &mut self,
        main: Channel,
        late: &mut Late,
        memory: &LateMemory,
        broken: Option<ChannelError>,
    ) -> LateEnd {
        let mut why = broken.map(|error| error.to_string());
        let mut main = Some(main);
        loop {
            if let (Some(mut channel), None) = (main.take(), &why) {
                channel.enter_late();
                channel.link().set_until(None);
                channel.link().set_cancel(late.breaker.clone());
                late.control.activate(late.breaker.clone());
                match self.place_all(&mut channel, late, memory) {
                    Ok(()) => {
                        channel.linger(Instant::now() + self.job.deadlines.linger);
                        return LateEnd::Complete;
                    }
                    Err(error) => why = Some(error.to_string()),
                }
                if let Some(reason) = late.control.ended() {
                    encode_reason(&reason, &mut self.body);
                    channel.link().ignore_cancel();
                    let _ = channel.send_now(Kind::Gone, &self.body);
                    channel.linger(Instant::now() + self.job.deadlines.linger);
                    return LateEnd::Abandoned(reason);
                }
                channel.shut_down();
            }
            let reason = why.take().unwrap_or_default();
            let _ = late.breaker.cancel(&reason);
            tell_memory(memory, self.job);
            if memory.is_complete() {
                tracing::warn!(id = ?late.id, "all has arrived, but the source may not know: {reason}");
                return LateEnd::Complete;
            }
            if let Some(reason) = late.control.ended() {
                return LateEnd::Abandoned(reason);
            }
            let missing = memory.missing();
            tracing::error!(
                id = ?late.id,
                "post-copy is paused: {reason}. {missing} pages of the guest's memory are missing; \
                 it stops where it needs one. Recover with migrate_recover here and migrate -r at \
                 the source; if the source is dead, the guest is lost"
            );
            self.job.progress.update(|snapshot| {
                snapshot.error = Some(format!("{reason}; {missing} pages are missing"));
            });
            late.control.paused();
            let Some((listener, breaker)) = late.control.wait() else {
                let reason = late.control.ended().unwrap_or_default();
                return LateEnd::Abandoned(reason);
            };
            late.breaker = breaker;
            match recover(late, memory, listener, &self.clock, &self.job.deadlines) {
                Ok(channel) => {
                    tracing::info!(id = ?late.id, missing, "post-copy goes on");
                    self.job.progress.update(|snapshot| snapshot.error = None);
                    main = Some(channel);
                }
                Err(error) => why = Some(error.to_string()),
            }
        }
    }

    /// The stream, until all has come.
    fn place_all(
        &mut self,
        channel: &mut Channel,
        late: &Late,
        memory: &LateMemory,
    ) -> Result<(), DestinationError> {
        let (mut runs, mut crcs, mut data) = (Vec::new(), Vec::new(), Vec::new());
        let mut told_at = Instant::now();
        let mut background = Background::new();
        loop {
            background.give_way();
            let arrived = channel.receive()?;
            match arrived.kind {
                Kind::Pages | Kind::Zero => {
                    receive_late(
                        channel,
                        arrived.kind,
                        arrived.payload_len,
                        memory,
                        Via::Stream,
                        (&mut runs, &mut crcs, &mut data),
                    )?;
                }
                Kind::Pushed => {
                    channel.decode(Kind::Pushed, |body| Reader::new(body).end())?;
                    self.wait_complete(channel, late, memory)?;
                    channel.send(Kind::Complete, &[])?;
                    return Ok(());
                }
                kind => {
                    let phase = channel.phase();
                    return Err(ChannelError::from(OutOfOrder { kind, phase }).into());
                }
            }
            if told_at.elapsed() >= TELL {
                tell_memory(memory, self.job);
                told_at = Instant::now();
            }
        }
    }

    /// What was asked for may still be on its way over the fault channel.
    fn wait_complete(
        &self,
        channel: &Channel,
        late: &Late,
        memory: &LateMemory,
    ) -> Result<(), DestinationError> {
        let (mut missing, mut since) = (memory.missing(), Instant::now());
        while !memory.wait_complete(STEP) {
            channel.check_cancel()?;
            let now = memory.missing();
            if now < missing {
                (missing, since) = (now, Instant::now());
            }
            if since.elapsed() >= self.job.deadlines.progress {
                return Err(DestinationError::NeverPushed(missing));
            }
        }
        tracing::debug!(id = ?late.id, "all has come");
        Ok(())
    }
}

/// Receives and places a PAGES or ZERO frame.
pub(super) fn receive_late(
    channel: &mut Channel,
    kind: Kind,
    payload_len: u32,
    memory: &LateMemory,
    via: Via,
    (runs, crcs, data): (&mut Vec<AddressRun>, &mut Vec<u32>, &mut Vec<u8>),
) -> Result<(), DestinationError> {
    if kind == Kind::Zero {
        channel.decode(kind, |body| decode_zero(body, runs))?;
        memory.zero(&resolve(memory, runs)?)?;
        return Ok(());
    }
    channel.decode(kind, |body| decode_pages(body, payload_len, runs, crcs))?;
    let pages = resolve(memory, runs)?;
    channel.receive_data(payload_len as usize, data)?;
    memory.place(&pages, data, crcs, via)?;
    Ok(())
}

fn resolve(memory: &LateMemory, runs: &[AddressRun]) -> Result<Vec<PageRun>, MemoryError> {
    let resolve = |run: &AddressRun| memory.memory().resolve(*run);
    runs.iter().map(resolve).collect()
}

fn tell_memory(memory: &LateMemory, job: &Job) {
    let stats = memory.stats();
    let phase_time = memory.late_time();
    let bytes = (stats.from_stream + stats.from_requests + stats.duplicates) * PAGE_SIZE;
    job.progress.update(|snapshot| {
        let postcopy = snapshot.postcopy.get_or_insert_default();
        snapshot.ram.remaining = stats.missing * PAGE_SIZE;
        snapshot.ram.transferred += bytes.saturating_sub(postcopy.bytes);
        postcopy.bytes = bytes;
        postcopy.phase_time = phase_time;
        tell(stats, postcopy);
    });
}

fn tell(stats: LateStats, into: &mut progress::Postcopy) {
    into.requests = stats.requested;
    into.requested_pages = stats.requested;
    into.missing_pages = stats.missing;
    into.confirmed = true;
    into.blocktime = Some(stats.block_time);
    into.latency_average = (stats.latency.faults > 0).then(|| stats.latency.average());
    into.latency_max = (stats.latency.faults > 0).then_some(stats.latency.longest);
    into.latency_distribution = stats.latency.distribution.to_vec();
    into.vcpu_blocktime = stats.vcpu_block_time;
}
