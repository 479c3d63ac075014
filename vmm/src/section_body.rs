//! The bodies of this crate's state sections, in the same encoding as those of the devices.

use devices::state::ENCODING;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a section's body can't be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It doesn't have the form that it should.
    #[error("malformed: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    /// It goes on after its end.
    #[error("{0} bytes are left over after the end")]
    LeftOver(usize),
    /// It can't be encoded.
    #[error("cannot be encoded: {0}")]
    Encode(#[from] bincode::error::EncodeError),
}

/// Encodes a body.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, BodyError> {
    Ok(bincode::serde::encode_to_vec(value, ENCODING)?)
}

/// Decodes a body that takes at most `MAX` bytes, all of `bytes`.
pub(crate) fn decode<const MAX: usize, T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BodyError> {
    let limited = ENCODING.with_limit::<MAX>();
    let (value, used) = bincode::serde::decode_from_slice(bytes, limited)?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(BodyError::LeftOver(left)),
    }
}
