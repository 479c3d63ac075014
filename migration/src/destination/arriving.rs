//! The memory of a guest on its way here: by the first connection and by others, and in post-copy
//! partly after the guest.

use std::io;
use std::sync::Arc;

use super::channels::Channels;
use super::memory::Memory;
use super::postcopy::Late;
use super::{Destination, DestinationError, out_of_order};
use crate::channel::{Arrived, Channel};
use crate::frame::Kind;
use crate::listener::Listener;
use crate::message::Id;
use crate::placement::{Incomplete, Placement};
use crate::progress::Bytes;

pub(super) struct Arriving {
    /// What the first connection brings; `None` once what is not there comes after the guest.
    early: Option<Memory>,
    /// The others, until the source has sent all of the memory.
    channels: Option<Channels>,
    /// What they have brought by then.
    received: (u64, Bytes),
    /// If memory may come after the guest.
    late: Option<Late>,
}

impl Arriving {
    /// After ACCEPT on `main`. More connections come to `listener`, if there is one.
    pub(super) fn begin(
        placement: Placement,
        late: Option<Late>,
        (id, picked): (Id, u32),
        listener: Option<Listener>,
        main: &mut Channel,
        destination: &Destination<'_>,
    ) -> Result<Self, DestinationError> {
        let placement = Arc::new(placement);
        let channels = match listener {
            Some(listener) => {
                let (there, with) = (
                    Arc::clone(&placement),
                    (destination.job, &destination.clock),
                );
                Some(Channels::start((id, picked), there, listener, main, with)?)
            }
            None => None,
        };
        Ok(Self {
            early: Some(Memory::new(placement, picked)),
            channels,
            received: Default::default(),
            late,
        })
    }

    /// Receives and places memory that comes on the first connection.
    pub(super) fn receive(
        &mut self,
        arrived: Arrived,
        channel: &mut Channel,
    ) -> Result<(), DestinationError> {
        match &mut self.early {
            Some(memory) => memory.receive(arrived, channel),
            None => Err(out_of_order(channel, arrived.kind)),
        }
    }

    /// BARRIER, on the first connection.
    pub(super) fn barrier(&mut self, channel: &Channel) -> Result<(), DestinationError> {
        match &mut self.channels {
            Some(channels) => channels.barrier(channel),
            None => Err(out_of_order(channel, Kind::Barrier)),
        }
    }

    /// A frame of the first connection has been dealt with.
    pub(super) fn placed(&self) {
        if let Some(channels) = &self.channels {
            channels.placed();
        }
    }

    /// The source sends no more memory before the guest: the other connections have to be over.
    pub(super) fn all_sent(&mut self, channel: &mut Channel) -> Result<(), DestinationError> {
        if let Some(channels) = self.channels.take() {
            self.received = channels.finish(channel)?;
        }
        Ok(())
    }

    /// The reason for an error; what happened on another connection may be. Ends them.
    pub(super) fn explain(
        &mut self,
        error: DestinationError,
        channel: &mut Channel,
    ) -> DestinationError {
        match self.channels.take() {
            Some(channels) => channels.explain(error, channel),
            None => error,
        }
    }

    /// MISSING, once [all was sent](Self::all_sent) that comes before the guest.
    pub(super) fn missing(
        &mut self,
        channel: &Channel,
        destination: &Destination<'_>,
    ) -> Result<(), DestinationError> {
        let Some(late) = &mut self.late else {
            return Err(out_of_order(channel, Kind::Missing));
        };
        if let Some(memory) = self.early.take() {
            let placement = Arc::into_inner(memory.into_placement()).ok_or_else(|| {
                DestinationError::Resources(io::Error::other("memory still comes"))
            })?;
            late.switch(placement, destination)?;
        }
        late.drop_missing(channel)
    }

    /// What there is of post-copy, for a frame that belongs to it.
    pub(super) fn late(&self, channel: &Channel, kind: Kind) -> Result<&Late, DestinationError> {
        self.late
            .as_ref()
            .ok_or_else(|| out_of_order(channel, kind))
    }

    /// Where what comes before the guest is placed.
    pub(super) fn placement(&self) -> Option<&Placement> {
        self.early.as_ref().map(Memory::placement)
    }

    /// How many bytes have come on the other connections, and of what kind.
    pub(super) fn received(&self) -> (u64, Bytes) {
        match &self.channels {
            Some(channels) => channels.received(),
            None => self.received,
        }
    }

    /// Whether all is here that comes before the guest; leaves what there is of post-copy.
    pub(super) fn check_complete(self) -> Result<Option<Late>, Incomplete> {
        if let Some(memory) = &self.early {
            memory.placement().check_complete()?;
        }
        Ok(self.late)
    }
}
