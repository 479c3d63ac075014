//! Going on after a broken connection: both sides agree on what has arrived.

use std::sync::Arc;
use std::time::Instant;

use super::DestinationError;
use super::late::LateMemory;
use super::postcopy::Late;
use crate::bitmap::PageBitmap;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::frame::Kind;
use crate::link::{Deadlines, Link};
use crate::listener::{Awaited, Listener, Returned};
use crate::message::{MAX_BIT_PAGES, Missing, encode_bits};

/// Waits for the source of this migration and agrees with it. Connections that break meanwhile,
/// or are of somebody else, change nothing. Ends with an error only when it is told to.
pub(super) fn recover(
    late: &mut Late,
    memory: &LateMemory,
    mut listener: Listener,
    clock: &Arc<dyn Clock>,
    deadlines: &Deadlines,
) -> Result<Channel, DestinationError> {
    loop {
        let awaited = Awaited {
            kind: Kind::Resume,
            id: late.id,
            attempts: late.attempt.saturating_add(1)..=u32::MAX,
            until: None,
            beside: None,
        };
        let returned = listener.accept_returning(awaited, &late.breaker, deadlines)?;
        late.attempt = returned.attempt;
        match agree(late, memory, &mut listener, returned, clock, deadlines) {
            Ok(channel) => return Ok(channel),
            Err(error) if late.breaker.cancelled().is_some() => return Err(error),
            Err(error) => tracing::warn!(
                id = ?late.id,
                "a recovery failed, and another is waited for: {error}"
            ),
        }
    }
}

fn agree(
    late: &Late,
    memory: &LateMemory,
    listener: &mut Listener,
    returned: Returned,
    clock: &Arc<dyn Clock>,
    deadlines: &Deadlines,
) -> Result<Channel, DestinationError> {
    let open = |returned: Returned, kind| -> Result<Channel, ChannelError> {
        let link = Link::new(returned.stream, late.breaker.clone(), deadlines)?;
        Ok(Channel::returned(link, Arc::clone(clock), kind)?)
    };
    let until = Instant::now() + deadlines.resume;
    let mut channel = open(returned, Kind::Resume)?;
    channel.link().set_until(Some(until));
    let arrived = memory.arrived();
    let left = Missing {
        pages: arrived.pages() - arrived.count(),
    };
    tell(&mut channel, &arrived, left)?;
    channel.receive()?;
    let agreed = channel.decode(Kind::Continue, Missing::decode)?;
    if agreed != left {
        return Err(DestinationError::Disagreement {
            ours: left.pages,
            theirs: agreed.pages,
        });
    }
    let attempt = late.attempt;
    let awaited = Awaited {
        kind: Kind::Join,
        id: late.id,
        attempts: attempt..=attempt,
        until: Some(until),
        beside: Some(channel.fd()),
    };
    let joined = listener.accept_returning(awaited, &late.breaker, deadlines)?;
    if let Some(faults) = late.faults() {
        faults.attach(open(joined, Kind::Join)?, late.breaker.clone());
    }
    Ok(channel)
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
