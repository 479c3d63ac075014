//! Pages with contents on their way out: as they are, compressed, or as differences to what was
//! sent before.
//!
//! Pages that go as they are go straight from guest memory, unless the XBZRLE cache is to remember
//! them. Whatever is compressed, remembered or compared is copied out of guest memory first,
//! and the copy is also what is checksummed: so a guest that writes meanwhile can't make
//! them disagree.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::bitmap::PageRun;
use crate::channel::ChannelError;
use crate::compression::compressors::Compressors;
use crate::compression::decision::{Decision, Plan, Sample};
use crate::compression::{MAX_BLOCK, Setting};
use crate::frame::{Kind, MAX_PAGES};
use crate::guest_io::GuestPages;
use crate::layout::PAGE_SIZE;
use crate::memory_frames::Runs;
use crate::message::{Compressed, Differences, encode_pages};
use crate::page_sender::FrameSink;
use crate::progress;
use crate::rounds::Pass;
use crate::xbzrle::cache::{Cache, Exchange};
use crate::xbzrle::{Figures, Page};

/// How many pages are compressed to see whether it would pay.
const TRY_PAGES: u64 = 64;

/// A frame is not compressed for longer than this: then comes the next look at the link.
const COMPRESSING: Duration = Duration::from_millis(1);

/// What a page costs in an XBZRLE frame beside its difference: a checksum, a length, and a run.
const PAGE_OVERHEAD: u64 = 18;

/// How the user wants pages to go, as far as the destination can take it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) compression: Setting,
    /// What is quicker, and may take its place while the link would have to wait for it.
    pub(crate) quick: Setting,
    /// The size of the XBZRLE cache in bytes; `None` without XBZRLE.
    pub(crate) xbzrle: Option<u64>,
    /// Whether pages go without checksums.
    pub(crate) unchecked: bool,
}

/// The frames that are being filled, and what they are filled with.
pub(crate) struct Outgoing {
    whole: Whole,
    changed: Changed,
    page: Box<Page>,
    body: Vec<u8>,
    pass: Pass,
    /// Pages for [`Whole`], at most.
    limit: u64,
    checked: bool,
    compressors: Option<Compressors>,
    decision: Decision,
    compressed: progress::Compression,
    cache: Option<Cache>,
    xbzrle: Figures,
    xbzrle_before: Figures,
    /// Pages of this pass.
    pages: u64,
    /// Bytes of the frames sent so far.
    bytes: u64,
    /// The end of the last sample, and how long the connection had waited until then.
    sampled: (Instant, Duration),
}

/// A PAGES or COMPRESSED frame that is being filled.
#[derive(Default)]
struct Whole {
    plan: Option<Plan>,
    runs: Runs,
    crcs: Vec<u32>,
    /// What follows the body, if it doesn't come from guest memory.
    data: Vec<u8>,
    /// Pages of a block that is not compressed yet.
    block: Vec<u8>,
    blocks: Vec<u32>,
    compressing: Duration,
}

/// An XBZRLE frame that is being filled.
#[derive(Default)]
struct Changed {
    runs: Runs,
    crcs: Vec<u32>,
    lengths: Vec<u16>,
    data: Vec<u8>,
}

impl Outgoing {
    pub(crate) fn new() -> Self {
        Self {
            whole: Whole::default(),
            changed: Changed::default(),
            page: Box::new([0; PAGE_SIZE as usize]),
            body: Vec::new(),
            pass: Pass::First,
            limit: 1,
            checked: true,
            compressors: None,
            decision: Decision::default(),
            compressed: progress::Compression::default(),
            cache: None,
            xbzrle: Figures::default(),
            xbzrle_before: Figures::default(),
            pages: 0,
            bytes: 0,
            sampled: (Instant::now(), Duration::ZERO),
        }
    }

    /// A pass begins over a guest of `pages` pages: what the user wants may have changed.
    pub(crate) fn begin(&mut self, pass: Pass, pages: u64, wanted: Wanted, sink: &dyn FrameSink) {
        self.pass = pass;
        self.limit = sink.frame_pages();
        self.checked = !wanted.unchecked;
        self.pages = 0;
        self.sampled = (Instant::now(), sink.waited());
        self.prepare_compressors(wanted);
        self.prepare_cache(pages, wanted.xbzrle);
    }

    /// For so long there was nothing to send: that is no part of what sending takes.
    pub(crate) fn idled(&mut self, time: Duration) {
        self.sampled.0 += time;
    }

