//! A disk: an image, and a log of what is written to it, by which a migration finds the blocks
//! that it must send again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::image::Image;

/// The size of the blocks that the log counts in, in bytes.
pub const LOG_BLOCK: u64 = 64 << 10;

/// A guest's disk.
#[derive(Debug)]
pub struct Disk {
    id: String,
    image: Image,
    log: RwLock<Option<Arc<WriteLog>>>,
    waits_for_space: AtomicBool,
}

impl Disk {
    /// The disk `id` on that image.
    pub fn new(id: String, image: Image) -> Self {
        Self {
            id,
            image,
            log: RwLock::new(None),
            waits_for_space: AtomicBool::new(false),
        }
    }

    /// Its name in commands, events and messages.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The image. Who writes to it says so with [`written`](Self::written).
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Whether a request waits for space on the host.
    pub fn waits_for_space(&self) -> bool {
        self.waits_for_space.load(Ordering::Relaxed)
    }

    pub(crate) fn set_waits_for_space(&self, waits: bool) {
        self.waits_for_space.store(waits, Ordering::Relaxed);
    }

    /// Begins to log writes, with nothing written yet.
    pub fn start_log(&self) -> Arc<WriteLog> {
        let log = Arc::new(WriteLog::new(self.image.capacity()));
        *self.log.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&log));
        log
    }

    /// Ends the logging.
    pub fn stop_log(&self) {
        *self.log.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// `len` bytes from `offset` on have been written, or may have been. To be called after the
    /// image was written and before the guest is told: a copy that reads a block in between
    /// finds it logged afterwards, and reads it again.
    pub fn written(&self, offset: u64, len: u64) {
        let log = self.log.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(log) = &*log {
            log.mark(offset, len);
        }
    }
}

/// Which blocks of [`LOG_BLOCK`] bytes have been written.
#[derive(Debug)]
pub struct WriteLog {
    words: Vec<AtomicU64>,
    blocks: u64,
}

impl WriteLog {
    fn new(capacity: u64) -> Self {
        let blocks = capacity.div_ceil(LOG_BLOCK);
        Self {
            words: (0..blocks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            blocks,
        }
    }

    /// The number of blocks on the disk; the last may be short.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    fn mark(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = (offset.saturating_add(len - 1) / LOG_BLOCK).min(self.blocks.saturating_sub(1));
        for block in offset / LOG_BLOCK..=last {
            if let Some(word) = self.words.get((block / 64) as usize) {
                word.fetch_or(1 << (block % 64), Ordering::SeqCst);
            }
        }
    }

    /// Calls `found` for every block that was written since the last time, and forgets them. A
    /// block must not be read before this: one that is written while it is read is found the
    /// next time.
    pub fn harvest(&self, mut found: impl FnMut(u64)) {
        for (index, word) in (0..).zip(&self.words) {
            let mut bits = word.swap(0, Ordering::SeqCst);
            while bits != 0 {
                found(index * 64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn harvest(log: &WriteLog) -> Vec<u64> {
        let mut found = Vec::new();
        log.harvest(|block| found.push(block));
        found
    }

    #[test]
    fn every_block_that_a_write_touches_is_found_once() {
        let log = WriteLog::new(100 * LOG_BLOCK + 512);
        assert_eq!(log.blocks(), 101);
        log.mark(0, 1);
        log.mark(LOG_BLOCK - 1, 2);
        log.mark(63 * LOG_BLOCK, 2 * LOG_BLOCK);
        log.mark(100 * LOG_BLOCK, 512);
        log.mark(70 * LOG_BLOCK, 0);
        assert_eq!(harvest(&log), [0, 1, 63, 64, 100]);
        assert_eq!(harvest(&log), [0u64; 0]);
        log.mark(99 * LOG_BLOCK, u64::MAX);
        assert_eq!(harvest(&log), [99, 100]);
    }
}
