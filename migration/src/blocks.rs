//! Passes over the disks at the source: first all of each, then the blocks that the guest wrote
//! meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bitmap::BlockBitmap;
use crate::channel::ChannelError;
use crate::disk::{BLOCK_SIZE, SourceDisk};
use crate::frame::Kind;
use crate::layout::PAGE_SIZE;
use crate::message::{BlockRun, RunKind, encode_blocks};
use crate::progress::Progress;
use crate::read_ahead::{Batch, Next, Plan, ReadAhead, ReadError, Readable};
use crate::session::Session;
use crate::vm::{Offer, SourceVm, VmError};

/// How long a cancel, or an answer of the destination, may go unnoticed while a disk is slow.
const LOOK: Duration = Duration::from_millis(10);

/// After so much data the destination is asked to flush, so that no flush takes too long: 4 GiB.
const FLUSH_BYTES: u64 = 4 << 30;

/// Why a pass ended early.
#[derive(Debug)]
pub(crate) enum BlocksError {
    Channel(ChannelError),
    Read(ReadError),
}

impl From<ChannelError> for BlocksError {
    fn from(error: ChannelError) -> Self {
        Self::Channel(error)
    }
}

impl From<ReadError> for BlocksError {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

/// What a pass sent, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SentBlocks {
    /// With their data.
    pub(crate) data: u64,
    /// As zeroes.
    pub(crate) zero: u64,
}

/// The disks of the source, and which of their blocks are still to be sent.
#[derive(Default)]
pub(crate) struct Disks {
    disks: Vec<Readable>,
    pending: Vec<BlockBitmap>,
    /// Data written at the destination since its last flush, in bytes.
    unflushed: u64,
    /// Whether anything was, zeroes included.
    wrote: bool,
    body: Vec<u8>,
}

impl Disks {
    /// The disks of the offer.
    pub(crate) fn open(vm: &mut dyn SourceVm, offer: &Offer) -> Result<Self, VmError> {
        let mut disks = Self::default();
        for (index, info) in offer.disks.iter().enumerate() {
            disks.pending.push(BlockBitmap::new(info.blocks()));
            disks.disks.push(Readable {
                info: info.clone(),
                disk: vm.open_disk(index)?,
            });
        }
        Ok(disks)
    }

    /// The disks themselves, for their logs.
    pub(crate) fn each(&self) -> impl Iterator<Item = &Arc<dyn SourceDisk>> {
        self.disks.iter().map(|disk| &disk.disk)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.disks.iter().map(|disk| disk.info.capacity).sum()
    }

    /// Adds to what is pending what the guest wrote since the last harvest.
    pub(crate) fn harvest(&mut self) {
        for (disk, pending) in self.disks.iter().zip(&mut self.pending) {
            disk.disk.harvest_dirty(pending);
        }
    }

    /// How much is pending, in bytes.
    pub(crate) fn pending_bytes(&self) -> u64 {
        let disks = self.disks.iter().zip(&self.pending);
        disks
            .map(|(disk, pending)| {
                let short = disk.info.blocks() * BLOCK_SIZE - disk.info.capacity;
                let last = pending.test(disk.info.blocks().saturating_sub(1));
                pending.count() * BLOCK_SIZE - if last { short } else { 0 }
            })
            .sum()
    }

