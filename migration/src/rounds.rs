//! Passes over guest memory at the source: which pages, in which order. How they are sent is
//! `page_sender`'s business, on the first connection or, through `source::channels`, on others.

use std::sync::Arc;

use crate::bitmap::{PageBitmap, PageRun};
use crate::channel::ChannelError;
use crate::guest_io::GuestPages;
use crate::layout::PAGE_SIZE;
use crate::page_sender::{Counts, PageSender};
use crate::pagemap::Pagemap;
use crate::progress::Progress;
use crate::session::Session;
use crate::source::channels::Unit;
use crate::vm::{SourceVm, VmError};

/// How many dirty pages are protected at a time: 8 MiB. Each call costs an ioctl and a flush of
/// the guest's TLBs; but a page that the guest writes between its protection and its turn is sent
/// twice.
const CHUNK: u64 = 2048;

/// How much memory that was never touched is protected at a time: 256 MiB. KVM holds its MMU's lock
/// for some 10 ns a page, and the guest's faults wait for it.
const HOLE: u64 = 1 << 16;

/// Protected ranges begin and end at multiples of this, as `KVM_CLEAR_DIRTY_LOG` wants it.
const ALIGN: u64 = 64;

/// How a pass treats the pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Over all pages, most of which may never have been touched.
    #[default]
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
    pub(crate) zero: u64,
    pub(crate) skipped: u64,
}

/// The memory of the source, and which of its pages are still to be sent.
pub(crate) struct Memory {
    pub(crate) pages: Arc<GuestPages>,
    pub(crate) pending: PageBitmap,
    pagemap: Pagemap,
    /// On the first connection.
    sender: PageSender,
    /// For another connection, if there are some in this pass.
    unit: Option<Unit>,
    touched: Vec<PageRun>,
    skipped: u64,
    /// What was sent, and skipped, when it was told last.
    told: (Counts, u64),
}

impl Memory {
    /// All pages pending.
    pub(crate) fn new(pages: Arc<GuestPages>) -> Self {
        Self {
            pending: PageBitmap::full(pages.layout().pages()),
            pagemap: Pagemap::open(),
            sender: PageSender::new(Arc::clone(&pages)),
            pages,
            unit: None,
            touched: Vec::new(),
            skipped: 0,
            told: (Counts::default(), 0),
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
        let before = (self.counts(session), self.skipped);
        self.sender.begin(pass, session.wanted(), session);
        self.unit = session.begin_pass(pass).then(Unit::default);
        let mut next = 0;
        while !stop() {
            if pass == Pass::First {
                // Between chunks: a page that is protected in order to be sent must be sent.
                self.leave_out(&vm.free_pages(), round, session)?;
            }
            let Some(chunk) = self.next_chunk(pass, next) else {
                break;
            };
            next = chunk.end();
            if pass != Pass::Last {
                vm.protect(&self.pending, chunk.first, chunk.count)
                    .map_err(PassError::Protect)?;
            }
            let end = self.send_chunk(pass, chunk, round, session, progress, stop)?;
            // What is protected and was not sent stays pending.
            self.pending.clear_range(chunk.first, end - chunk.first);
            session.look_at_answers()?;
        }
        if let Some(unit) = self.unit.take() {
            session.submit(unit, round)?;
        }
        self.sender.flush(round, session)?;
        session.wait_for_channels(round)?;
        self.sender.end();
        let sent = self.counts(session).since(before.0);
        if sent.pages > 0 {
            session.convergence.pages_took(sent.pages, sent.bytes);
        }
        self.tell(session, progress);
        Ok(Sent {
            pages: sent.pages,
            zero: sent.zero,
            skipped: self.skipped - before.1,
        })
    }

    /// What was sent so far, on all connections.
    fn counts(&self, session: &Session) -> Counts {
        let mut counts = self.sender.counts();
        counts.add(session.elsewhere().counts);
        counts
    }

    /// The next range with about [`CHUNK`] pending pages in it, or with up to [`HOLE`] that were never
    /// touched.
    fn next_chunk(&mut self, pass: Pass, from: u64) -> Option<PageRun> {
        let pages = self.pending.pages();
        let first = self.pending.next_set(from)? / ALIGN * ALIGN;
        if pass == Pass::First {
            let ahead = self.pages.within_region(PageRun {
                first,
                count: HOLE.min(pages - first),
            });
            let hole = self.pages.untouched(ahead, &mut self.pagemap) / ALIGN * ALIGN;
            if hole > CHUNK {
                return Some(PageRun { first, count: hole });
            }
        }
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

    /// Sends what is pending in a chunk, or as much of it as there is before `stop`: up to the page
    /// that is returned.
    fn send_chunk(
        &mut self,
        pass: Pass,
        chunk: PageRun,
        round: u64,
        session: &mut Session,
        progress: &Progress,
        stop: &dyn Fn() -> bool,
    ) -> Result<u64, ChannelError> {
        let mut at = chunk.first;
        while let Some(run) = self
            .pending
            .runs(at, chunk.end().saturating_sub(at), u64::MAX)
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
                let end = self.send_touched(run, round, session, progress, stop)?;
                if end < run.end() {
                    return Ok(end);
                }
                continue;
            }
            let mut untouched_from = run.first;
            for part in &touched {
                let part = PageRun {
                    first: run.first + part.first,
                    count: part.count,
                };
                self.skip(untouched_from, part.first, round, session)?;
                let end = self.send_touched(part, round, session, progress, stop)?;
                if end < part.end() {
                    self.touched = touched;
                    return Ok(end);
                }
                untouched_from = part.end();
            }
            self.skip(untouched_from, run.end(), round, session)?;
            self.touched = touched;
        }
        Ok(chunk.end())
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
        let count = end - first;
        self.skipped += count;
        self.sender
            .send_zero(PageRun { first, count }, round, session)
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

    /// Sends a run within one region, or as much of it as there is before `stop`: up to the page
    /// that is returned.
    fn send_touched(
        &mut self,
        mut run: PageRun,
        round: u64,
        session: &mut Session,
        progress: &Progress,
        stop: &dyn Fn() -> bool,
    ) -> Result<u64, ChannelError> {
        while run.count > 0 && !stop() {
            let most = session.frame_pages();
            let there = self.unit.as_ref().map_or(0, |unit| unit.pages);
            let part = PageRun {
                first: run.first,
                count: run.count.min(most.saturating_sub(there).max(1)),
            };
            run = PageRun {
                first: part.end(),
                count: run.count - part.count,
            };
            let left = match &mut self.unit {
                None => self.sender.send(part, round, session)?,
                Some(unit) => {
                    unit.add(part);
                    let full = unit.pages >= most;
                    if full {
                        session.submit(std::mem::take(unit), round)?;
                    }
                    full
                }
            };
            if left {
                self.tell(session, progress);
            }
        }
        Ok(run.first)
    }

    fn tell(&mut self, session: &Session, progress: &Progress) {
        let now = (self.counts(session), self.skipped);
        let (before, skipped) = std::mem::replace(&mut self.told, now);
        let new = now.0.since(before);
        progress.update(|snapshot| {
            session.tell(snapshot);
            snapshot.xbzrle = self.sender.xbzrle();
            snapshot.compression = session.compression(self.sender.compression());
            let ram = &mut snapshot.ram;
            ram.normal += new.pages - new.differences;
            ram.normal_bytes = ram.normal * PAGE_SIZE;
            ram.duplicate += new.zero;
            snapshot.skipped += now.1 - skipped;
            let bytes = (new.pages + new.zero) * PAGE_SIZE;
            ram.remaining = ram.remaining.saturating_sub(bytes);
        });
    }
}
