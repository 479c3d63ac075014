//! Passes over guest memory at the source: which pages, in which frames.

use crate::bitmap::{PageBitmap, PageRun};
use crate::channel::ChannelError;
use crate::frame::Kind;
use crate::guest_io::GuestPages;
use crate::layout::PAGE_SIZE;
use crate::memory_frames::ZeroFrame;
use crate::outgoing::Outgoing;
use crate::pagemap::Pagemap;
use crate::progress::Progress;
use crate::session::Session;
use crate::vm::{SourceVm, VmError};

/// How many dirty pages are protected at a time: 8 MiB. Each call costs an ioctl and a flush of
/// the guest's TLBs; but a page that the guest writes between its protection and its turn is sent
/// twice.
const CHUNK: u64 = 2048;

/// Protected ranges begin and end at multiples of this, as `KVM_CLEAR_DIRTY_LOG` wants it.
const ALIGN: u64 = 64;

/// How a pass treats the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Over all pages, most of which may never have been touched.
    First,
    /// Over what the guest wrote.
    Dirty,
    /// The same with the guest stopped.
    Last,
}

/// Why a pass ended early.
#[derive(Debug)]
pub(crate) enum PassError {
    Channel(ChannelError),
    Protect(VmError),
}

impl From<ChannelError> for PassError {
    fn from(error: ChannelError) -> Self {
        Self::Channel(error)
    }
}

/// What a pass sent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    pub(crate) pages: u64,
    /// Of all passes, and among `pages`: those that went as differences.
    differences: u64,
    pub(crate) zero: u64,
    pub(crate) skipped: u64,
}

/// The memory of the source, and which of its pages are still to be sent.
pub(crate) struct Memory {
    pub(crate) pages: GuestPages,
    pub(crate) pending: PageBitmap,
    pagemap: Pagemap,
    data: Outgoing,
    zero: ZeroFrame,
    touched: Vec<PageRun>,
    sent: Sent,
    told: Sent,
}

impl Memory {
    /// All pages pending.
    pub(crate) fn new(pages: GuestPages) -> Self {
        Self {
            pending: PageBitmap::full(pages.layout().pages()),
            pages,
            pagemap: Pagemap::open(),
            data: Outgoing::new(),
            zero: ZeroFrame::default(),
            touched: Vec::new(),
            sent: Sent::default(),
            told: Sent::default(),
        }
    }

    /// Sends all that is pending; nothing is pending afterwards. If `stop` says so it ends earlier,
    /// and the rest stays pending.
    pub(crate) fn send(
        &mut self,
        pass: Pass,
        round: u64,
        vm: &mut dyn SourceVm,
        session: &mut Session,
        progress: &Progress,
        stop: &dyn Fn() -> bool,
    ) -> Result<Sent, PassError> {
        self.sent = Sent {
            differences: self.data.differences(),
            ..Sent::default()
        };
        self.told = self.sent;
        self.data.begin(pass, self.pending.pages(), session);
        let mut next = 0;
        while !stop() {
            if pass == Pass::First {
                // Between chunks: a page that is protected in order to be sent must be sent.
                self.leave_out(&vm.free_pages(), round, session)?;
            }
            let Some(chunk) = self.next_chunk(next) else {
                break;
            };
            next = chunk.end();
            if pass != Pass::Last {
                vm.protect(&self.pending, chunk.first, chunk.count)
                    .map_err(PassError::Protect)?;
            }
            self.send_chunk(pass, chunk, round, session, progress)?;
            self.pending.clear_range(chunk.first, chunk.count);
            session.look_at_answers()?;
        }
        self.data.flush(&self.pages, round, session)?;
        self.data.end(session);
        self.flush_zero(round, session)?;
        self.tell(session, progress);
        Ok(self.sent)
    }

    /// The next range with about [`CHUNK`] pending pages in it.
    fn next_chunk(&self, from: u64) -> Option<PageRun> {
        let pages = self.pending.pages();
        let first = self.pending.next_set(from)? / ALIGN * ALIGN;
        let (mut end, mut found) = (first, 0);
        for run in self.pending.runs(first, pages, CHUNK) {
            found += run.count;
            // No more than the chunk's share of a long run.
            end = run.end() - found.saturating_sub(CHUNK);
            if found >= CHUNK {
                break;
            }
        }
        let end = end.next_multiple_of(ALIGN).min(pages);
        Some(PageRun {
            first,
            count: end - first,
        })
    }

