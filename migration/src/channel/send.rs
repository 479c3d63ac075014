//! The sending half of a channel.

use std::io;
use std::time::Instant;

use super::{Channel, ChannelError, MAX_WAITING};
use crate::bitmap::PageRun;
use crate::frame::{HEADER_LEN, Header, Kind};
use crate::guest_io::{GuestPages, Manner};
use crate::layout::PAGE_SIZE;
use crate::link::{LinkError, Readiness, not_ready};
use crate::zero_copy;

impl Channel {
    /// Sends bytes that are no frame: the preamble.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        self.send_all(&[bytes], None, &[], bytes.len() as u64)
    }

    /// Sends a frame.
    pub(crate) fn send(&mut self, kind: Kind, body: &[u8]) -> Result<(), ChannelError> {
        self.send_frame(kind, body, &[], None, &[])
    }

    /// Sends a frame that others follow at once: the kernel may keep it until then, so that the
    /// peer does not wake up for each.
    pub(crate) fn send_followed(&mut self, kind: Kind, body: &[u8]) -> Result<(), ChannelError> {
        self.followed = true;
        let sent = self.send(kind, body);
        self.followed = false;
        sent
    }

    /// Sends a frame with `data`, one after the other, as its payload.
    pub(crate) fn send_data(
        &mut self,
        kind: Kind,
        body: &[u8],
        data: &[&[u8]],
    ) -> Result<(), ChannelError> {
        self.send_frame(kind, body, data, None, &[])
    }

    /// Sends a PAGES frame: the pages of `runs`, each within one region, follow `body`.
    pub(crate) fn send_pages(
        &mut self,
        body: &[u8],
        memory: &GuestPages,
        runs: &[PageRun],
    ) -> Result<(), ChannelError> {
        self.send_frame(Kind::Pages, body, &[], Some(memory), runs)
    }

    fn send_frame(
        &mut self,
        kind: Kind,
        body: &[u8],
        data: &[&[u8]],
        memory: Option<&GuestPages>,
        runs: &[PageRun],
    ) -> Result<(), ChannelError> {
        self.check_cancel()?;
        self.phase = self.phase.after(kind)?;
        let pages: u64 = runs.iter().map(|run| run.count).sum();
        let data_len: usize = data.iter().map(|part| part.len()).sum();
        let payload_len = pages * PAGE_SIZE + data_len as u64;
        let header = Header {
            kind,
            sequence: self.next_sent,
            body_len: body.len() as u32,
            payload_len: payload_len as u32,
            body_crc: crc32fast::hash(body),
        }
        .encode();
        self.next_sent = self.next_sent.wrapping_add(1);
        let total = (HEADER_LEN + body.len()) as u64 + payload_len;
        let mut parts = vec![&header[..], body];
        parts.extend(data);
        self.send_all(&parts, memory, runs, total)?;
        self.sent_frames += 1;
        self.sent.count(kind, body.len() as u32, payload_len as u32);
        if kind == Kind::Blocks {
            self.sent_blocks += total;
        }
        Ok(())
    }

    fn send_all(
        &mut self,
        parts: &[&[u8]],
        memory: Option<&GuestPages>,
        runs: &[PageRun],
        total: u64,
    ) -> Result<(), ChannelError> {
        self.torn = true;
        let mut done = 0;
        let began = Instant::now();
        let mut since = began;
        while done < total {
            match self.send_some(parts, memory, runs, done, total) {
                Ok(count) => {
                    done += count as u64;
                    self.sent_bytes += count as u64;
                    since = Instant::now();
                }
                Err(error) => match not_ready::<()>(error) {
                    Ok(_) => self.wait_to_send(since)?,
                    Err(error) => return Err(self.why_closed(error)),
                },
            }
        }
        self.torn = false;
        self.link.sent(total, began.elapsed());
        Ok(())
    }

    /// Hands the socket what it takes of all that without the first `done` bytes.
    fn send_some(
        &mut self,
        parts: &[&[u8]],
        memory: Option<&GuestPages>,
        runs: &[PageRun],
        done: u64,
        total: u64,
    ) -> io::Result<usize> {
        let Self { io, link, .. } = self;
        let head: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let worth = memory.is_some() && total - head >= zero_copy::WORTH;
        if !worth || !link.zero_copy().is_some_and(|zero_copy| zero_copy.is_on()) {
            let manner = match self.followed {
                true => Manner::More,
                false => Manner::Copied,
            };
            return io.send(link.fd(), parts, memory, runs, done, manner);
        }
        // The buffers of the parts are used again at once, so they are copied in any case.
        if done < head {
            return io.send(link.fd(), parts, None, &[], done, Manner::More);
        }
        let sent = io.send(link.fd(), &[], memory, runs, done - head, Manner::Pinned);
        let refused = matches!(&sent, Err(error) if error.raw_os_error() == Some(libc::ENOBUFS));
        link.count_zero_copy(refused, sent.is_ok());
        match refused {
            true => io.send(link.fd(), parts, memory, runs, done, Manner::Copied),
            false => sent,
        }
    }

    /// Whether the socket would take more now.
    pub(crate) fn has_room(&self) -> bool {
        self.link.has_room()
    }

    fn wait_to_send(&mut self, since: Instant) -> Result<(), ChannelError> {
        let wanted = Readiness {
            read: self.duplex && self.waiting.len() < MAX_WAITING,
            write: true,
        };
        let began = Instant::now();
        let ready = self.link.wait(wanted, since);
        self.waited += began.elapsed();
        let ready = ready.map_err(|error| self.broken(error))?;
        if ready.read {
            self.take_in()?;
        }
        Ok(())
    }

    /// Sending failed because the peer is gone: perhaps it has said why before.
    fn why_closed(&mut self, error: LinkError) -> ChannelError {
        if self.duplex {
            // Ends with the frame that says why, or when there is nothing more to read.
            if let Err(said @ (ChannelError::Peer { .. } | ChannelError::Gone(_))) = self.take_in()
            {
                return said;
            }
        }
        self.broken(error)
    }

    /// Sends a frame only as far as that is possible without waiting; for last words.
    pub(crate) fn send_now(&mut self, kind: Kind, body: &[u8]) -> bool {
        if self.torn {
            return false;
        }
        let Ok(phase) = self.phase.after(kind) else {
            return false;
        };
        let header = Header {
            kind,
            sequence: self.next_sent,
            body_len: body.len() as u32,
            payload_len: 0,
            body_crc: crc32fast::hash(body),
        }
        .encode();
        let total = HEADER_LEN + body.len();
        self.phase = phase;
        self.torn = true;
        self.io
            .send(
                self.link.fd(),
                &[&header, body],
                None,
                &[],
                0,
                Manner::Copied,
            )
            .is_ok_and(|count| count == total)
    }

    /// Sends GO. `Err(false, …)` if not one byte of it can have left.
    pub(crate) fn send_go(&mut self, body: &[u8]) -> Result<(), (bool, ChannelError)> {
        let before = self.sent_bytes;
        self.send(Kind::Go, body)
            .map_err(|error| (self.sent_bytes != before, error))
    }
}
