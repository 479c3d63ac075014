//! The bodies of the frames: typed, explicit little-endian, every count and length bounded before
//! it is believed. See docs/protocol.md.

mod barrier;
mod bits;
mod blob;
mod disks;
mod encoded;
mod fixed;
mod gone;
mod hello;
mod pages;
mod preamble;
mod reason;
mod section;

pub use self::barrier::{decode_barrier, encode_barrier};
pub(crate) use self::bits::MAX_BIT_PAGES;
pub use self::bits::{decode_bits, encode_bits};
pub use self::blob::BlobChunk;
pub use self::disks::{BlockRun, MAX_DISK, MAX_DISKS, RunKind, decode_blocks, encode_blocks};
pub use self::encoded::{Compressed, Differences};
pub use self::fixed::{
    Accept, End, Flush, Flushed, Go, Missing, Ready, Request, Return, Running, Sync, SyncAck,
};
pub use self::gone::{Gone, GoneCause};
pub use self::hello::{
    BLOCK_MIGRATION, CAPABILITIES, Hello, LZ4, MAX_BLOB, MAX_BLOBS, MAX_CONFIGURATION, MULTIFD,
    POSTCOPY, REQUIRABLE, UNCHECKED, XBZRLE, ZSTD,
};
pub use self::pages::{AddressRun, decode_pages, decode_zero, encode_pages, encode_zero};
pub use self::preamble::{MAGIC, PREAMBLE_LEN, Preamble};
pub use self::reason::{decode_reason, encode_reason};
pub use self::section::{decode_state, encode_state};
pub(crate) use self::section::{put_section, take_section};

/// A migration's identifier, random.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id(pub [u8; 16]);

impl std::fmt::Debug for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests;
