//! The balloon's saved state, and its check.

use serde::{Deserialize, Serialize};

use super::hints::{self, DONE, FIRST};
use super::space::Space;
use super::{Balloon, NAME, lock};
use crate::state::{SaveRestore, StateError, decode, encode};

/// Version 1 of the saved state. What the guest told of its memory is not in it: the buffer with
/// the figures is in the queue again, and is read by whoever runs the guest next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedBalloon {
    pub(super) target_pages: u32,
    pub(super) actual_pages: u32,
    pub(super) poison: u32,
    /// What the guest was told last about hints. A request ends with the migration that made it.
    pub(super) hint_command: u32,
    /// The number of the last request for hints.
    pub(super) last_hint_request: u32,
}

impl SaveRestore for Balloon {
    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let last_hint_request = lock(&self.shared.hints).last();
        let Space {
            target,
            actual,
            hint_command,
            poison,
        } = *self.shared.space();
        let saved = SavedBalloon {
            target_pages: target,
            actual_pages: actual,
            poison,
            hint_command: hint_command.min(DONE),
            last_hint_request,
        };
        encode(NAME, &saved)
    }

    fn restore(&self, _version: u32, body: &[u8]) -> Result<(), StateError> {
        let SavedBalloon {
            target_pages,
            actual_pages,
            poison,
            hint_command,
            last_hint_request,
        } = decode(NAME, body)?;
        let field = |name, value: u32, valid, expected| {
            StateError::unless(valid, NAME, name, value.into(), expected)
        };
        for (name, pages) in [
            ("target_pages", target_pages),
            ("actual_pages", actual_pages),
        ] {
            let fits = u64::from(pages) <= self.shared.ram_pages;
            field(name, pages, fits, "at most the pages of the RAM")?;
        }
        field(
            "hint_command",
            hint_command,
            matches!(hint_command, hints::STOP | DONE),
            "0 or 1: no request under way",
        )?;
        field(
            "last_hint_request",
            last_hint_request,
            last_hint_request >= FIRST,
            "a request's number, from 0x80000000 on",
        )?;
        *self.shared.space() = Space {
            target: target_pages,
            actual: actual_pages,
            hint_command,
            poison,
        };
        lock(&self.shared.hints).restore(last_hint_request);
        Ok(())
    }
}
