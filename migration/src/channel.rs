//! Whole frames over a link, in the order that the protocol allows.

mod send;

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bitmap::PageRun;
use crate::clock::Clock;
use crate::codec::DecodeError;
use crate::frame::{FrameError, HEADER_LEN, Header, Kind};
use crate::guest_io::{GuestPages, PageIo};
use crate::link::{Link, LinkError, Readiness, not_ready};
use crate::message::decode_reason;
use crate::progress::Bytes;
use crate::protocol::{OutOfOrder, Phase};

/// The most frames of the peer that wait to be looked at.
const MAX_WAITING: usize = 4096;
const INBOX: usize = 16 << 10;
/// A body's buffer grows with what has come, in steps of this.
const BODY_STEP: usize = 256 << 10;

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
    /// The peer gave up, or has no more need, and says why: REFUSE, FAILED, CANCEL or GONE.
    #[error("{}: {reason}", peer_verb(*.kind))]
    Peer {
        /// Which.
        kind: Kind,
        /// Why.
        reason: String,
    },
    /// A request for memory that there is none of.
    #[error("the destination asks for memory that the guest does not have: {0}")]
    Request(String),
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
        Kind::Gone => "the guest has ended at the destination",
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
            next_received: 0,
            sent_bytes: 0,
            sent: Bytes::default(),
            sent_blocks: 0,
            received_bytes: 0,
            received: Bytes::default(),
            received_blocks: 0,
            waited: Duration::ZERO,
            torn: false,
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

    /// Takes in frames of the peer that are there, without waiting.
    fn take_in(&mut self) -> Result<(), ChannelError> {
        loop {
            loop {
                // After RUNNING it may be over or just begin, which is for who takes it to say.
                if self.phase == Phase::Over && !self.waiting.is_empty() {
                    return Ok(());
                }
                let Some(arrived) = self.next_frame()? else {
                    break;
                };
                if self.waiting.len() >= MAX_WAITING {
                    return Err(ChannelError::Flood);
                }
                self.waiting.push_back(Waiting {
                    at: self.clock.now(),
                    kind: arrived.kind,
                    body: self.body.clone(),
                });
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // What it said before it closed comes first.
                Err(_) if !self.waiting.is_empty() => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// The kind of the next frame of the peer, if it is there already.
    pub(crate) fn next_kind(&mut self) -> Result<Option<Kind>, ChannelError> {
        if self.waiting.is_empty() {
            self.take_in()?;
        }
        Ok(self.waiting.front().map(|waiting| waiting.kind))
    }

    /// A frame of the peer that is there already.
    pub(crate) fn receive_now(&mut self) -> Result<Option<Arrived>, ChannelError> {
        if self.waiting.is_empty() {
            self.take_in()?;
        }
        Ok(self.waiting.pop_front().map(|waiting| {
            self.body = waiting.body;
            self.arrived_at = waiting.at;
            Arrived {
                kind: waiting.kind,
                payload_len: 0,
            }
        }))
    }

    /// Waits for the next frame.
    pub(crate) fn receive(&mut self) -> Result<Arrived, ChannelError> {
        let mut since = Instant::now();
        loop {
            if self.duplex {
                if let Some(arrived) = self.receive_now()? {
                    return Ok(arrived);
                }
            } else if let Some(arrived) = self.next_frame()? {
                self.arrived_at = self.clock.now();
                return Ok(arrived);
            } else if self.fill()? {
                since = Instant::now();
                continue;
            }
            self.wait_readable(since)?;
            since = Instant::now();
        }
    }

    /// The next frame, if it is there but for its payload; for the side that is not duplex.
    pub(crate) fn try_receive(&mut self) -> Result<Option<Arrived>, ChannelError> {
        loop {
            if let Some(arrived) = self.next_frame()? {
                self.arrived_at = self.clock.now();
                return Ok(Some(arrived));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Waits for the next frame, but only until `end`.
    pub(crate) fn receive_until(&mut self, end: Instant) -> Result<Option<Arrived>, ChannelError> {
        loop {
            if let Some(arrived) = self.receive_now()? {
                return Ok(Some(arrived));
            }
            let wanted = Readiness {
                read: true,
                write: false,
            };
            let ready = self
                .link
                .wait_until(wanted, end)
                .map_err(|error| self.broken(error))?;
            if ready.is_none() {
                return Ok(None);
            }
        }
    }

    fn wait_readable(&mut self, since: Instant) -> Result<(), ChannelError> {
        let wanted = Readiness {
            read: true,
            write: false,
        };
        match self.link.wait(wanted, since) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.broken(error)),
        }
    }

    /// Reads once what is there, into the inbox or straight into a long body; false if nothing is.
    fn fill(&mut self) -> Result<bool, ChannelError> {
        self.check_cancel()?;
        let missing = self
            .header
            .map_or(0, |header| header.body_len as usize - self.partial.len());
        let read = if missing > INBOX {
            let start = self.partial.len();
            self.partial.resize(start + missing.min(BODY_STEP), 0);
            let read = self.link.read(&mut self.partial[start..]);
            let count = *read.as_ref().ok().and_then(Option::as_ref).unwrap_or(&0);
            self.partial.truncate(start + count);
            read
        } else {
            self.inbox.drain(..self.inbox_start);
            self.inbox_start = 0;
            let start = self.inbox.len();
            self.inbox.resize(INBOX.max(start + HEADER_LEN), 0);
            let read = self.link.read(&mut self.inbox[start..]);
            let count = *read.as_ref().ok().and_then(Option::as_ref).unwrap_or(&0);
            self.inbox.truncate(start + count);
            read
        };
        match read {
            Ok(count) => {
                self.received_bytes += count.unwrap_or(0) as u64;
                Ok(count.is_some())
            }
            Err(error) => Err(self.broken(error)),
        }
    }

    /// The next frame, if all of it but its payload is in the buffers.
    fn next_frame(&mut self) -> Result<Option<Arrived>, ChannelError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(bytes) = self
                    .inbox
                    .get(self.inbox_start..)
                    .and_then(|bytes| bytes.first_chunk::<HEADER_LEN>())
                else {
                    return Ok(None);
                };
                let header = Header::decode(bytes)?;
                if header.sequence != self.next_received {
                    return Err(FrameError::Sequence {
                        found: header.sequence,
                        expected: self.next_received,
                    }
                    .into());
                }
                self.phase.after(header.kind)?;
                self.inbox_start += HEADER_LEN;
                self.partial.clear();
                self.header = Some(header);
                header
            }
        };
        let missing = header.body_len as usize - self.partial.len();
        let there = self.inbox.get(self.inbox_start..).unwrap_or_default();
        let now = there.get(..missing).unwrap_or(there);
        self.partial.extend(now);
        self.inbox_start += now.len();
        if self.partial.len() < header.body_len as usize {
            return Ok(None);
        }
        header.check_body(&self.partial)?;
        self.header = None;
        self.received
            .count(header.kind, header.body_len, header.payload_len);
        if header.kind == Kind::Blocks {
            self.received_blocks +=
                HEADER_LEN as u64 + u64::from(header.body_len) + u64::from(header.payload_len);
        }
        std::mem::swap(&mut self.body, &mut self.partial);
        self.next_received = self.next_received.wrapping_add(1);
        self.phase = self.phase.after(header.kind)?;
        if matches!(
            header.kind,
            Kind::Refuse | Kind::Failed | Kind::Cancel | Kind::Gone
        ) {
            let reason = self.decode(header.kind, decode_reason)?;
            return Err(ChannelError::Peer {
                kind: header.kind,
                reason,
            });
        }
        Ok(Some(Arrived {
            kind: header.kind,
            payload_len: header.payload_len,
        }))
    }

    /// Receives the payload of a PAGES frame into `runs`, each within one region.
    pub(crate) fn receive_pages(
        &mut self,
        memory: &GuestPages,
        runs: &[PageRun],
    ) -> Result<(), ChannelError> {
        let total = runs.iter().map(|run| run.count).sum::<u64>() * crate::layout::PAGE_SIZE;
        let there = self.inbox.get(self.inbox_start..).unwrap_or_default();
        let now = there.get(..total as usize).unwrap_or(there);
        self.io.place(memory, runs, now);
        self.inbox_start += now.len();
        let mut done = now.len() as u64;
        let mut since = Instant::now();
        while done < total {
            match self.io.receive(self.link.fd(), memory, runs, done) {
                Ok(0) => return Err(self.broken(LinkError::Closed)),
                Ok(count) => {
                    done += count as u64;
                    self.received_bytes += count as u64;
                    since = Instant::now();
                }
                Err(error) => match not_ready::<()>(error) {
                    Ok(_) => self.wait_readable(since)?,
                    Err(error) => return Err(self.broken(error)),
                },
            }
        }
        Ok(())
    }

    /// Receives a payload of `len` bytes, which its frame's limit bounds, into `data`.
    pub(crate) fn receive_data(
        &mut self,
        len: usize,
        data: &mut Vec<u8>,
    ) -> Result<(), ChannelError> {
        // What is in it is written over, so it is not made zero first.
        data.resize(len, 0);
        let there = self.inbox.get(self.inbox_start..).unwrap_or_default();
        let mut done = there.len().min(len);
        data[..done].copy_from_slice(&there[..done]);
        self.inbox_start += done;
        let mut since = Instant::now();
        while done < len {
            match self.link.read(&mut data[done..]) {
                Ok(Some(count)) => {
                    done += count;
                    self.received_bytes += count as u64;
                    since = Instant::now();
                }
                Ok(None) => self.wait_readable(since)?,
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// The socket, to be waited for.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.link.fd()
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

impl From<io::Error> for ChannelError {
    fn from(error: io::Error) -> Self {
        Self::Link {
            error: error.into(),
            phase: Phase::Start,
        }
    }
}
