//! What happens while the guest runs: the offer, the blobs, and rounds until the rest fits.

use std::io::Read;
use std::time::{Duration, Instant};

use super::{Source, SourceError, pass_error, vm};
use crate::convergence::Decision;
use crate::frame::{Kind, MAX_CHUNK};
use crate::message::{Accept, BlobChunk, CAPABILITIES, Hello, Preamble};
use crate::progress::Round;
use crate::protocol::{NEWEST_VERSION, OLDEST_VERSION};
use crate::rounds::{Memory, Pass, Sent};
use crate::session::Session;
use crate::vm::Offer;

/// The pause between looks at a guest for which even an empty rest would not fit.
const IDLE: Duration = Duration::from_millis(100);

impl Source<'_> {
    pub(super) fn offer(
        &mut self,
        session: &mut Session,
        offer: &Offer,
    ) -> Result<(), SourceError> {
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

    pub(super) fn send_blobs(
        &mut self,
        session: &mut Session,
        offer: &Offer,
    ) -> Result<(), SourceError> {
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
    pub(super) fn rounds(
        &mut self,
        session: &mut Session,
        memory: &mut Memory,
    ) -> Result<u64, SourceError> {
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

    pub(super) fn harvest(&mut self, memory: &mut Memory) -> Result<(), SourceError> {
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
            session.tell(snapshot);
            let ram = &mut snapshot.ram;
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
}
