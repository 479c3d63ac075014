//! Post-copy at the destination once the guest runs: the rest of its memory comes, over as many
//! connections as it takes.

use std::time::{Duration, Instant};

use super::late::{LateMemory, LateStats, Via};
use super::postcopy::Late;
use super::recovery::{Here, Rendezvous, Returning};
use super::unconfirmed::{Unconfirmed, confirm};
use super::{Destination, DestinationError, Job};
use crate::bitmap::PageRun;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::codec::Reader;
use crate::frame::Kind;
use crate::guest_io::MemoryError;
use crate::layout::PAGE_SIZE;
use crate::message::{AddressRun, decode_pages, decode_zero};
use crate::progress::{self, Status};
use crate::protocol::OutOfOrder;

/// How often what is waited for is looked at, while nothing comes.
const STEP: Duration = Duration::from_millis(20);

/// How often it is told how it goes.
const TELL: Duration = Duration::from_millis(20);

impl Destination<'_> {
    /// Takes in the rest of the guest's memory. `broken` is why the first connection is of no more
    /// use already. What is left to be done if the source may not know how it ended.
    pub(super) fn take_in_rest(
        &mut self,
        main: Channel,
        mut late: Late,
        broken: Option<ChannelError>,
    ) -> Option<Unconfirmed> {
        let memory = late.memory().map(std::sync::Arc::clone)?;
        let main = match broken {
            None => Ok(main),
            Some(error) => Err(error.to_string()),
        };
        match self.until_complete(main, &mut late, &memory) {
            Some(main) => self.complete(main, late, &memory),
            None => {
                let gone = late.rendezvous.control.ended();
                let reason = gone.map_or_else(String::new, |gone| gone.reason);
                late.rendezvous.control.finish();
                tell_memory(&memory, self.job);
                let missing = memory.missing();
                tracing::error!(id = ?late.rendezvous.id, missing, "post-copy ends early: {reason}");
                self.job
                    .progress
                    .update(|snapshot| snapshot.error = Some(reason));
                self.job.progress.set_status(Status::Failed);
                None
            }
        }
    }

    /// All is here: the guest is like any other from now on. Tells the source, if that is possible.
    fn complete(
        &self,
        main: Result<Channel, String>,
        late: Late,
        memory: &LateMemory,
    ) -> Option<Unconfirmed> {
        let Rendezvous {
            id, ref control, ..
        } = late.rendezvous;
        tell_memory(memory, self.job);
        let told = main.and_then(|mut main| {
            // Whoever breaks the connection now breaks it behind this.
            main.link().ignore_cancel();
            let told = main.send(Kind::Complete, &[]);
            told.map_err(|error| error.to_string())?;
            Ok(main)
        });
        if let Err(error) = memory.finish() {
            tracing::warn!(?id, "the guest's memory stays watched: {error}");
        }
        tracing::info!(?id, stats = ?memory.stats(), "all of the guest's memory is here");
        // One of its own: that the source ends its fault channel breaks nothing any more.
        let told = told.and_then(|main| {
            let breaker = Cancel::new().map_err(|error| error.to_string())?;
            Ok((main, breaker))
        });
        control.complete(told.as_ref().ok().map(|(_, breaker)| breaker.clone()));
        let confirmed = told.and_then(|(mut main, breaker)| {
            main.link().set_cancel(breaker);
            confirm(&mut main).map_err(|error| error.to_string())
        });
        match confirmed {
            Ok(()) => {
                control.finish();
                None
            }
            Err(reason) => {
                let pages = memory.memory().layout().pages();
                Some(Unconfirmed::new(late.end(), pages, &reason))
            }
        }
    }

    /// The connection over which the source said in the end that it was all, or why there is none;
    /// `None` if nobody waits any more.
    fn until_complete(
        &mut self,
        mut main: Result<Channel, String>,
        late: &mut Late,
        memory: &LateMemory,
    ) -> Option<Result<Channel, String>> {
        loop {
            let reason = match main {
                Ok(mut channel) => {
                    channel.enter_late();
                    channel.link().set_until(None);
                    channel.link().set_cancel(late.breaker.clone());
                    late.rendezvous.control.activate(late.breaker.clone());
                    let error = match self.place_all(&mut channel, late, memory) {
                        Ok(()) => return Some(Ok(channel)),
                        Err(error) => error.to_string(),
                    };
                    if let Some(gone) = late.rendezvous.control.ended() {
                        gone.encode(&mut self.body);
                        channel.link().ignore_cancel();
                        let _ = channel.send_now(Kind::Gone, &self.body);
                        channel.linger(Instant::now() + self.job.deadlines.linger);
                        return None;
                    }
                    channel.shut_down();
                    error
                }
                Err(error) => error,
            };
            let _ = late.breaker.cancel(&reason);
            tell_memory(memory, self.job);
            if memory.is_complete() {
                return Some(Err(reason));
            }
            let (id, missing) = (late.rendezvous.id, memory.missing());
            tracing::error!(
                ?id,
                "post-copy is paused: {reason}. {missing} pages of the guest's memory are missing; \
                 it stops where it needs one. Recover with migrate_recover here and migrate -r at \
                 the source; if the source is dead, the guest is lost"
            );
            let here = Here::Part(memory);
            late.rendezvous.control.paused(here.describe(&reason));
            let Returning {
                main: channel,
                faults,
                breaker,
            } = late.rendezvous.meet(&here)?;
            if let Some(thread) = late.faults() {
                thread.attach(faults, breaker.clone());
            }
            late.breaker = breaker;
            tracing::info!(?id, missing, "post-copy goes on");
            self.job.progress.update(|snapshot| snapshot.error = None);
            main = Ok(channel);
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
        loop {
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
                    return self.wait_complete(channel, late, memory);
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
        tracing::debug!(id = ?late.rendezvous.id, "all has come");
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
    let checked = memory.is_checked();
    channel.decode(kind, |body| {
        decode_pages(body, payload_len, checked, runs, crcs)
    })?;
    let pages = resolve(memory, runs)?;
    channel.receive_data(payload_len as usize, data)?;
    memory.place(&pages, data, crcs, via)?;
    Ok(())
}

fn resolve(memory: &LateMemory, runs: &[AddressRun]) -> Result<Vec<PageRun>, MemoryError> {
    let resolve = |run: &AddressRun| memory.memory().resolve(*run);
    runs.iter().map(resolve).collect()
}

pub(super) fn tell_memory(memory: &LateMemory, job: &Job) {
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
