//! What a device saves: bytes, with a version.

use bincode::config::{self, Configuration, Fixint, LittleEndian, NoLimit};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most bytes that a device's saved state may have: 1 MiB. No device here needs a hundredth.
pub const MAX_STATE: usize = 1 << 20;

/// A device whose state outlives its process.
pub trait SaveRestore {
    /// The version of the format that [`save`](Self::save) writes. Every version from 1 up to it
    /// can be restored.
    fn version(&self) -> u32;

    /// The device's own saved structure, in bincode 2's fixed-width little-endian encoding. Called
    /// with the machine stopped.
    fn save(&self) -> Result<Vec<u8>, StateError>;

    /// Takes on what [`save`](Self::save) of that version gave. The body is not trusted; on an
    /// error the device is as it was.
    fn restore(&self, version: u32, body: &[u8]) -> Result<(), StateError>;
}

/// Why a device's state could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A saved structure that can't be encoded: a defect of the device.
    #[error("{device}: the state can't be encoded")]
    Encode {
        /// The device.
        device: String,
        /// What the encoder says.
        #[source]
        source: bincode::error::EncodeError,
    },
    /// Bytes that are no such structure.
    #[error("{device}: the saved state can't be decoded")]
    Decode {
        /// The device.
        device: String,
        /// What the decoder says.
        #[source]
        source: bincode::error::DecodeError,
    },
    /// Bytes behind the end of the structure.
    #[error("{device}: {extra} bytes behind the end of the saved state")]
    LeftOver {
        /// The device.
        device: String,
        /// How many.
        extra: usize,
    },
    /// A field with a value that the device can never have.
    #[error("{device}: saved field '{field}' is {value}, expected {expected}")]
    Field {
        /// The device.
        device: String,
        /// The field of the saved structure.
        field: String,
        /// Its value.
        value: u64,
        /// What the device can have.
        expected: String,
    },
    /// The device took the state but could not act on it.
    #[error("{device}: restoring failed")]
    Restore {
        /// The device.
        device: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

/// How all saved state is encoded: integers little-endian and of fixed width. Decoding wants a limit
/// as well, which bincode takes by its type.
pub const ENCODING: Configuration<LittleEndian, Fixint, NoLimit> = config::legacy();

/// Encodes a device's saved structure.
pub(crate) fn encode<T: Serialize>(device: &str, saved: &T) -> Result<Vec<u8>, StateError> {
    bincode::serde::encode_to_vec(saved, ENCODING).map_err(|source| StateError::Encode {
        device: device.to_owned(),
        source,
    })
}

/// Decodes a device's saved structure; all bytes must belong to it.
pub(crate) fn decode<T: DeserializeOwned>(device: &str, body: &[u8]) -> Result<T, StateError> {
    let limited = ENCODING.with_limit::<MAX_STATE>();
    let (saved, read) =
        bincode::serde::decode_from_slice(body, limited).map_err(|source| StateError::Decode {
            device: device.to_owned(),
            source,
        })?;
    match body.len() - read {
        0 => Ok(saved),
        extra => Err(StateError::LeftOver {
            device: device.to_owned(),
            extra,
        }),
    }
}

impl StateError {
    /// A field with a value that the device can never have.
    pub(crate) fn field(device: &str, field: &str, value: u64, expected: &str) -> Self {
        Self::Field {
            device: device.to_owned(),
            field: field.to_owned(),
            value,
            expected: expected.to_owned(),
        }
    }

    /// That error, unless the value is valid.
    pub(crate) fn unless(
        valid: bool,
        device: &str,
        field: &str,
        value: u64,
        expected: &str,
    ) -> Result<(), Self> {
        if valid {
            Ok(())
        } else {
            Err(Self::field(device, field, value, expected))
        }
    }
}
