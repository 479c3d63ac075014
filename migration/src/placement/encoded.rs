//! Pages that arrive compressed or as differences: made whole in scratch memory, and placed only
//! if they are what the source meant.

use super::Placement;
use crate::bitmap::PageRun;
use crate::compression::{BLOCK_PAGES, DecompressError, Decompressor, MAX_BLOCK, Method};
use crate::layout::PAGE_SIZE;
use crate::message::{Compressed, Differences, LZ4, ZSTD};
use crate::xbzrle::Page;
use crate::xbzrle::delta::{self, DeltaError};

/// Pages that cannot be made whole.
#[derive(Debug, thiserror::Error)]
pub enum EncodedError {
    /// A block of them.
    #[error(transparent)]
    Block(#[from] DecompressError),
    /// The difference of one.
    #[error("the page at {address:#x}: {error}")]
    Difference {
        /// Its guest physical address.
        address: u64,
        /// What is wrong.
        error: DeltaError,
    },
    /// A difference to nothing.
    #[error("a difference to the page at {0:#x} came, but never the page")]
    NeverCame(u64),
    /// Not what was agreed on.
    #[error("pages came compressed with {0:?}, which was not offered")]
    NotPicked(Method),
}

/// Makes the pages of one connection whole. Its memory is used from frame to frame.
pub(crate) struct Unpacker {
    picked: u32,
    decompressor: Decompressor,
    block: Vec<u8>,
    page: Box<Page>,
}

impl Unpacker {
    /// For a source that was told that these capabilities are picked.
    pub(crate) fn new(picked: u32) -> Self {
        Self {
            picked,
            decompressor: Decompressor::default(),
            block: Vec::new(),
            page: Box::new([0; PAGE_SIZE as usize]),
        }
    }

    /// Places the pages of a COMPRESSED frame, `runs`, whose payload is `data`. Those that don't match
    /// their checksums stay as they were and are added to `wrong`. A block that can't be
    /// decompressed is an error, as what comes after it is no better.
    pub(crate) fn compressed(
        &mut self,
        frame: &Compressed,
        runs: &[PageRun],
        mut data: &[u8],
        placement: &Placement,
        wrong: &mut Vec<u64>,
    ) -> Result<(), EncodedError> {
        let Some(method) = frame.method else {
            return Ok(());
        };
        let capability = match method {
            Method::Lz4 => LZ4,
            Method::Zstd => ZSTD,
        };
        if self.picked & capability == 0 {
            return Err(EncodedError::NotPicked(method));
        }
        placement.populate(runs);
        self.block.resize(MAX_BLOCK, 0);
        let mut pages = runs.iter().flat_map(|run| run.first..run.end());
        let mut left: u64 = runs.iter().map(|run| run.count).sum();
        let mut crcs = frame.crcs.iter();
        for len in &frame.blocks {
            let (now, later) = data.split_at_checked(*len as usize).unwrap_or((data, &[]));
            data = later;
            let count = left.min(BLOCK_PAGES);
            left -= count;
            let len = (count * PAGE_SIZE) as usize;
            let block = self.block.get_mut(..len).unwrap_or_default();
            self.decompressor.decompress(method, now, block)?;
            for (copy, page) in block.as_chunks().0.iter().zip(pages.by_ref()) {
                placement.place(page, copy, crcs.next(), wrong);
            }
        }
        placement.arrived(runs, wrong);
        Ok(())
    }

    /// The same for an XBZRLE frame. See [`crate::xbzrle`] for why this side has what the
    /// differences are to.
    pub(crate) fn differences(
        &mut self,
        frame: &Differences,
        runs: &[PageRun],
        mut data: &[u8],
        placement: &Placement,
        wrong: &mut Vec<u64>,
    ) -> Result<(), EncodedError> {
        if let Some(page) = placement.never_came(runs) {
            return Err(EncodedError::NeverCame(placement.address(page)));
        }
        let pages = runs.iter().flat_map(|run| run.first..run.end());
        let mut crcs = frame.crcs.iter();
        for (page, len) in pages.zip(&frame.lengths) {
            let len = usize::from(*len);
            let (now, later) = data.split_at_checked(len).unwrap_or((data, &[]));
            data = later;
            placement.memory.read(page, &mut self.page);
            delta::apply(now, &mut self.page).map_err(|error| EncodedError::Difference {
                address: placement.address(page),
                error,
            })?;
            placement.place(page, &self.page, crcs.next(), wrong);
        }
        placement.arrived(runs, wrong);
        Ok(())
    }
}

impl Placement {
    /// Places a page if it is what the source says; otherwise it stays as it was, and is wrong. If
    /// pages come without checksums the source says nothing.
    fn place(&self, page: u64, copy: &Page, crc: Option<&u32>, wrong: &mut Vec<u64>) {
        if crc.is_none_or(|crc| crc32fast::hash(copy) == *crc) {
            self.memory.write(page, copy);
        } else {
            wrong.push(page);
        }
    }
}
