//! Reading disks ahead of the network, on a thread of its own: while one piece is on its way, the
//! next ones are read, checksummed, and looked at for zeroes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel,
};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::bitmap::BlockBitmap;
use crate::disk::{BLOCK_SIZE, Disk, ExtentKind, SECTOR_SIZE, SourceDisk};
use crate::frame::{MAX_BLOCK_DATA, MAX_BLOCK_RUNS};
use crate::message::{BlockRun, RunKind};
use crate::vm::VmError;

/// How many batches may wait to be sent.
const QUEUE: usize = 4;

/// Why a disk of the source could not be read. The guest runs on.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk says no.
    #[error("cannot read the disk '{name}' at offset {offset}: {error}")]
    Read {
        /// The disk.
        name: String,
        /// Where, in bytes.
        offset: u64,
        /// Why.
        error: VmError,
    },
    /// An extent that can't be.
    #[error("the disk '{name}' tells an extent of {len} bytes at offset {offset}")]
    Extent {
        /// The disk.
        name: String,
        /// Where, in bytes.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// No thread to read on.
    #[error("cannot read the disks on a thread of its own: {0}")]
    Thread(std::io::Error),
    /// The thread is gone.
    #[error("the thread that reads the disks has ended early")]
    Ended,
    /// The guest is stopped, and must not wait longer.
    #[error("reading the last blocks of the disks took too long")]
    Late,
}

/// A disk to read, and what it is called.
#[derive(Clone)]
pub(crate) struct Readable {
    pub(crate) info: Disk,
    pub(crate) disk: Arc<dyn SourceDisk>,
}

/// What to read of each disk.
pub(crate) enum Plan {
    /// All of it, once, in ascending order.
    Whole,
    /// The blocks of these sets, one for each disk.
    Blocks(Vec<BlockBitmap>),
}

/// Parts of one disk, in the order in which they are to be sent.
pub(crate) struct Batch {
    /// The disk's index.
    pub(crate) disk: usize,
    /// The parts, and where in the buffer the data of each begins.
    pub(crate) parts: Vec<(BlockRun, usize)>,
    buffer: Vec<u8>,
    filled: usize,
    /// How long reading took, and how much was read.
    pub(crate) read_time: Duration,
}

impl Batch {
    fn new() -> Self {
        Self {
            disk: 0,
            parts: Vec::new(),
            buffer: vec![0; MAX_BLOCK_DATA],
            filled: 0,
            read_time: Duration::ZERO,
        }
    }

    /// The data of a part.
    pub(crate) fn data(&self, (run, at): (BlockRun, usize)) -> &[u8] {
        let end = at.saturating_add(run.data_len() as usize);
        self.buffer.get(at..end).unwrap_or_default()
    }

    /// How much was read, zeroes included, in bytes.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.filled as u64
    }

    fn clear(&mut self) {
        self.parts.clear();
        self.filled = 0;
        self.read_time = Duration::ZERO;
    }

    /// Adds a part; what continues the last one joins it if that needs no checksum.
    fn add(&mut self, run: BlockRun, at: usize) {
        match self.parts.last_mut() {
            Some((last, _))
                if last.kind == run.kind
                    && last.end() == run.offset
                    && !matches!(run.kind, RunKind::Data(_)) =>
            {
                last.len += run.len;
            }
            _ => self.parts.push((run, at)),
        }
    }
}

enum Message {
    Batch(Batch),
    Done,
    Failed(ReadError),
}

/// What the reading thread has.
pub(crate) enum Next {
    Batch(Batch),
    /// All has been read.
    Done,
    NotYet,
}

