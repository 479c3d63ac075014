//! Whole frames over a link, in the order that the protocol allows.

mod error;
mod receive;
mod send;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::Clock;
use crate::codec::DecodeError;
use crate::frame::{Header, Kind};
use crate::guest_io::PageIo;
use crate::link::{Link, LinkError, Readiness};
use crate::progress::Bytes;
use crate::protocol::{OutOfOrder, Phase};
use crate::zero_copy::{Sends, ZeroCopy};

pub use self::error::ChannelError;

/// The most frames of the peer that wait to be looked at.
const MAX_WAITING: usize = 4096;
const INBOX: usize = 16 << 10;

/// A frame that arrived; its body is in [`Channel::body`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrived {
    pub(crate) kind: Kind,
    pub(crate) payload_len: u32,
}

/// A small frame that arrived while something was being sent.
#[derive(Debug)]
struct Waiting {
    at: Duration,
    kind: Kind,
    body: Vec<u8>,
}

pub(crate) struct Channel {
    link: Link,
    clock: Arc<dyn Clock>,
    phase: Phase,
    /// Whether frames are taken in while sending: at the source, where they are few and small.
    duplex: bool,
    next_sent: u32,
    sent_frames: u64,
    next_received: u32,
    sent_bytes: u64,
    sent: Bytes,
    /// Of `sent_bytes`, those of BLOCKS frames.
    sent_blocks: u64,
    received_bytes: u64,
    received: Bytes,
    /// Of `received_bytes`, those of BLOCKS frames.
    received_blocks: u64,
    /// How long the link had no room.
    waited: Duration,
    /// Whether a frame was begun and not finished: nothing more can be sent.
    torn: bool,
    /// Whether other frames follow the one that is being sent.
    followed: bool,
    inbox: Vec<u8>,
    inbox_start: usize,
    header: Option<Header>,
    partial: Vec<u8>,
    body: Vec<u8>,
    arrived_at: Duration,
    waiting: VecDeque<Waiting>,
    io: PageIo,
}

impl Channel {
    pub(crate) fn new(link: Link, clock: Arc<dyn Clock>, duplex: bool) -> Self {
        Self {
            link,
            clock,
            phase: Phase::Start,
            duplex,
            next_sent: 0,
            sent_frames: 0,
            next_received: 0,
            sent_bytes: 0,
            sent: Bytes::default(),
            sent_blocks: 0,
            received_bytes: 0,
            received: Bytes::default(),
            received_blocks: 0,
            waited: Duration::ZERO,
            torn: false,
            followed: false,
            inbox: Vec::with_capacity(INBOX),
            inbox_start: 0,
            header: None,
            partial: Vec::new(),
            body: Vec::new(),
            arrived_at: Duration::ZERO,
            waiting: VecDeque::new(),
            io: PageIo::default(),
        }
    }

    /// The destination's end of a connection whose first frame, of that kind, was taken in by the
    /// listener.
    pub(crate) fn returned(
        link: Link,
        clock: Arc<dyn Clock>,
        kind: Kind,
    ) -> Result<Self, OutOfOrder> {
        let mut channel = Self::new(link, clock, false);
        channel.phase = channel.phase.after(kind)?;
        channel.next_received = 1;
        Ok(channel)
    }

    /// The guest runs at the destination, and what is missing of its memory follows.
    pub(crate) fn enter_late(&mut self) {
        self.phase = Phase::Late;
    }

    /// An error if cancelled.
    pub(crate) fn check_cancel(&self) -> Result<(), ChannelError> {
        self.link.check_cancel().map_err(|error| self.broken(error))
    }

    pub(crate) fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// From here on pages are sent without a copy into the kernel, if the connection can do that.
    pub(crate) fn enable_zero_copy(&mut self) {
        if let Err(error) = self.link.enable_zero_copy() {
            tracing::warn!("pages are copied on their way into this connection: {error}");
        }
    }

    /// What became of the sends without a copy, if there are any.
    pub(crate) fn zero_copy(&self) -> Option<Sends> {
        self.link.zero_copy().map(ZeroCopy::sends)
    }

    /// How many frames were sent.
    pub(crate) fn sent_frames(&self) -> u64 {
        self.sent_frames
    }

    /// How long sending has waited for room in the link so far.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }

    /// What was sent in BLOCKS frames, in bytes.
    pub(crate) fn sent_blocks(&self) -> u64 {
        self.sent_blocks
    }

    /// What was sent beside the disks, by kind.
    pub(crate) fn sent(&self) -> Bytes {
        self.sent.of(self.sent_bytes - self.sent_blocks)
    }

    pub(crate) fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// What was received in BLOCKS frames, in bytes.
    pub(crate) fn received_blocks(&self) -> u64 {
        self.received_blocks
    }

    /// What was received beside the disks, by kind.
    pub(crate) fn received(&self) -> Bytes {
        let others = self.received_bytes.saturating_sub(self.received_blocks);
        self.received.of(others)
    }

    /// The body of the frame that [`receive`](Self::receive) returned last.
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// When that frame arrived.
    pub(crate) fn arrived_at(&self) -> Duration {
        self.arrived_at
    }

    fn broken(&self, error: LinkError) -> ChannelError {
        ChannelError::Link {
            error,
            phase: self.phase,
        }
    }

    /// Decodes the last body, naming its frame in the error.
    pub(crate) fn decode<T>(
        &self,
        kind: Kind,
        decode: impl FnOnce(&[u8]) -> Result<T, DecodeError>,
    ) -> Result<T, ChannelError> {
        decode(&self.body).map_err(|error| ChannelError::Body { kind, error })
    }

    /// The socket, to be waited for.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.link.fd()
    }

    /// Waits until the socket or `event` has something to read, or `end`.
    pub(crate) fn wait_readable_or(
        &self,
        event: BorrowedFd<'_>,
        end: Instant,
    ) -> Result<(), ChannelError> {
        let waited = self.link.wait_readable_or(event, end);
        waited.map_err(|error| self.broken(error))
    }

    /// Ends both directions at once.
    pub(crate) fn shut_down(&self) {
        self.link.shutdown();
    }

    /// After last words: lets the peer read them before the socket closes, which would discard
    /// them if bytes of the peer were still unread. Ends when the peer closes, or at `end`.
    pub(crate) fn linger(mut self, end: Instant) {
        self.link.finish();
        self.link.ignore_cancel();
        let wanted = Readiness {
            read: true,
            write: false,
        };
        let mut discarded = vec![0; 1 << 18];
        while let Ok(Some(_)) = self.link.wait_until(wanted, end) {
            if self.link.read(&mut discarded).is_err() {
                break;
            }
        }
        self.link.shutdown();
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("phase", &self.phase)
            .field("sent_bytes", &self.sent_bytes)
            .field("received_bytes", &self.received_bytes)
            .finish_non_exhaustive()
    }
}
