//! The stream of what is left, from where the guest waited last.

use std::time::{Duration, Instant};

use super::super::Source;
use super::pages::Frames;
use super::{Late, LateError};
use crate::channel::{Channel, ChannelError};
use crate::codec::Reader;
use crate::frame::Kind;
use crate::message::Gone;
use crate::pacing::{Pacing, pages_per_frame};

/// How many pages go at a time: a request changes where the stream goes on after as many at most.
const RUN: u64 = 64;

/// How often it is told how it goes.
const TELL: Duration = Duration::from_millis(20);

/// What the destination says in the end.
pub(super) enum Over {
    /// It has everything.
    Complete,
    /// It needs no more.
    Gone(Gone),
}

impl Source<'_> {
    /// Pushes until the destination says that it is over.
    pub(super) fn push(&self, channel: &mut Channel, late: &Late) -> Result<Over, LateError> {
        let result = self.push_all(channel, late);
        self.tell_late_progress(channel, late);
        let error = match result {
            Err(LateError::Channel(error)) => error,
            result => return result,
        };
        if let Some(over) = gone(&error) {
            return Ok(over);
        }
        // The two connections end independently of each other: what was said may still come. If
        // nothing was, the destination ends this one too, as soon as it sees that the other is gone.
        if error.cancelled().is_some() && late.control.ended().is_none() {
            channel.link().ignore_cancel();
            match channel.receive_until(Instant::now() + self.job.deadlines.linger) {
                Ok(Some(arrived)) if arrived.kind == Kind::Complete => {
                    return complete(channel, late);
                }
                Err(said) => {
                    if let Some(over) = gone(&said) {
                        return Ok(over);
                    }
                }
                Ok(_) => {}
            }
        }
        Err(error.into())
    }

    fn push_all(&self, channel: &mut Channel, late: &Late) -> Result<Over, LateError> {
        let mut frames = Frames::new(late.checked);
        let mut pacing = Pacing::default();
        let mut told_at = Instant::now();
        // However slow it is to be, the destination must not take this side for dead.
        let longest = self.job.deadlines.progress / 3;
        loop {
            let rate = self.job.parameters.max_postcopy_bandwidth();
            let most = match rate {
                0 => RUN,
                rate => pages_per_frame(rate as f64, RUN),
            };
            let Some(run) = late.left.take_next(most) else {
                break;
            };
            let since = Instant::now();
            loop {
                let rate = self.job.parameters.max_postcopy_bandwidth();
                let wait = pacing.wait(self.clock.now(), rate);
                if wait.is_zero() || since.elapsed() >= longest {
                    break;
                }
                let until = Instant::now() + wait.min(TELL);
                if let Some(arrived) = channel.receive_until(until)? {
                    return over(arrived.kind, channel, late);
                }
            }
            pacing.sent(frames.send(channel, &late.pages, run)?);
            if let Some(kind) = channel.next_kind()? {
                return over(kind, channel, late);
            }
            if told_at.elapsed() >= TELL {
                self.tell_late_progress(channel, late);
                told_at = Instant::now();
            }
        }
        channel.send(Kind::Pushed, &[])?;
        let kind = channel.receive()?.kind;
        over(kind, channel, late)
    }
}

fn over(kind: Kind, channel: &Channel, late: &Late) -> Result<Over, LateError> {
    match kind {
        Kind::Complete => complete(channel, late),
        kind => {
            let phase = channel.phase();
            Err(ChannelError::from(crate::protocol::OutOfOrder { kind, phase }).into())
        }
    }
}

/// All has arrived only if all was sent.
fn complete(channel: &Channel, late: &Late) -> Result<Over, LateError> {
    channel.decode(Kind::Complete, |body| Reader::new(body).end())?;
    match late.left.count() {
        0 => Ok(Over::Complete),
        left => Err(LateError::TooEarly(left)),
    }
}

fn gone(error: &ChannelError) -> Option<Over> {
    match error {
        ChannelError::Gone(gone) => Some(Over::Gone(gone.clone())),
        _ => None,
    }
}
