//! Sends runs of pages on one connection: those that are zero are told as such, the others go as
//! [`Outgoing`] finds best. Which pages those are is for `rounds` to say.

use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::PageRun;
use crate::channel::ChannelError;
use crate::frame::Kind;
use crate::guest_io::GuestPages;
use crate::memory_frames::ZeroFrame;
use crate::outgoing::{Outgoing, Wanted};
use crate::progress;
use crate::rounds::Pass;
use crate::xbzrle::Figures;

/// Where frames with pages go: a connection.
pub(crate) trait FrameSink {
    /// Sends a PAGES frame: the pages of `runs`, each within one region, follow `body`.
    fn send_pages(
        &mut self,
        body: &[u8],
        memory: &GuestPages,
        runs: &[PageRun],
        round: u64,
    ) -> Result<(), ChannelError>;

    /// Sends a frame with its data.
    fn send_data(
        &mut self,
        kind: Kind,
        body: &[u8],
        data: &[&[u8]],
        round: u64,
    ) -> Result<(), ChannelError>;

    /// Sends a frame without.
    fn send(&mut self, kind: Kind, body: &[u8], round: u64) -> Result<(), ChannelError>;

    /// Bytes that were sent on this connection so far.
    fn own_bytes(&self) -> u64;

    /// How long it has waited for the link, or for the limit of its bandwidth, so far.
    fn waited(&self) -> Duration;

    /// Whether the link would take more now without a wait; if not, it has enough to do for a while.
    fn has_room(&self) -> bool;

    /// How many pages to put in a frame.
    fn frame_pages(&self) -> u64;
}

/// Pages that were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Pages with contents.
    pub(crate) pages: u64,
    /// The bytes of the frames that they went in.
    pub(crate) bytes: u64,
    /// Among `pages`: those that went as differences.
    pub(crate) differences: u64,
    /// Pages told to be zero.
    pub(crate) zero: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        let Self {
            pages,
            bytes,
            differences,
            zero,
        } = other;
        self.pages += pages;
        self.bytes += bytes;
        self.differences += differences;
        self.zero += zero;
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            pages: self.pages - before.pages,
            bytes: self.bytes - before.bytes,
            differences: self.differences - before.differences,
            zero: self.zero - before.zero,
        }
    }
}

/// The frames of one connection that are being filled.
pub(crate) struct PageSender {
    memory: Arc<GuestPages>,
    data: Outgoing,
    zero: ZeroFrame,
    pages: u64,
    zeroes: u64,
}

impl PageSender {
    pub(crate) fn new(memory: Arc<GuestPages>) -> Self {
        Self {
            memory,
            data: Outgoing::new(),
            zero: ZeroFrame::default(),
            pages: 0,
            zeroes: 0,
        }
    }

    /// A pass begins: what the user wants may have changed.
    pub(crate) fn begin(&mut self, pass: Pass, wanted: Wanted, sink: &dyn FrameSink) {
        let pages = self.memory.layout().pages();
        self.data.begin(pass, pages, wanted, sink);
    }

    /// For so long there was nothing to send.
    pub(crate) fn idled(&mut self, time: Duration) {
        self.data.idled(time);
    }

    /// Sends a run within one region. Says whether a frame with contents has left.
    pub(crate) fn send(
        &mut self,
        run: PageRun,
        round: u64,
        sink: &mut dyn FrameSink,
    ) -> Result<bool, ChannelError> {
        let mut left = false;
        for page in run.first..run.end() {
            if self.memory.is_zero(page) {
                let only = PageRun {
                    first: page,
                    count: 1,
                };
                self.send_zero(only, round, sink)?;
                continue;
            }
            self.pages += 1;
            left |= self.data.add(&self.memory, page, round, sink)?;
        }
        Ok(left)
    }

    /// Tells that a run within one region is zero, whatever is in it.
    pub(crate) fn send_zero(
        &mut self,
        run: PageRun,
        round: u64,
        sink: &mut dyn FrameSink,
    ) -> Result<(), ChannelError> {
        self.zeroes += run.count;
        self.data.forget(run);
        self.zero.add(&self.memory, run);
        if self.zero.is_full() {
            self.flush_zero(round, sink)?;
        }
        Ok(())
    }

    /// Sends what is left in the frames.
    pub(crate) fn flush(
        &mut self,
        round: u64,
        sink: &mut dyn FrameSink,
    ) -> Result<(), ChannelError> {
        self.data.flush(&self.memory, round, sink)?;
        self.flush_zero(round, sink)
    }

    /// Within a pass each page comes once, so that zeroes may be told later than data.
    fn flush_zero(&mut self, round: u64, sink: &mut dyn FrameSink) -> Result<(), ChannelError> {
        match self.zero.take(&self.memory) {
            Some(body) => sink.send(Kind::Zero, body, round),
            None => Ok(()),
        }
    }

    /// The pass has ended, and all of it is sent.
    pub(crate) fn end(&mut self) {
        self.data.end();
    }

    /// What was sent so far; what is still in the frames included.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            pages: self.pages,
            bytes: self.data.bytes(),
            differences: self.data.differences(),
            zero: self.zeroes,
        }
    }

    /// What went compressed; `None` if it is off and never was on.
    pub(crate) fn compression(&self) -> Option<progress::Compression> {
        self.data.compression()
    }

    /// What went as differences; `None` if that is off.
    pub(crate) fn xbzrle(&self) -> Option<Figures> {
        self.data.xbzrle()
    }
}
