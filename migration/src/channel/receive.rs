//! The receiving half of a channel.

use std::time::{Duration, Instant};

use super::{Arrived, Channel, ChannelError, INBOX, MAX_WAITING, Waiting};
use crate::bitmap::PageRun;
use crate::frame::{FrameError, HEADER_LEN, Header, Kind};
use crate::guest_io::GuestPages;
use crate::layout::PAGE_SIZE;
use crate::link::{LinkError, Readiness, not_ready};
use crate::message::{Gone, decode_reason};
use crate::protocol::Phase;

/// A body's buffer grows with what has come, in steps of this.
const BODY_STEP: usize = 256 << 10;

/// A wait without a deadline is one with this, again and again.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);

impl Channel {
    /// Takes in frames of the peer that are there, without waiting.
    pub(super) fn take_in(&mut self) -> Result<(), ChannelError> {
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

    /// Waits until the next frame begins, however long that takes; false if the connection ends or
    /// breaks before it does.
    pub(crate) fn wait_begin(&mut self) -> Result<bool, ChannelError> {
        let wanted = Readiness {
            read: true,
            write: false,
        };
        while self.header.is_none() && self.inbox_start == self.inbox.len() {
            match self.fill() {
                Ok(true) => {}
                Ok(false) => {
                    let end = Instant::now() + LOOK_AGAIN;
                    let ready = self.link.wait_until(wanted, end);
                    ready.map_err(|error| self.broken(error))?;
                }
                Err(ChannelError::Link {
                    error: error @ (LinkError::Closed | LinkError::Dead),
                    ..
                }) => {
                    tracing::debug!("a connection ended between two frames: {error}");
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// What the peer says before it closes, or that it closes, until `until`; whatever else it
    /// sends is dropped. `None` if it goes on.
    pub(crate) fn last_words(&mut self, until: Instant) -> Option<ChannelError> {
        self.link.set_until(Some(until));
        let mut dropped = Vec::new();
        while Instant::now() < until {
            let arrived = match self.receive() {
                Ok(arrived) => arrived,
                Err(error) => {
                    let last = match &error {
                        ChannelError::Link { error, .. } => matches!(error, LinkError::Closed),
                        error => matches!(error, ChannelError::Peer { .. }),
                    };
                    return last.then_some(error);
                }
            };
            let payload = arrived.payload_len as usize;
            self.receive_data(payload, &mut dropped).ok()?;
        }
        None
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
        match header.kind {
            Kind::Refuse | Kind::Failed | Kind::Cancel => {
                let reason = self.decode(header.kind, decode_reason)?;
                return Err(ChannelError::Peer {
                    kind: header.kind,
                    reason,
                });
            }
            Kind::Gone => return Err(ChannelError::Gone(self.decode(Kind::Gone, Gone::decode)?)),
            _ => {}
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
        let total = runs.iter().map(|run| run.count).sum::<u64>() * PAGE_SIZE;
        let there = self.inbox.get(self.inbox_start..).unwrap_or_default();
        let now = there.get(..total as usize).unwrap_or(there);
        self.io.place(memory, runs, now);
        self.inbox_start += now.len();
        let done = now.len() as u64;
        let received = self.fill_pages(memory, runs, done, total);
        self.link.expect(1);
        received
    }

    /// Receives what is to come of a frame's pages after the first `done` bytes.
    fn fill_pages(
        &mut self,
        memory: &GuestPages,
        runs: &[PageRun],
        mut done: u64,
        total: u64,
    ) -> Result<(), ChannelError> {
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
                    Ok(_) => self.wait_for_data(total - done, since)?,
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
        let done = there.len().min(len);
        data[..done].copy_from_slice(&there[..done]);
        self.inbox_start += done;
        let received = self.fill_data(data, done);
        self.link.expect(1);
        received
    }

    /// Receives what is to come after the first `done` bytes.
    fn fill_data(&mut self, data: &mut [u8], mut done: usize) -> Result<(), ChannelError> {
        let mut since = Instant::now();
        let len = data.len();
        while done < len {
            match self.link.read(&mut data[done..]) {
                Ok(Some(count)) => {
                    done += count;
                    self.received_bytes += count as u64;
                    since = Instant::now();
                }
                Ok(None) => self.wait_for_data((len - done) as u64, since)?,
                Err(error) => return Err(self.broken(error)),
            }
        }
        Ok(())
    }

    /// Waits for data of which so many bytes are to come.
    fn wait_for_data(&mut self, bytes: u64, since: Instant) -> Result<(), ChannelError> {
        self.link.expect(bytes);
        self.wait_readable(since)
    }
}
