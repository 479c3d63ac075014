//! The console's saved state, and its check.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Console, INPUT, NAME};
use crate::state::{SaveRestore, StateError, decode, encode};

/// Version 1 of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedConsole {
    /// What the guest has not got yet.
    pub(super) input: Vec<u8>,
    /// How many bytes of the first request in the transmit queue are with the host.
    pub(super) transmitted: u64,
}

impl SaveRestore for Console {
    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let saved = SavedConsole {
            input: self.shared.input().iter().copied().collect(),
            transmitted: self.shared.transmitted.load(Ordering::SeqCst),
        };
        encode(NAME, &saved)
    }

    fn restore(&self, _version: u32, body: &[u8]) -> Result<(), StateError> {
        let SavedConsole { input, transmitted } = decode(NAME, body)?;
        let field =
            |name, value, valid, expected| StateError::unless(valid, NAME, name, value, expected);
        let len = input.len();
        field("input", len as u64, len <= INPUT, "at most 4096 bytes")?;
        // Longer than that no request is (section 2.7.4.2).
        field(
            "transmitted",
            transmitted,
            transmitted <= 1 << 32,
            "at most the length of a request, 2^32 bytes",
        )?;
        *self.shared.input() = input.into();
        self.shared.transmitted.store(transmitted, Ordering::SeqCst);
        Ok(())
    }
}
