//! Pages that arrive compressed or as differences: made whole in scratch memory, and placed only
//! if they are what the source meant.

use super::Placement;
use crate::channel::{Arrived, Channel};
use crate::compression::{BLOCK_PAGES, DecompressError, Decompressor, MAX_BLOCK, Method};
use crate::destination::DestinationError;
use crate::frame::Kind;
use crate::layout::PAGE_SIZE;
use crate::message::{Compressed, Differences, LZ4, XBZRLE, ZSTD};
use crate::protocol::OutOfOrder;
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

/// Takes COMPRESSED and XBZRLE frames in. Its memory is used from frame to frame.
pub(crate) struct Unpacker {
    picked: u32,
    compressed: Compressed,
    differences: Differences,
    decompressor: Decompressor,
    /// A frame's payload, which its kind's limit bounds.
    data: Vec<u8>,
    block: Vec<u8>,
    page: Box<Page>,
}

impl Unpacker {
    /// For a source that was told that these capabilities are picked.
    pub(crate) fn new(picked: u32) -> Self {
        Self {
            picked,
            compressed: Compressed::default(),
            differences: Differences::default(),
            decompressor: Decompressor::default(),
            data: Vec::new(),
            block: vec![0; MAX_BLOCK],
            page: Box::new([0; PAGE_SIZE as usize]),
        }
    }

    /// Receives the data of such a frame, whose body has arrived, into memory.
    pub(crate) fn receive(
        &mut self,
        arrived: Arrived,
        channel: &mut Channel,
        placement: &mut Placement,
    ) -> Result<(), DestinationError> {
        let Arrived { kind, payload_len } = arrived;
        match kind {
            Kind::Compressed => {
                channel.decode(kind, |body| self.compressed.decode(body, payload_len))?;
                placement.resolve(&self.compressed.runs)?;
                channel.receive_data(payload_len as usize, &mut self.data)?;
                Ok(self.place_compressed(placement)?)
            }
            Kind::Xbzrle if self.picked & XBZRLE != 0 => {
                channel.decode(kind, |body| self.differences.decode(body, payload_len))?;
                placement.resolve(&self.differences.runs)?;
                channel.receive_data(payload_len as usize, &mut self.data)?;
                Ok(self.place_differences(placement)?)
            }
            kind => {
                let phase = channel.phase();
                Err(crate::channel::ChannelError::from(OutOfOrder { kind, phase }).into())
            }
        }
    }

    /// A block that can't be decompressed is an error, as what comes after it is no better.
    fn place_compressed(&mut self, placement: &mut Placement) -> Result<(), EncodedError> {
        let frame = &self.compressed;
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
        placement.populate();
        let runs = std::mem::take(&mut placement.runs);
        let mut pages = runs.iter().flat_map(|run| run.first..run.end());
        let mut data = self.data.as_slice();
        for (crcs, len) in frame.crcs.chunks(BLOCK_PAGES as usize).zip(&frame.blocks) {
            let (now, later) = data.split_at_checked(*len as usize).unwrap_or((data, &[]));
            data = later;
            let len = crcs.len() * PAGE_SIZE as usize;
            let block = self.block.get_mut(..len).unwrap_or_default();
            self.decompressor.decompress(method, now, block)?;
            let copies = block.as_chunks().0.iter();
            for ((copy, crc), page) in copies.zip(crcs).zip(pages.by_ref()) {
                placement.place(page, copy, *crc);
            }
        }
        placement.runs = runs;
        Ok(())
    }

    /// See [`crate::xbzrle`] for why this side has what the differences are to.
    fn place_differences(&mut self, placement: &mut Placement) -> Result<(), EncodedError> {
        let frame = &self.differences;
        let runs = std::mem::take(&mut placement.runs);
        let pages = runs.iter().flat_map(|run| run.first..run.end());
        let mut data = self.data.as_slice();
        for ((page, crc), len) in pages.zip(&frame.crcs).zip(&frame.lengths) {
            let len = usize::from(*len);
            let (now, later) = data.split_at_checked(len).unwrap_or((data, &[]));
            data = later;
            let address = || placement.address(page);
            if placement.missing.test(page) {
                return Err(EncodedError::NeverCame(address()));
            }
            placement.memory.read(page, &mut self.page);
            delta::apply(now, &mut self.page).map_err(|error| EncodedError::Difference {
                address: address(),
                error,
            })?;
            placement.place(page, &self.page, *crc);
        }
        placement.runs = runs;
        Ok(())
    }
}

impl Placement {
    /// Places a page if it is what the source says; otherwise it stays as it was, and is suspect.
    fn place(&mut self, page: u64, copy: &Page, crc: u32) {
        self.counts.pages += 1;
        self.missing.clear(page);
        if crc32fast::hash(copy) == crc {
            self.memory.write(page, copy);
            self.written.set(page);
            self.suspect.clear(page);
        } else {
            self.suspect.set(page);
        }
    }
}
