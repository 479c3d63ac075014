//! What happens while the guest runs: the offer, the blobs, and rounds until the rest fits.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::channels::{Channels, Setup};
use super::{Contents, Next, Source, SourceError, blocks_error, pass_error, vm};
use crate::convergence::refinement::Refinement;
use crate::convergence::{Decision, Rest};
use crate::frame::{Kind, MAX_CHUNK};
use crate::guest_io::GuestPages;
use crate::message::{
    Accept, BLOCK_MIGRATION, BlobChunk, CAPABILITIES, Hello, MULTIFD, POSTCOPY, Preamble, UNCHECKED,
};
use crate::postcopy::Control;
use crate::progress::Round;
use crate::protocol::{NEWEST_VERSION, OLDEST_VERSION};
use crate::rounds::{Pass, Sent};
use crate::session::{Hurry, Session};
use crate::uri::Uri;
use crate::vm::Offer;

/// The pause between looks at a guest for which even an empty rest would not fit.
const IDLE: Duration = Duration::from_millis(100);

impl Source<'_> {
    pub(super) fn offer(
        &mut self,
        session: &mut Session,
        offer: &Offer,
        has_address: bool,
    ) -> Result<(), SourceError> {
        let multifd = self.job.parameters.multifd().filter(|_| has_address);
        let mut optional = CAPABILITIES;
        if multifd.is_none() {
            optional &= !MULTIFD;
        }
        if self.job.parameters.page_checksum() {
            optional &= !UNCHECKED;
        }
        let hello = Hello {
            id: self.id,
            required: self.required(offer),
            optional,
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
            || capabilities & !optional != 0
        {
            return Err(SourceError::Accept(format!("{accept:?}")));
        }
        session.set_picked(capabilities);
        if optional & !capabilities & UNCHECKED != 0 {
            tracing::info!("pages go with checksums: the destination takes none without");
        }
        if self.job.parameters.zero_copy_send() {
            session.channel.enable_zero_copy();
        }
        Ok(())
    }

    fn required(&self, offer: &Offer) -> u32 {
        let disks = if offer.disks.is_empty() {
            0
        } else {
            BLOCK_MIGRATION
        };
        let late = if self.job.postcopy.is_some() {
            POSTCOPY
        } else {
            0
        };
        disks | late
    }

    /// Begins to make the connections that the user wants for pages, if that is possible.
    pub(super) fn connect_more(
        &self,
        session: &mut Session,
        uri: Option<&Uri>,
        memory: &Arc<GuestPages>,
    ) -> Result<(), SourceError> {
        let Some(count) = self.job.parameters.multifd() else {
            return Ok(());
        };
        let Some(uri) = uri else {
            session.set_no_channels("there is no address to which more could be made");
            return Ok(());
        };
        if !session.picked(MULTIFD) {
            session.set_no_channels("the destination does not know multifd");
            return Ok(());
        }
        let setup = Setup {
            uri: uri.clone(),
            id: self.id,
            deadlines: self.job.deadlines.clone(),
            clock: Arc::clone(&self.clock),
            memory: Arc::clone(memory),
            round_trip: session.convergence.round_trip(),
            zero_copy: self.job.parameters.zero_copy_send(),
        };
        let count = count.get();
        let channels = Channels::start(setup, count.into(), self.job.parameters.multifd_all())
            .map_err(|error| SourceError::Multifd { count, error })?;
        session.set_channels(channels);
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

    /// Rounds with the guest running, until the rest fits or is to come later. Returns how many. A round is over the
    /// dirty blocks, then over the dirty pages: the blocks that were written in the bulk pass
    /// come before all of memory.
    pub(super) fn rounds(
        &mut self,
        session: &mut Session,
        guest: &mut Contents,
    ) -> Result<(u64, Next), SourceError> {
        let mut number = 0;
        let mut refinement = Refinement::default();
        let control = self.job.postcopy.clone();
        let forced = self.pressure.forced();
        let is_forced = self.pressure.hurry();
        // Disks have to be complete before post-copy, so their blocks keep the pace.
        let is_hurried: Hurry = Arc::new({
            let is_forced = Arc::clone(&is_forced);
            move || is_forced() || control.as_ref().is_some_and(Control::is_started)
        });
        guest.disks.harvest();
        let mut harvested_at = self.clock.now();
        loop {
            number += 1;
            let began = self.clock.now();
            let before = session.sent_bytes();
            let pass = if number == 1 {
                Pass::First
            } else {
                Pass::Dirty
            };
            let progress = &self.job.progress;
            progress.begin_round(number);
            session.hurry_if(&is_forced);
            let blocks = guest
                .disks
                .send_pending(number, session, progress)
                .map_err(blocks_error)?;
            let blocks_time = self.clock.now().saturating_sub(began);
            session.hurry_if(&is_hurried);
            let sent = guest
                .memory
                .send(pass, number, self.vm, session, progress, &*is_hurried)
                .map_err(pass_error)?;
            let mark = session.mark(number)?;
            guest.disks.flush(number, session, progress)?;

            let release_began = self.clock.now();
            self.vm
                .prepare_release()
                .map_err(vm("writing back what the guest has written"))?;
            let harvest_began = self.clock.now();
            session
                .convergence
                .release_took(harvest_began.saturating_sub(release_began));
            let dirty = self.harvest(guest)?;
            let now = self.clock.now();
            session.convergence.costs.pause =
                now.saturating_sub(harvest_began) + self.job.costs.pause;
            session
                .convergence
                .dirtied(dirty, now.saturating_sub(harvested_at));
            harvested_at = now;

            // Not before what was sent has arrived is it known what the stop would cost: the
            // rest would have to wait behind it.
            let mut rest = dirty;
            let mut decision = self.decide(session, rest);
            if decision != Decision::AnotherRound || number == 1 {
                session.wait_for(mark)?;
                session.measure_bandwidth(number)?;
                rest = self.harvest(guest)?;
                decision = self.decide(session, rest);
            }
            let round = Round {
                number,
                pages: sent.pages,
                zero: sent.zero,
                block_bytes: blocks.data + blocks.zero,
                bytes: session.sent_bytes() - before,
                time: self.clock.now().saturating_sub(began),
                dirty: rest.pages,
                dirty_block_bytes: rest.block_bytes,
                dirty_rate: session.convergence.dirty_rate(),
                bandwidth: session.convergence.bandwidth.estimate().unwrap_or(0.0),
            };
            self.tell_blocks(session, &round, blocks, blocks_time);
            self.tell_round(session, &round, sent);
            // Dirty pages can't be more than the guest writes to: if it writes to all of them in
            // every round, however long that is, its rate tells nothing.
            let shrinks = rest.pages * 10 < (sent.pages + sent.zero) * 9;
            let converges = match decision {
                Decision::SwitchOver => true,
                Decision::AnotherRound => number == 1 || shrinks,
                Decision::NeverFits => number == 1,
            };
            if self.wants_postcopy(number, converges) && self.disks_fit(session, rest) {
                return Ok((number, Next::Postcopy));
            }
            if forced.load(Ordering::Relaxed) {
                return Ok((number, Next::SwitchOver));
            }
            match decision {
                Decision::SwitchOver => {
                    if !self.is_worth_a_round(&mut refinement, session, rest) {
                        return Ok((number, Next::SwitchOver));
                    }
                }
                Decision::AnotherRound => {
                    refinement.does_not_fit();
                    self.slow_down(session, &round, sent.skipped)?;
                }
                Decision::NeverFits => {
                    refinement.does_not_fit();
                    session.idle(IDLE)?;
                }
            }
        }
    }

    /// Whether to make the stop shorter by another round, though the rest fits.
    fn is_worth_a_round(&self, refinement: &mut Refinement, session: &Session, rest: Rest) -> bool {
        let assumed = self.job.parameters.avail_switchover_bandwidth();
        let elapsed = self.job.progress.snapshot().total_time;
        let prospect = session.convergence.prospect(rest, assumed, elapsed);
        prospect.is_some_and(|prospect| refinement.is_worth_a_round(prospect))
    }

    /// Whether the rest of memory is to come after the guest: it was asked for, or so many rounds,
    /// so much time, or rounds that lead nowhere say so.
    fn wants_postcopy(&self, round: u64, converges: bool) -> bool {
        let Some(control) = &self.job.postcopy else {
            return false;
        };
        let parameters = &self.job.parameters;
        let rounds = parameters.postcopy_after_rounds();
        let after = parameters.postcopy_after_time();
        let wanted = control.is_started()
            || rounds > 0 && round >= rounds
            || after.is_some_and(|after| self.job.progress.snapshot().total_time >= after)
            || parameters.postcopy_no_convergence() && !converges;
        if wanted && !control.is_started() {
            tracing::info!(id = ?self.id, round, "post-copy starts by itself");
            // Whatever the next round finds, the decision stays.
            control.start();
        }
        wanted
    }

    /// Disks have to be complete when the guest moves.
    fn disks_fit(&self, session: &Session, rest: Rest) -> bool {
        let rest = Rest { pages: 0, ..rest };
        rest.block_bytes == 0 || self.decide(session, rest) == Decision::SwitchOver
    }

    /// Adds to what is pending what the guest wrote; returns all that is pending.
    pub(super) fn harvest(&mut self, guest: &mut Contents) -> Result<Rest, SourceError> {
        guest.disks.harvest();
        self.vm
            .harvest_dirty(&mut guest.memory.pending)
            .map_err(vm("reading the dirty log"))?;
        Ok(Rest {
            pages: guest.memory.pending.count(),
            block_bytes: guest.disks.pending_bytes(),
        })
    }

    fn decide(&self, session: &Session, rest: Rest) -> Decision {
        let parameters = &self.job.parameters;
        session.convergence.decide(
            rest,
            parameters.downtime_limit(),
            parameters.avail_switchover_bandwidth(),
        )
    }

    fn tell_round(&self, session: &Session, round: &Round, sent: Sent) {
        let assumed = self.job.parameters.avail_switchover_bandwidth();
        let dirty = round.dirty;
        let rest = Rest {
            pages: dirty,
            block_bytes: round.dirty_block_bytes,
        };
        let expected = session.convergence.expected_downtime(rest, assumed);
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
            block_bytes = round.block_bytes,
            bytes = round.bytes,
            ms = round.time.as_millis(),
            dirty,
            dirty_block_bytes = round.dirty_block_bytes,
            ?expected,
            "round ended"
        );
        self.job.progress.end_round(*round);
    }
}