    /// The bulk pass: all of each disk, data, zeroes and what is absent, in order.
    pub(crate) fn send_whole(
        &mut self,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<(), BlocksError> {
        if !self.is_empty() {
            self.send(Plan::Whole, 0, session, progress)?;
        }
        Ok(())
    }

    /// Sends what is pending, which was harvested before: a write that comes while its block is
    /// read is harvested later, and the block comes again. Nothing is pending afterwards.
    pub(crate) fn send_pending(
        &mut self,
        round: u64,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<SentBlocks, BlocksError> {
        if self.pending.iter().all(BlockBitmap::is_empty) {
            return Ok(SentBlocks::default());
        }
        let fresh = self
            .pending
            .iter()
            .map(|set| BlockBitmap::new(set.pages()))
            .collect();
        let pending = std::mem::replace(&mut self.pending, fresh);
        self.send(Plan::Blocks(pending), round, session, progress)
    }

    fn send(
        &mut self,
        plan: Plan,
        round: u64,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<SentBlocks, BlocksError> {
        let mut reading = ReadAhead::start(self.disks.clone(), plan)?;
        let mut sent = SentBlocks::default();
        let (mut read_bytes, mut read_time) = (0, Duration::ZERO);
        loop {
            let began = Instant::now();
            let next = reading.next(LOOK)?;
            session.starved(began.elapsed());
            let batch = match next {
                Next::Batch(batch) => batch,
                Next::Done => {
                    reading.join()?;
                    break;
                }
                Next::NotYet => {
                    session.wait_for_disk(round)?;
                    if session.channel.link().is_late() {
                        return Err(ReadError::Late.into());
                    }
                    continue;
                }
            };
            self.send_batch(&batch, round, session, progress, &mut sent)?;
            read_bytes += batch.read_bytes();
            read_time += batch.read_time;
            reading.recycle(batch);
            if self.unflushed >= FLUSH_BYTES && session.is_paced() {
                self.flush(round, session, progress)?;
            }
        }
        session.convergence.disks.read(read_bytes, read_time);
        Ok(sent)
    }

    fn send_batch(
        &mut self,
        batch: &Batch,
        round: u64,
        session: &mut Session,
        progress: &Progress,
        sent: &mut SentBlocks,
    ) -> Result<(), ChannelError> {
        let mut rest = &batch.parts[..];
        while !rest.is_empty() {
            let limit = session.frame_pages() * PAGE_SIZE;
            let mut bytes = 0;
            let count = rest
                .iter()
                .take_while(|(run, _)| {
                    bytes += run.data_len();
                    bytes <= limit
                })
                .count()
                .max(1);
            let (now, later) = rest.split_at(count.min(rest.len()));
            rest = later;
            let runs: Vec<BlockRun> = now.iter().map(|&(run, _)| run).collect();
            let data: Vec<&[u8]> = now
                .iter()
                .map(|&part| batch.data(part))
                .filter(|data| !data.is_empty())
                .collect();
            encode_blocks(batch.disk as u16, &runs, &mut self.body);
            session.send_data(Kind::Blocks, &self.body, &data, round)?;
            self.count(&runs, session, progress, sent);
        }
        Ok(())
    }

    fn count(
        &mut self,
        runs: &[BlockRun],
        session: &Session,
        progress: &Progress,
        sent: &mut SentBlocks,
    ) {
        let of = |wanted: fn(&RunKind) -> bool| -> u64 {
            let runs = runs.iter().filter(|run| wanted(&run.kind));
            runs.map(|run| run.len).sum()
        };
        let data = of(|kind| matches!(kind, RunKind::Data(_)));
        let zero = of(|kind| matches!(kind, RunKind::Zero));
        let absent = of(|kind| matches!(kind, RunKind::Absent));
        sent.data += data;
        sent.zero += zero;
        self.unflushed += data;
        self.wrote |= data + zero > 0;
        progress.update(|snapshot| {
            session.tell(snapshot);
            if let Some(disk) = &mut snapshot.disk {
                disk.normal += runs.iter().filter(|run| run.data_len() > 0).count() as u64;
                disk.normal_bytes += data;
                disk.zero_bytes += zero;
                disk.absent_bytes += absent;
                disk.remaining = disk.remaining.saturating_sub(data + zero + absent);
            }
        });
    }

    /// Lets the destination flush what was sent since its last flush, and learns what that costs:
    /// so little is left for the flush while the guest is stopped.
    pub(crate) fn flush(
        &mut self,
        round: u64,
        session: &mut Session,
        progress: &Progress,
    ) -> Result<(), ChannelError> {
        if !std::mem::take(&mut self.wrote) {
            return Ok(());
        }
        let time = session.flush(round)?;
        session
            .convergence
            .disks
            .flushed(self.unflushed.max(1), time);
        self.unflushed = 0;
        progress.update(|snapshot| {
            session.tell(snapshot);
            if let Some(disk) = &mut snapshot.disk {
                disk.flush = time;
            }
        });
        Ok(())
    }
}
