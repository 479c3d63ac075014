//! BLOB.

use crate::codec::{DecodeError, Reader};
use crate::frame::MAX_CHUNK;

/// The beginning of a BLOB: the data follows up to the body's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobChunk {
    /// The blob's index in the HELLO.
    pub index: u16,
    /// Where in the blob this piece begins.
    pub offset: u64,
}

impl BlobChunk {
    /// The length of the encoded chunk without its data.
    pub const LEN: usize = 10;

    /// The bytes before the data.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..2].copy_from_slice(&self.index.to_le_bytes());
        bytes[2..].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    /// The chunk and its data.
    pub fn decode(body: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let mut reader = Reader::new(body);
        let chunk = Self {
            index: reader.u16()?,
            offset: reader.u64()?,
        };
        let data = reader.rest();
        DecodeError::within(
            "bytes of a blob's piece",
            data.len() as u64,
            MAX_CHUNK as u64,
        )?;
        Ok((chunk, data))
    }
}