    fn prepare_compressors(&mut self, wanted: Wanted) {
        let now = self.compressors.as_ref().map(Compressors::setting);
        if now.unwrap_or_default() == wanted.compression {
            return;
        }
        self.decision = Decision::default();
        self.compressors =
            Compressors::new(wanted.compression, wanted.quick).unwrap_or_else(|error| {
                tracing::warn!(setting = ?wanted.compression, "pages are sent as they are: {error}");
                None
            });
    }

    fn prepare_cache(&mut self, pages: u64, size: Option<u64>) {
        if self.cache.as_ref().map(Cache::size) != size {
            self.cache = size.and_then(|size| Cache::new(size, pages).ok());
        }
        if let Some(cache) = &mut self.cache {
            cache.begin_round();
        }
        self.xbzrle.cache_size = size.unwrap_or(0);
        self.xbzrle_before = self.xbzrle;
    }

    /// Adds a page as it is now. Says whether a frame was sent.
    pub(crate) fn add(
        &mut self,
        memory: &GuestPages,
        page: u64,
        round: u64,
        sink: &mut dyn FrameSink,
    ) -> Result<bool, ChannelError> {
        self.pages += 1;
        // The first pass is over more than the cache holds; what is written again is worth it.
        if self.pass != Pass::First && self.cache.is_some() {
            memory.read(page, &mut self.page);
            if self.add_difference(memory, page) {
                let Changed { runs, data, .. } = &self.changed;
                let full = runs.pages() >= MAX_PAGES;
                return if full || data.len() as u64 >= self.limit * PAGE_SIZE {
                    self.flush_changed(memory, round, sink)?;
                    Ok(true)
                } else {
                    Ok(false)
                };
            }
            self.begin_whole(sink);
            if self.checked {
                self.whole.crcs.push(crc32fast::hash(&*self.page));
            }
            let to = match self.whole.plan {
                Some(Plan::Plain) => &mut self.whole.data,
                _ => &mut self.whole.block,
            };
            to.extend(&*self.page);
        } else {
            self.begin_whole(sink);
            let plain = self.whole.plan == Some(Plan::Plain);
            if !plain {
                memory.read(page, &mut self.page);
                self.whole.block.extend(&*self.page);
            }
            if self.checked {
                self.whole.crcs.push(match plain {
                    true => memory.crc(page),
                    false => crc32fast::hash(&*self.page),
                });
            }
        }
        self.whole.runs.add(memory, only(page));
        if self.whole.block.len() >= MAX_BLOCK {
            self.compress_block();
        }
        let limit = match self.whole.plan {
            Some(Plan::Try(_)) => self.limit.min(TRY_PAGES),
            _ => self.limit,
        };
        if self.whole.runs.pages() >= limit || self.whole.compressing >= COMPRESSING {
            self.flush_whole(memory, round, sink)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// The destination has been told something else of these pages.
    pub(crate) fn forget(&mut self, run: PageRun) {
        if let Some(cache) = &mut self.cache {
            cache.forget(run.first, run.count);
        }
    }

    /// Sends what has been added.
    pub(crate) fn flush(
        &mut self,
        memory: &GuestPages,
        round: u64,
        sink: &mut dyn FrameSink,
    ) -> Result<(), ChannelError> {
        self.flush_changed(memory, round, sink)?;
        self.flush_whole(memory, round, sink)
    }

    /// The pass has ended, and all of it is sent.
    pub(crate) fn end(&mut self) {
        if self.pass != Pass::First {
            self.xbzrle.rate_since(&self.xbzrle_before, self.pages);
        }
    }

    /// How many pages have gone as differences.
    pub(crate) fn differences(&self) -> u64 {
        self.xbzrle.pages
    }

    /// The bytes of the frames sent so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What went compressed; `None` if it is off and never was on.
    pub(crate) fn compression(&self) -> Option<progress::Compression> {
        let any = self.compressors.is_some() || self.compressed.pages > 0;
        any.then(|| progress::Compression {
            active: self.compressors.is_some() && self.decision.compresses(),
            ..self.compressed
        })
    }

    /// What went as differences; `None` if that is off.
    pub(crate) fn xbzrle(&self) -> Option<Figures> {
        self.cache.as_ref().map(|_| self.xbzrle)
    }

    /// Adds `self.page` to the differences, if it can be one.
    fn add_difference(&mut self, memory: &GuestPages, page: u64) -> bool {
        let Some(cache) = &mut self.cache else {
            return false;
        };
        let frame = &mut self.changed;
        match cache.exchange(page, &self.page, &mut frame.data) {
            Exchange::Delta(len) => {
                frame.runs.add(memory, only(page));
                if self.checked {
                    frame.crcs.push(crc32fast::hash(&*self.page));
                }
                frame.lengths.push(len as u16);
                self.xbzrle.pages += 1;
                self.xbzrle.bytes += len as u64 + PAGE_OVERHEAD;
                true
            }
            Exchange::Miss => {
                self.xbzrle.cache_miss += 1;
                false
            }
            Exchange::Overflow => {
                self.xbzrle.overflow += 1;
                false
            }
        }
    }

    /// Decides, before the first page of a frame, what kind it is.
    fn begin_whole(&mut self, sink: &dyn FrameSink) {
        if self.whole.plan.is_some() {
            return;
        }
        let plan = match &self.compressors {
            None => Plan::Plain,
            // With the guest stopped nothing is tried.
            Some(_) if self.pass == Pass::Last && !self.decision.compresses() => Plan::Plain,
            Some(_) => self.decision.plan(sink.has_room()),
        };
        self.whole.plan = Some(plan);
    }

    fn compress_block(&mut self) {
        let frame = &mut self.whole;
        let effort = frame.plan.and_then(Plan::effort);
        let (Some(compressors), Some(effort)) = (&mut self.compressors, effort) else {
            return;
        };
        let began = processor_time();
        let compressor = compressors.pick(effort);
        let len = compressor.compress(&frame.block, &mut frame.data);
        frame.blocks.push(len as u32);
        frame.block.clear();
        frame.compressing += processor_time().saturating_sub(began);
    }

    fn flush_whole(
        &mut self,
        memory: &GuestPages,
        round: u64,
        sink: &mut dyn FrameSink,
    ) -> Result<(), ChannelError> {
        if self.whole.runs.pages() == 0 {
            return Ok(());
        }
        if !self.whole.block.is_empty() {
            self.compress_block();
        }
        let frame = &mut self.whole;
        let pages = frame.runs.pages();
        let effort = frame.plan.and_then(Plan::effort);
        let compressors = self.compressors.as_mut().zip(effort);
        let method = compressors.and_then(|(all, effort)| all.pick(effort).setting().method());
        let before = sink.own_bytes();
        match method {
            Some(method) => {
                let runs = frame.runs.addresses(memory);
                Compressed::encode(method, runs, &frame.crcs, &frame.blocks, &mut self.body);
                sink.send_data(Kind::Compressed, &self.body, &[&frame.data], round)?;
                self.compressed.pages += pages;
                self.compressed.bytes += frame.data.len() as u64;
            }
            None => {
                encode_pages(frame.runs.addresses(memory), &frame.crcs, &mut self.body);
                if frame.data.is_empty() {
                    sink.send_pages(&self.body, memory, frame.runs.as_slice(), round)?;
                } else {
                    sink.send_data(Kind::Pages, &self.body, &[&frame.data], round)?;
                }
            }
        }
        let bytes = sink.own_bytes() - before;
        self.bytes += bytes;
        let (since, waited) = self.sampled;
        self.sampled = (Instant::now(), sink.waited());
        if self.compressors.is_some() && self.pass != Pass::Last {
            self.decision.sent(&Sample {
                input: pages * PAGE_SIZE,
                output: bytes,
                total: self.sampled.0 - since,
                compressing: self.whole.compressing,
                waiting: self.sampled.1.saturating_sub(waited),
            });
        }
        self.whole.clear();
        self.limit = sink.frame_pages();
        Ok(())
    }

    fn flush_changed(
        &mut self,
        memory: &GuestPages,
        round: u64,
        sink: &mut dyn FrameSink,
    ) -> Result<(), ChannelError> {
        let frame = &mut self.changed;
        if frame.runs.pages() == 0 {
            return Ok(());
        }
        let runs = frame.runs.addresses(memory);
        Differences::encode(runs, &frame.crcs, &frame.lengths, &mut self.body);
        let before = sink.own_bytes();
        sink.send_data(Kind::Xbzrle, &self.body, &[&frame.data], round)?;
        self.bytes += sink.own_bytes() - before;
        frame.clear();
        // It says nothing about pages that are sent whole.
        self.sampled = (Instant::now(), sink.waited());
        Ok(())
    }
}

/// What this thread has had of a processor so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn only(page: u64) -> PageRun {
    PageRun {
        first: page,
        count: 1,
    }
}

impl Whole {
    fn clear(&mut self) {
        self.plan = None;
        self.runs.clear();
        self.crcs.clear();
        self.data.clear();
        self.block.clear();
        self.blocks.clear();
        self.compressing = Duration::ZERO;
    }
}

impl Changed {
    fn clear(&mut self) {
        self.runs.clear();
        self.crcs.clear();
        self.lengths.clear();
        self.data.clear();
    }
}
