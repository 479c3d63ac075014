//! Compression of pages: the methods, and blocks of pages in either direction. Whether it pays is
//! [`decision`]'s to say.
//!
//! Pages are compressed in blocks of up to [`BLOCK_PAGES`]: with one page at a time there is too
//! little to refer back to, and beyond 64 KiB, which is as far as lz4 refers back, little is gained
//! and the data leaves the processor's caches.

pub mod compressors;
pub mod decision;

use std::io;

use lz4_flex::block::CompressTable;

use crate::layout::PAGE_SIZE;

/// The most pages in a block: 64 KiB of them.
pub const BLOCK_PAGES: u64 = 16;

/// The most bytes of pages in a block.
pub const MAX_BLOCK: usize = (BLOCK_PAGES * PAGE_SIZE) as usize;

/// How blocks of pages are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// LZ4's block format: fast, and finds what repeats.
    Lz4,
    /// Zstandard, one frame for each block: slower, and gains more.
    Zstd,
}

impl Method {
    /// Its number on the wire.
    pub fn code(self) -> u8 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    /// The method of a number on the wire.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Lz4, Self::Zstd]
            .into_iter()
            .find(|method| method.code() == code)
    }
}

/// What a user wants: QEMU's `multifd-compression`, with the level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Setting {
    /// Pages go as they are.
    #[default]
    Off,
    /// LZ4.
    Lz4,
    /// Zstandard.
    Zstd(ZstdLevel),
}

impl Setting {
    /// The method, if there is to be one.
    pub fn method(self) -> Option<Method> {
        match self {
            Self::Off => None,
            Self::Lz4 => Some(Method::Lz4),
            Self::Zstd(_) => Some(Method::Zstd),
        }
    }
}

/// Zstandard's level, 1 to 20: the higher, the smaller and the slower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZstdLevel(u8);

/// A level out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the level of zstd must be from 1 to 20, not {0}")]
pub struct LevelError(u64);

impl ZstdLevel {
    /// Checks the range.
    pub fn new(level: u64) -> Result<Self, LevelError> {
        match u8::try_from(level) {
            Ok(level @ 1..=20) => Ok(Self(level)),
            _ => Err(LevelError(level)),
        }
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for ZstdLevel {
    /// 1, as in QEMU.
    fn default() -> Self {
        Self(1)
    }
}

/// Compresses blocks, all with the same setting.
pub struct Compressor {
    setting: Setting,
    engine: Engine,
    scratch: Vec<u8>,
}

enum Engine {
    Lz4(CompressTable),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    /// Prepares what the setting needs; `None` if it is [`Setting::Off`]. Fails without memory.
    pub fn new(setting: Setting) -> io::Result<Option<Self>> {
        let (engine, scratch) = match setting {
            Setting::Off => return Ok(None),
            Setting::Lz4 => (
                Engine::Lz4(CompressTable::large()),
                lz4_flex::block::get_maximum_output_size(MAX_BLOCK),
            ),
            Setting::Zstd(level) => {
                let level = i32::from(level.get());
                (Engine::Zstd(zstd::bulk::Compressor::new(level)?), MAX_BLOCK)
            }
        };
        let scratch = vec![0; scratch];
        Ok(Some(Self {
            setting,
            engine,
            scratch,
        }))
    }

    /// What it was made for.
    pub fn setting(&self) -> Setting {
        self.setting
    }

    /// Appends `block`, of at most [`MAX_BLOCK`] bytes, to `out` and returns how many bytes that
    /// took. If compressed it would not be shorter it is appended as it is, which its length says.
    pub fn compress(&mut self, block: &[u8], out: &mut Vec<u8>) -> usize {
        let len = match &mut self.engine {
            Engine::Lz4(table) => {
                lz4_flex::block::compress_into_with_table(block, &mut self.scratch, table).ok()
            }
            // An error is that of not having enough room.
            Engine::Zstd(zstd) => zstd.compress_to_buffer(block, &mut self.scratch[..]).ok(),
        };
        let compressed = len
            .and_then(|len| self.scratch.get(..len))
            .filter(|compressed| compressed.len() < block.len())
            .unwrap_or(block);
        out.extend(compressed);
        compressed.len()
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Compressor").field(&self.setting).finish()
    }
}

/// A block that cannot be decompressed.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// It is no LZ4 block, or one of more bytes than were announced.
    #[error("a block of {expected} bytes is no LZ4 of that length: {error}")]
    Lz4 {
        /// How many bytes it should have.
        expected: usize,
        /// What is wrong.
        error: lz4_flex::block::DecompressError,
    },
    /// It is no Zstandard frame, or one of more bytes than were announced; or there is no memory.
    #[error("a block of {expected} bytes is no zstd of that length: {error}")]
    Zstd {
        /// How many bytes it should have.
        expected: usize,
        /// What is wrong.
        error: io::Error,
    },
    /// It has fewer bytes than were announced.
    #[error("a block of pages has {found} bytes when decompressed, not {expected}")]
    Length {
        /// How many bytes it has.
        found: usize,
        /// How many bytes it should have.
        expected: usize,
    },
}

/// Decompresses blocks from a peer: into memory of the length that each must have, so that no
/// number of the peer's is allocated or believed.
#[derive(Default)]
pub struct Decompressor {
    /// Made when it is first needed.
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Fills `block` with what `data` holds, which must be just that much. After an error `block`
    /// holds anything.
    pub fn decompress(
        &mut self,
        method: Method,
        data: &[u8],
        block: &mut [u8],
    ) -> Result<(), DecompressError> {
        let expected = block.len();
        if data.len() == expected {
            block.copy_from_slice(data);
            return Ok(());
        }
        let found = match method {
            Method::Lz4 => lz4_flex::block::decompress_into(data, block)
                .map_err(|error| DecompressError::Lz4 { expected, error })?,
            Method::Zstd => self
                .zstd()
                .and_then(|zstd| zstd.decompress_to_buffer(data, block))
                .map_err(|error| DecompressError::Zstd { expected, error })?,
        };
        if found == expected {
            Ok(())
        } else {
            Err(DecompressError::Length { found, expected })
        }
    }

    fn zstd(&mut self) -> io::Result<&mut zstd::bulk::Decompressor<'static>> {
        match &mut self.zstd {
            Some(zstd) => Ok(zstd),
            none => Ok(none.insert(zstd::bulk::Decompressor::new()?)),
        }
    }
}

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "compression_tests.rs"]
mod tests;
