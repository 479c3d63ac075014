//! What happens while the guest is stopped: the last blocks and pages, the state, and the
//! hand-over.

use std::time::{Duration, Instant};

use super::{Contents, Late, Owner, Source, SourceError, Step, blocks_error, pass_error, vm};
use crate::frame::Kind;
use crate::message::{End, Go, Ready, Running, encode_state};
use crate::progress::{Downtime, Round, Status};
use crate::rounds::{Pass, Sent};
use crate::session::Session;
use crate::vm::Pause;

/// A stop that is expected to be shorter is told of when it is over: what that wakes up would take
/// CPUs from it.
const BRIEF: Duration = Duration::from_millis(100);

impl Source<'_> {
    /// Stops the guest and hands it over; with `late`, without the memory that is left.
    pub(super) fn switch_over(
        &mut self,
        session: &mut Session,
        guest: &mut Contents,
        round: u64,
        mut late: Option<&mut Late>,
    ) -> Result<Downtime, SourceError> {
        self.stop_timeout();
        // The guest is not stopped for a migration that is over.
        session.channel.check_cancel()?;
        self.enter(Step::Stop);
        let estimate = self.job.progress.snapshot().expected_downtime;
        let expected = estimate.filter(|_| late.is_none());
        let brief = late.is_some() || expected.is_some_and(|expected| expected < BRIEF);
        if brief {
            self.job.progress.hold();
        }
        self.job.progress.set_status(Status::Device);
        let stop_began = self.clock.now();
        let deadline = Instant::now()
            + 2 * self.job.parameters.downtime_limit()
            + self.job.deadlines.stop_margin;
        // Forced, it may take as long as it does, as long as something moves.
        let until = (!self.pressure.is_forced()).then_some(deadline);
        session.channel.link().set_until(until);
        session.stop_pacing();
        let pause = self.vm.pause(brief).map_err(vm("stopping the guest"))?;
        self.owner = Owner::Stopped(pause);
        // Not before: it would write all the faster until it stops. For a guest that stands still
        // it is a few stores.
        self.unthrottle();
        let bytes_before = session.sent_bytes();
        let blocks_before = session.channel.sent_blocks();
        // A guest that its user had paused long ago has no downtime but what is added here.
        let last_instruction = if pause.was_running {
            pause.last_instruction
        } else {
            stop_began
        };
        let stopped = self.clock.now();

        self.enter(Step::LastBlocks);
        let progress = &self.job.progress;
        progress.begin_round(round);
        self.harvest(guest)?;
        let blocks = guest
            .disks
            .send_pending(round, session, progress)
            .map_err(blocks_error)?;
        self.enter(Step::LastPages);
        let sent = match late.as_deref_mut() {
            Some(late) => {
                self.tell_late(session, guest, late)?;
                Sent::default()
            }
            None => guest
                .memory
                .send(Pass::Last, round, self.vm, session, progress, &|| false)
                .map_err(pass_error)?,
        };
        session.end_channels()?;
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
            session.send_followed(Kind::State, &body, round)?;
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
        if let Some(late) = late {
            late.check_connected()?;
        }
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
            expected,
        };
        let round = Round {
            number: round,
            pages: sent.pages,
            zero: sent.zero,
            block_bytes: blocks.data + blocks.zero,
            bytes: session.sent_bytes() - bytes_before,
            time: downtime.total,
            dirty: 0,
            dirty_block_bytes: 0,
            dirty_rate: 0.0,
            bandwidth: session.convergence.bandwidth.estimate().unwrap_or(0.0),
        };
        self.job.progress.update(|snapshot| {
            snapshot.downtime = Some(downtime);
            session.tell(snapshot);
            let blocks_bytes = session.channel.sent_blocks() - blocks_before;
            if let Some(disk) = &mut snapshot.disk {
                disk.downtime_bytes = blocks_bytes;
                disk.dirty_sync_count = round.number;
                disk.remaining = 0;
            }
            let ram = &mut snapshot.ram;
            ram.downtime_bytes = session.sent_bytes() - bytes_before - blocks_bytes;
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
}

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}
