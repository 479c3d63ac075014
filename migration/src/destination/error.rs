//! Why a guest does not arrive.

use super::channels::PositionError;
use super::disks::DiskError;
use super::late::LateError;
use super::{MAX_SECTIONS, MAX_STATE};
use crate::channel::ChannelError;
use crate::guest_io::MemoryError;
use crate::listener::ListenError;
use crate::placement::{EncodedError, Incomplete};
use crate::protocol::{NEWEST_VERSION, OLDEST_VERSION};
use crate::section::SectionError;
use crate::vm::VmError;

/// Why a guest did not arrive. It has not run here and never will.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The connection, the protocol, or what the source says.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No version in common.
    #[error(
        "the source speaks versions {oldest} to {newest} of the migration protocol, this destination {OLDEST_VERSION} to {NEWEST_VERSION}"
    )]
    Version {
        /// The source's oldest.
        oldest: u16,
        /// The source's newest.
        newest: u16,
    },
    /// Something that this build can't do.
    #[error("the source requires capabilities that this destination does not have (bits {0:#x})")]
    Capabilities(u32),
    /// The machine refuses the offer.
    #[error("{0}")]
    Refused(VmError),
    /// The machine.
    #[error("{doing} failed: {error}")]
    Vm {
        /// What the engine asked of it.
        doing: &'static str,
        /// Why it could not.
        error: VmError,
    },
    /// Memory that isn't there.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A piece of a blob that is not the next one.
    #[error("a piece of blob {index} at {offset} came, but {expected}")]
    Blob {
        /// The blob's index.
        index: u16,
        /// Where the piece begins.
        offset: u64,
        /// What was due.
        expected: String,
    },
    /// Memory came before all blobs were there.
    #[error("{0} of the blobs never came")]
    BlobsMissing(usize),
    /// A blob cannot be kept.
    #[error("cannot write the blob '{name}': {error}")]
    BlobWrite {
        /// The blob.
        name: String,
        /// Why.
        error: std::io::Error,
    },
    /// The state sections are not a set.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The state is too large.
    #[error("the state has more than {MAX_SECTIONS} sections or {MAX_STATE} bytes")]
    StateTooLarge,
    /// Not as many as were sent.
    #[error("{found} state sections came, but the source says that it sent {stated}")]
    SectionCount {
        /// How many came.
        found: usize,
        /// How many should have.
        stated: u32,
    },
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Pages that don't come as they are.
    #[error(transparent)]
    Encoded(#[from] EncodedError),
    /// Memory is not whole.
    #[error(transparent)]
    Incomplete(#[from] Incomplete),
    /// The source's other connection.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Memory that comes later.
    #[error(transparent)]
    Late(#[from] LateError),
    /// A connection beside the first one.
    #[error("data connection {index}: {error}")]
    Connection {
        /// Which.
        index: usize,
        /// What happened.
        error: Box<DestinationError>,
    },
    /// What came on other connections, or didn't.
    #[error(transparent)]
    Position(#[from] PositionError),
    /// No descriptors or threads.
    #[error("cannot take in more connections: {0}")]
    Threads(std::io::Error),
    /// No descriptors or threads.
    #[error("cannot prepare post-copy: {0}")]
    Resources(std::io::Error),
    /// What was told as missing is not what is.
    #[error("{ours} pages of guest memory are missing here, the source says {theirs}")]
    Disagreement {
        /// Here.
        ours: u64,
        /// There.
        theirs: u64,
    },
    /// The source says that it has sent everything.
    #[error("{0} pages of guest memory have not come, though the source has sent everything")]
    NeverPushed(u64),
    /// The fault channel is gone, and the guest has not been started.
    #[error("{0}")]
    Broken(String),
    /// GO contradicts what went before.
    #[error("the source's GO is not for this migration: {0}")]
    Go(String),
    /// Cancelled, between two frames.
    #[error("{0}")]
    Cancelled(String),
}

impl DestinationError {
    /// The reason, if it was cancelled here.
    pub fn cancelled(&self) -> Option<&str> {
        match self {
            Self::Channel(error) => error.cancelled(),
            Self::Cancelled(reason) | Self::Position(PositionError::Over(reason)) => Some(reason),
            _ => None,
        }
    }
}
