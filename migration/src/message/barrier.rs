//! BARRIER: how much has to have been placed before what follows is looked at.

use crate::codec::{DecodeError, Reader};
use crate::frame::MAX_CHANNELS;

/// Writes the body, replacing what is in `out`: how many frames were sent on the first connection,
/// then on each of the others, of which there are 1 to [`MAX_CHANNELS`].
pub fn encode_barrier(sent: &[u64], out: &mut Vec<u8>) {
    out.clear();
    out.extend((sent.len().saturating_sub(1) as u16).to_le_bytes());
    for frames in sent {
        out.extend(frames.to_le_bytes());
    }
}

/// Decodes and checks a body, replacing what is in `sent`.
pub fn decode_barrier(body: &[u8], sent: &mut Vec<u64>) -> Result<(), DecodeError> {
    sent.clear();
    let mut reader = Reader::new(body);
    let channels = reader.count_u16("connections", MAX_CHANNELS)?;
    if channels == 0 {
        return Err(DecodeError::None("connections"));
    }
    for _ in 0..=channels {
        sent.push(reader.u64()?);
    }
    reader.end()
}
