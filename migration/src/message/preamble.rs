//! What a connection begins with, before any frame; it is the same in all versions.

use crate::protocol::{NEWEST_VERSION, OLDEST_VERSION};

/// What a migration begins with, so that a stranger is told from a source. Fixed for all versions.
pub const MAGIC: [u8; 8] = *b"\x89FERRY\r\n";

/// The length of the [`Preamble`] in bytes.
pub const PREAMBLE_LEN: usize = 16;

/// The first bytes on a connection: the versions of the protocol that the source speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The oldest version.
    pub oldest: u16,
    /// The newest version.
    pub newest: u16,
}

impl Preamble {
    /// What this build says.
    pub const OURS: Self = Self {
        oldest: OLDEST_VERSION,
        newest: NEWEST_VERSION,
    };

    /// As it goes on the wire.
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let mut bytes = [0; PREAMBLE_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.oldest.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.newest.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..12]);
        bytes[12..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` if this is not the beginning of a migration.
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Option<Self> {
        let crc = crc32fast::hash(&bytes[..12]).to_le_bytes();
        let preamble = Self {
            oldest: u16::from_le_bytes([bytes[8], bytes[9]]),
            newest: u16::from_le_bytes([bytes[10], bytes[11]]),
        };
        (bytes[..8] == MAGIC && bytes[12..] == crc && preamble.oldest <= preamble.newest)
            .then_some(preamble)
    }
}
