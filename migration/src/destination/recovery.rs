//! Going on after a broken connection: both sides agree on what has arrived.

use std::sync::Arc;
use std::time::Instant;

use super::DestinationError;
use super::late::LateMemory;
use crate::bitmap::PageBitmap;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::frame::Kind;
use crate::link::{Deadlines, Link};
use crate::listener::{Awaited, Listener, Returned};
use crate::message::{Id, MAX_BIT_PAGES, Missing, encode_bits};
use crate::postcopy::Control;

/// Whose return is waited for, and how.
#[derive(Clone)]
pub(super) struct Rendezvous {
    pub(super) id: Id,
    pub(super) control: Control<Listener>,
    /// The number of the last connection.
    pub(super) attempt: u32,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) deadlines: Deadlines,
}

/// What there is of the guest's memory.
pub(super) enum Here<'a> {
    /// Some of it.
    Part(&'a LateMemory),
    /// All of it; its pages.
    Whole(u64),
}

/// The two connections of a source that has come back, past the agreement.
pub(super) struct Returning {
    pub(super) main: Channel,
    pub(super) faults: Channel,
    /// Breaks them.
    pub(super) breaker: Cancel,
}

impl Here<'_> {
    fn arrived(&self) -> PageBitmap {
        match self {
            Self::Part(memory) => memory.arrived(),
            Self::Whole(pages) => PageBitmap::full(*pages),
        }
    }

    /// What there is to say as long as the connection is broken, for that reason.
    pub(super) fn describe(&self, reason: &str) -> String {
        match self {
            Self::Part(memory) => format!("{reason}; {} pages are missing", memory.missing()),
            Self::Whole(_) => format!(
                "all of the guest's memory has arrived, but its source may not know: {reason}. If \
                 it is paused there, recover with migrate_recover here and migrate -r there"
            ),
        }
    }
}

impl Rendezvous {
    /// Waits for the source of this migration, at the listeners that users give, and agrees with it.
    /// Connections that break meanwhile, or are of somebody else, change nothing. `None` once nobody
    /// waits any more.
    pub(super) fn meet(&mut self, here: &Here<'_>) -> Option<Returning> {
        loop {
            let (mut listener, waker) = self.control.wait()?;
            loop {
                let returned = match self.accept(&mut listener, &waker) {
                    Ok(returned) => returned,
                    Err(error) => {
                        self.control.paused(here.describe(&error.to_string()));
                        break;
                    }
                };
                let error = match self.agree(&mut listener, returned, here) {
                    Ok(returning) => return Some(returning),
                    Err(error) => error.to_string(),
                };
                tracing::warn!(
                    id = ?self.id,
                    "a recovery failed, and another is waited for: {error}"
                );
                if !self.control.listen_on(waker.clone(), here.describe(&error)) {
                    break;
                }
            }
        }
    }

    fn accept(
        &mut self,
        listener: &mut Listener,
        waker: &Cancel,
    ) -> Result<Returned, DestinationError> {
        let awaited = Awaited {
            kind: Kind::Resume,
            id: self.id,
            attempts: self.attempt.saturating_add(1)..=u32::MAX,
            until: None,
            beside: None,
            over: None,
            later: None,
        };
        let returned = listener.accept_returning(awaited, waker, &self.deadlines)?;
        self.attempt = returned.attempt;
        Ok(returned)
    }

    fn agree(
        &self,
        listener: &mut Listener,
        returned: Returned,
        here: &Here<'_>,
    ) -> Result<Returning, DestinationError> {
        let breaker = Cancel::new().map_err(DestinationError::Resources)?;
        if !self.control.agree(breaker.clone()) {
            return Err(DestinationError::Cancelled(
                "it is not waited for any more".to_owned(),
            ));
        }
        let open = |returned: Returned, kind| -> Result<Channel, ChannelError> {
            let link = Link::new(returned.stream, breaker.clone(), &self.deadlines)?;
            Ok(Channel::returned(link, Arc::clone(&self.clock), kind)?)
        };
        let until = Instant::now() + self.deadlines.resume;
        let mut main = open(returned, Kind::Resume)?;
        main.link().set_until(Some(until));
        let arrived = here.arrived();
        let left = Missing {
            pages: arrived.pages() - arrived.count(),
        };
        tell(&mut main, &arrived, left)?;
        main.receive()?;
        let agreed = main.decode(Kind::Continue, Missing::decode)?;
        if agreed != left {
            return Err(DestinationError::Disagreement {
                ours: left.pages,
                theirs: agreed.pages,
            });
        }
        let awaited = Awaited {
            kind: Kind::Join,
            id: self.id,
            attempts: self.attempt..=self.attempt,
            until: Some(until),
            beside: Some(main.fd()),
            over: None,
            later: None,
        };
        let joined = listener.accept_returning(awaited, &breaker, &self.deadlines)?;
        let faults = open(joined, Kind::Join)?;
        Ok(Returning {
            main,
            faults,
            breaker,
        })
    }
}

fn tell(channel: &mut Channel, arrived: &PageBitmap, left: Missing) -> Result<(), ChannelError> {
    let mut body = Vec::new();
    for first in (0..arrived.pages()).step_by(MAX_BIT_PAGES as usize) {
        if encode_bits(arrived, first, &mut body) {
            channel.send(Kind::Arrived, &body)?;
        }
    }
    left.encode(&mut body);
    channel.send(Kind::Left, &body)
}
