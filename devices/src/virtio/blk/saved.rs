//! The block device's saved state.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Block, QUEUE_SIZE};
use crate::state::{SaveRestore, StateError, decode, encode};

/// Version 1 of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedBlock {
    /// The disk's size in bytes, which the driver knows.
    pub(super) capacity: u64,
    pub(super) writeback: bool,
    /// The first descriptors of the requests that were taken and not done.
    pub(super) held: Vec<u16>,
}

impl SaveRestore for Block {
    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let saved = SavedBlock {
            capacity: self.engine.disk.image().capacity(),
            writeback: self.engine.writeback.load(Ordering::Relaxed),
            held: self.engine.held(),
        };
        encode(&self.name, &saved)
    }

    fn restore(&self, _version: u32, body: &[u8]) -> Result<(), StateError> {
        let SavedBlock {
            capacity,
            writeback,
            held,
        } = decode(&self.name, body)?;
        let field = |field, value, expected| StateError::field(&self.name, field, value, expected);
        if capacity != self.engine.disk.image().capacity() {
            return Err(field("capacity", capacity, "the size of the disk here"));
        }
        if held.len() > usize::from(QUEUE_SIZE) {
            let len = held.len() as u64;
            return Err(field("held", len, "at most as many as the queue has"));
        }
        let mut seen = [false; QUEUE_SIZE as usize];
        for &head in &held {
            match seen.get_mut(usize::from(head)) {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    return Err(field(
                        "held",
                        head.into(),
                        "descriptors of the queue, once each",
                    ));
                }
            }
        }
        self.engine.writeback.store(writeback, Ordering::Relaxed);
        self.engine.set_held(held);
        Ok(())
    }
}
