//! Why a channel can't be used any longer.

use std::io;

use super::MAX_WAITING;
use crate::codec::DecodeError;
use crate::frame::{FrameError, Kind};
use crate::link::LinkError;
use crate::message::Gone;
use crate::protocol::{OutOfOrder, Phase};

/// Why frames no longer go or come.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection.
    #[error("{}", describe(error, *phase))]
    Link {
        /// What happened.
        error: LinkError,
        /// How far the migration had come.
        phase: Phase,
    },
    /// A frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame's body.
    #[error("a {} frame is malformed: {error}", .kind.name())]
    Body {
        /// The kind of frame.
        kind: Kind,
        /// What is wrong.
        error: DecodeError,
    },
    /// The order of the frames.
    #[error(transparent)]
    OutOfOrder(#[from] OutOfOrder),
    /// The peer gave up, and says why: REFUSE, FAILED or CANCEL.
    #[error("{}: {reason}", peer_verb(*.kind))]
    Peer {
        /// Which.
        kind: Kind,
        /// Why.
        reason: String,
    },
    /// The guest needs no more memory: GONE.
    #[error("{0}")]
    Gone(Gone),
    /// A request for memory that there is none of.
    #[error("the destination asks for memory that the guest does not have: {0}")]
    Request(String),
    /// One of the connections that carry pages beside the first one.
    #[error("data connection {index}: {why}")]
    Data {
        /// Which, from 0.
        index: usize,
        /// What happened.
        why: String,
    },
    /// The peer sends answers to nothing.
    #[error("the peer sent more than {MAX_WAITING} unasked frames")]
    Flood,
}

fn describe(error: &LinkError, phase: Phase) -> String {
    match error {
        LinkError::Cancelled(reason) => reason.clone(),
        error => format!("{error} (in phase {phase:?})"),
    }
}

fn peer_verb(kind: Kind) -> &'static str {
    match kind {
        Kind::Refuse => "the destination refused",
        Kind::Cancel => "the source cancelled",
        _ => "the destination failed",
    }
}

impl ChannelError {
    /// The reason, if the migration was cancelled from another thread.
    pub fn cancelled(&self) -> Option<&str> {
        match self {
            Self::Link {
                error: LinkError::Cancelled(reason),
                ..
            } => Some(reason),
            _ => None,
        }
    }
}

impl From<io::Error> for ChannelError {
    fn from(error: io::Error) -> Self {
        Self::Link {
            error: error.into(),
            phase: Phase::Start,
        }
    }
}