    fn send_chunk(
        &mut self,
        pass: Pass,
        chunk: PageRun,
        round: u64,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<(), ChannelError> {
        let mut at = chunk.first;
        while let Some(run) = self
            .pending
            .runs(at, chunk.end().saturating_sub(at), CHUNK)
            .next()
        {
            let run = self.pages.within_region(run);
            at = run.end();
            let mut touched = std::mem::take(&mut self.touched);
            let known = match pass {
                // The pages are protected: one that is touched from here on is seen as dirty.
                Pass::First => self.pages.touched(run, &mut self.pagemap, &mut touched),
                Pass::Dirty | Pass::Last => false,
            };
            if !known {
                self.touched = touched;
                self.send_touched(run, round, session, progress)?;
                continue;
            }
            let mut untouched_from = run.first;
            for part in &touched {
                let part = PageRun {
                    first: run.first + part.first,
                    count: part.count,
                };
                self.skip(untouched_from, part.first, round, session)?;
                self.send_touched(part, round, session, progress)?;
                untouched_from = part.end();
            }
            self.skip(untouched_from, run.end(), round, session)?;
            self.touched = touched;
        }
        Ok(())
    }

    fn skip(
        &mut self,
        first: u64,
        end: u64,
        round: u64,
        session: &mut Session,
    ) -> Result<(), ChannelError> {
        if end <= first {
            return Ok(());
        }
        self.sent.skipped += end - first;
        let count = end - first;
        self.add_zero(PageRun { first, count }, round, session)
    }

    /// Tells of the pages that are still pending in `free` that they are zero: the guest has no
    /// use for what they hold.
    fn leave_out(
        &mut self,
        free: &[PageRun],
        round: u64,
        session: &mut Session,
    ) -> Result<(), ChannelError> {
        for run in free {
            let mut at = run.first;
            while let Some(part) = self
                .pending
                .runs(at, run.end().saturating_sub(at), CHUNK)
                .next()
            {
                let part = self.pages.within_region(part);
                at = part.end();
                self.skip(part.first, part.end(), round, session)?;
                self.pending.clear_range(part.first, part.count);
            }
        }
        Ok(())
    }

    fn send_touched(
        &mut self,
        run: PageRun,
        round: u64,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<(), ChannelError> {
        for page in run.first..run.end() {
            if self.pages.is_zero(page) {
                self.add_zero(
                    PageRun {
                        first: page,
                        count: 1,
                    },
                    round,
                    session,
                )?;
                continue;
            }
            self.sent.pages += 1;
            if self.data.add(&self.pages, page, round, session)? {
                self.tell(session, progress);
            }
        }
        Ok(())
    }

    fn add_zero(
        &mut self,
        run: PageRun,
        round: u64,
        session: &mut Session,
    ) -> Result<(), ChannelError> {
        self.sent.zero += run.count;
        self.data.forget(run);
        self.zero.add(&self.pages, run);
        if self.zero.is_full() {
            self.flush_zero(round, session)?;
        }
        Ok(())
    }

    /// Within a pass each page comes once, so that zeroes may be told later than data.
    fn flush_zero(&mut self, round: u64, session: &mut Session) -> Result<(), ChannelError> {
        match self.zero.take(&self.pages) {
            Some(body) => session.send(Kind::Zero, body, round),
            None => Ok(()),
        }
    }

    fn tell(&mut self, session: &Session, progress: &Progress) {
        self.sent.differences = self.data.differences();
        let (sent, told) = (self.sent, self.told);
        self.told = sent;
        let differences = sent.differences - told.differences;
        let data = sent.pages - told.pages;
        let zero = sent.zero - told.zero;
        progress.update(|snapshot| {
            session.tell(snapshot);
            self.data.tell(snapshot);
            let ram = &mut snapshot.ram;
            ram.normal += data - differences;
            ram.normal_bytes = ram.normal * PAGE_SIZE;
            ram.duplicate += zero;
            snapshot.skipped += sent.skipped - told.skipped;
            ram.remaining = ram.remaining.saturating_sub((data + zero) * PAGE_SIZE);
        });
    }
}
