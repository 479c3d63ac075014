//! The side of a session that faces the connections beside its own: `multifd`.

use std::time::Instant;

use super::Session;
use crate::channel::ChannelError;
use crate::frame::Kind;
use crate::layout::PAGE_SIZE;
use crate::message::encode_barrier;
use crate::progress::{Compression, Multifd};
use crate::protocol::Phase;
use crate::rounds::Pass;
use crate::source::channels::{Channels, Totals, Unit};

/// What is known of the other connections.
#[derive(Default)]
pub(super) struct Others {
    channels: Option<Channels>,
    /// Whether they take the pages of this pass.
    in_pass: bool,
    /// What they had sent when they ended.
    ended: Totals,
    told: Option<Multifd>,
    /// Of what they sent or will, so many bytes count for the pace.
    charged: u64,
    /// How many frames they had sent at the last BARRIER.
    fenced: Vec<u64>,
}

impl Session {
    /// From here on pages may go on these.
    pub(crate) fn set_channels(&mut self, channels: Channels) {
        self.others.told = Some(channels.tell());
        self.others.channels = Some(channels);
    }

    /// There is one connection only, for that reason.
    pub(crate) fn set_no_channels(&mut self, why: &str) {
        tracing::warn!("multifd: all pages go on one connection: {why}");
        self.others.told = Some(Multifd {
            why_one: Some(why.to_owned()),
            ..Multifd::default()
        });
    }

    /// Breaks them off.
    pub(crate) fn drop_channels(&mut self) {
        self.others.channels = None;
    }

    /// A pass begins. Whether its pages go on other connections.
    pub(crate) fn begin_pass(&mut self, pass: Pass) -> bool {
        let wanted = self.wanted();
        // What the XBZRLE cache remembers has to be in the order of one connection.
        let possible = pass == Pass::First || wanted.xbzrle.is_none();
        let channels = self.others.channels.as_mut().filter(|_| possible);
        self.others.in_pass = channels.is_some();
        if let Some(channels) = channels {
            channels.begin_pass(pass, wanted, self.channel.sent_frames());
        }
        self.others.in_pass
    }

    /// Has a unit sent on another connection, in time.
    pub(crate) fn submit(&mut self, unit: Unit, round: u64) -> Result<(), ChannelError> {
        if unit.pages == 0 {
            return Ok(());
        }
        self.pace(round)?;
        self.begin();
        let (mut unit, held_back) = (Some(unit), self.held_back);
        self.wait_until(round, |channels| channels.submit(&mut unit, held_back))?;
        self.tend(round)
    }

    /// Waits until all that was submitted has been sent.
    pub(crate) fn wait_for_channels(&mut self, round: u64) -> Result<(), ChannelError> {
        self.wait_until(round, |channels| channels.is_idle())?;
        self.charge();
        Ok(())
    }

    /// Waits for the other connections, and looks after the first one meanwhile.
    fn wait_until(
        &mut self,
        round: u64,
        mut done: impl FnMut(&Channels) -> bool,
    ) -> Result<(), ChannelError> {
        loop {
            let Some(channels) = &self.others.channels else {
                return Ok(());
            };
            // Before the look: what happens after it rings again.
            channels.quiet();
            if let Some(failure) = channels.failure() {
                return Err(self.last_words(failure));
            }
            if done(channels) {
                return Ok(());
            }
            let end = Instant::now() + super::MARK_TIME;
            self.channel.wait_readable_or(channels.event(), end)?;
            self.tend(round)?;
        }
    }

    /// If a connection broke because the destination has failed, it says why on the first one.
    fn last_words(&mut self, failure: ChannelError) -> ChannelError {
        let end = Instant::now() + self.deadlines.linger;
        loop {
            match self.channel.receive_until(end) {
                Ok(Some(arrived)) if self.answer(arrived.kind).is_ok() => {}
                Err(said @ ChannelError::Peer { .. }) => return said,
                Err(cancelled) if cancelled.cancelled().is_some() => return cancelled,
                _ => return failure,
            }
        }
    }

    fn tend(&mut self, round: u64) -> Result<(), ChannelError> {
        self.charge();
        while let Some(arrived) = self.channel.receive_now()? {
            self.answer(arrived.kind)?;
        }
        self.mark_if_due(round)?;
        if let Some(channels) = &mut self.others.channels {
            channels.adapt();
        }
        Ok(())
    }

    /// Counts what the others send for the pace: what they have not sent yet as if it went as it
    /// is.
    fn charge(&mut self) {
        if let Some(channels) = &self.others.channels {
            let (_, sent) = channels.sent();
            let due = sent + channels.under_way() * PAGE_SIZE;
            self.pacing.sent(due.saturating_sub(self.others.charged));
            self.others.charged = due.max(self.others.charged);
        }
    }

    /// What follows on the first connection waits there for all that was sent on the others.
    /// Returns how many bytes that was.
    pub(super) fn barrier(&mut self) -> Result<u64, ChannelError> {
        let Some(channels) = &self.others.channels else {
            return Ok(self.others.ended.sent);
        };
        let (mut frames, bytes) = channels.sent();
        if frames != self.others.fenced && self.channel.phase() == Phase::Ram {
            self.others.fenced.clone_from(&frames);
            frames.insert(0, self.channel.sent_frames());
            encode_barrier(&frames, &mut self.body);
            self.channel.send(Kind::Barrier, &self.body)?;
        }
        Ok(bytes)
    }

    /// Ends the other connections, when all pages that go on them were sent: what follows here
    /// waits for them.
    pub(crate) fn end_channels(&mut self) -> Result<(), ChannelError> {
        self.barrier()?;
        if let Some(channels) = self.others.channels.take() {
            let (totals, told) = channels.finish();
            self.others.ended = totals;
            self.others.told = Some(told);
        }
        Ok(())
    }

    /// What went over other connections.
    pub(crate) fn elsewhere(&self) -> Totals {
        let channels = self.others.channels.as_ref();
        channels.map_or(self.others.ended, Channels::totals)
    }

    /// What users are told; `None` if nobody has asked for more connections.
    pub(super) fn multifd(&self) -> Option<Multifd> {
        let now = self.others.channels.as_ref().map(Channels::tell);
        now.or_else(|| self.others.told.clone())
    }

    /// What went compressed, on this connection (`own`) and on the others.
    pub(crate) fn compression(&self, own: Option<Compression>) -> Option<Compression> {
        match (own, self.elsewhere().compression) {
            (Some(own), Some(others)) => Some(Compression {
                active: match self.others.in_pass {
                    true => others.active,
                    false => own.active,
                },
                pages: own.pages + others.pages,
                bytes: own.bytes + others.bytes,
            }),
            (own, others) => own.or(others),
        }
    }
}