/// The reading of disks under way. Dropping it ends the thread, once the read that it is in ends:
/// nobody waits for that.
pub(crate) struct ReadAhead {
    messages: Receiver<Message>,
    empty: Sender<Batch>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ReadAhead {
    pub(crate) fn start(disks: Vec<Readable>, plan: Plan) -> Result<Self, ReadError> {
        let (sender, messages) = sync_channel(QUEUE);
        let (empty, recycled) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let reader = Reader {
            messages: sender,
            recycled,
            stop: Arc::clone(&stop),
            batch: Batch::new(),
        };
        let thread = thread::Builder::new()
            .name("disk-reader".to_owned())
            .spawn(move || reader.run(&disks, &plan))
            .map_err(ReadError::Thread)?;
        Ok(Self {
            messages,
            empty,
            stop,
            thread: Some(thread),
        })
    }

    /// The next batch, waiting for it for so long.
    pub(crate) fn next(&self, wait: Duration) -> Result<Next, ReadError> {
        match self.messages.recv_timeout(wait) {
            Ok(Message::Batch(batch)) => Ok(Next::Batch(batch)),
            Ok(Message::Done) => Ok(Next::Done),
            Ok(Message::Failed(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => Ok(Next::NotYet),
            Err(RecvTimeoutError::Disconnected) => Err(ReadError::Ended),
        }
    }

    /// After [`Next::Done`]: waits until the thread has let go of the disks.
    pub(crate) fn join(&mut self) -> Result<(), ReadError> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(ReadError::Ended),
            _ => Ok(()),
        }
    }

    /// Gives back a batch that was sent, for its memory.
    pub(crate) fn recycle(&self, batch: Batch) {
        let _ = self.empty.send(batch);
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Why the reading ends before all was read.
enum End {
    /// Nobody wants it any more.
    Stopped,
    Failed(ReadError),
}

struct Reader {
    messages: SyncSender<Message>,
    recycled: Receiver<Batch>,
    stop: Arc<AtomicBool>,
    batch: Batch,
}

impl Reader {
    fn run(mut self, disks: &[Readable], plan: &Plan) {
        let last = match self.read_all(disks, plan) {
            Ok(()) => Message::Done,
            Err(End::Failed(error)) => Message::Failed(error),
            Err(End::Stopped) => return,
        };
        let _ = self.messages.send(last);
    }

    fn read_all(&mut self, disks: &[Readable], plan: &Plan) -> Result<(), End> {
        for (index, disk) in disks.iter().enumerate() {
            self.batch.disk = index;
            match plan {
                Plan::Whole => self.whole(disk)?,
                Plan::Blocks(sets) => {
                    if let Some(set) = sets.get(index) {
                        self.blocks(disk, set)?;
                    }
                }
            }
            self.push(index)?;
        }
        Ok(())
    }

    fn whole(&mut self, disk: &Readable) -> Result<(), End> {
        let capacity = disk.info.capacity;
        let mut offset = 0;
        while offset < capacity {
            self.check_stop()?;
            let extent = disk
                .disk
                .extent(offset)
                .map_err(|error| failed(disk, offset, error))?;
            let len = extent.len.min(capacity - offset);
            if len == 0 || !len.is_multiple_of(SECTOR_SIZE) {
                return Err(End::Failed(ReadError::Extent {
                    name: disk.info.name.clone(),
                    offset,
                    len: extent.len,
                }));
            }
            match extent.kind {
                ExtentKind::Data => self.data(disk, offset, len)?,
                ExtentKind::Zero => self.hole(RunKind::Zero, offset, len)?,
                ExtentKind::Absent => self.hole(RunKind::Absent, offset, len)?,
            }
            offset += len;
        }
        Ok(())
    }

    fn blocks(&mut self, disk: &Readable, set: &BlockBitmap) -> Result<(), End> {
        for run in set.runs(0, set.pages(), u64::MAX) {
            let offset = run.first * BLOCK_SIZE;
            let end = (run.end() * BLOCK_SIZE).min(disk.info.capacity);
            self.data(disk, offset, end.saturating_sub(offset))?;
        }
        Ok(())
    }

    fn hole(&mut self, kind: RunKind, offset: u64, len: u64) -> Result<(), End> {
        self.batch.add(BlockRun { kind, offset, len }, 0);
        self.push_if_full()
    }

    fn data(&mut self, disk: &Readable, mut offset: u64, len: u64) -> Result<(), End> {
        let end = offset + len;
        while offset < end {
            self.check_stop()?;
            let batch = &mut self.batch;
            let start = batch.filled;
            let len = (end - offset).min((MAX_BLOCK_DATA - start) as u64) as usize;
            let Some(buffer) = batch.buffer.get_mut(start..start + len) else {
                return Err(End::Failed(ReadError::Ended));
            };
            let began = Instant::now();
            disk.disk
                .read(offset, buffer)
                .map_err(|error| failed(disk, offset, error))?;
            batch.read_time += began.elapsed();
            batch.filled = start + len;
            self.look_at(offset, start)?;
            offset += len as u64;
        }
        Ok(())
    }

    /// Adds what was read last, from `start` in the buffer and `offset` on the disk, by block.
    fn look_at(&mut self, mut offset: u64, start: usize) -> Result<(), End> {
        let mut at = start;
        while at < self.batch.filled {
            let to_boundary = (BLOCK_SIZE - offset % BLOCK_SIZE) as usize;
            let end = self.batch.filled.min(at + to_boundary);
            let data = self.batch.buffer.get(at..end).unwrap_or_default();
            let kind = if is_zero(data) {
                RunKind::Zero
            } else {
                RunKind::Data(crc32fast::hash(data))
            };
            let len = (end - at) as u64;
            self.batch.add(BlockRun { kind, offset, len }, at);
            offset += len;
            at = end;
        }
        self.push_if_full()
    }

    /// A batch is full when less than a block fits in; a read adds no more than 17 parts.
    fn push_if_full(&mut self) -> Result<(), End> {
        let batch = &self.batch;
        if batch.filled + BLOCK_SIZE as usize > MAX_BLOCK_DATA
            || batch.parts.len() + 32 > MAX_BLOCK_RUNS
        {
            self.push(batch.disk)?;
        }
        Ok(())
    }

    fn push(&mut self, disk: usize) -> Result<(), End> {
        if self.batch.parts.is_empty() {
            return Ok(());
        }
        let mut empty = match self.recycled.try_recv() {
            Ok(batch) => batch,
            Err(TryRecvError::Empty) => Batch::new(),
            Err(TryRecvError::Disconnected) => return Err(End::Stopped),
        };
        empty.clear();
        empty.disk = disk;
        let full = std::mem::replace(&mut self.batch, empty);
        self.messages
            .send(Message::Batch(full))
            .map_err(|_| End::Stopped)
    }

    fn check_stop(&self) -> Result<(), End> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(End::Stopped);
        }
        Ok(())
    }
}

fn failed(disk: &Readable, offset: u64, error: VmError) -> End {
    End::Failed(ReadError::Read {
        name: disk.info.name.clone(),
        offset,
        error,
    })
}

fn is_zero(data: &[u8]) -> bool {
    data.chunks(256)
        .all(|chunk| chunk.iter().fold(0, |bits, byte| bits | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [512, 4096, 1536] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for at in 0..len {
                data[at] = 0x10;
                assert!(!is_zero(&data), "byte {at} of {len}");
                data[at] = 0;
            }
        }
    }
}
