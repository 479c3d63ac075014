//! Memory that is there before the guest that is waited for.

use std::sync::{Mutex, PoisonError};

use migration::layout::{GuestRam, Layout};

use crate::memory::{self, Backing, MemoryError};

/// At most one guest's memory.
#[derive(Default)]
pub(super) struct ReadyMemory(Mutex<Option<GuestRam>>);

impl ReadyMemory {
    /// Preallocates memory of `bytes`, if that is known and `backing` says so: a source must not
    /// have to wait for it.
    pub(super) fn prepare(&self, bytes: Option<u64>, backing: &Backing) -> Result<(), MemoryError> {
        let Some(bytes) = bytes.filter(|_| backing.prealloc) else {
            return Ok(());
        };
        let ram = memory::map(&memory::layout(bytes)?, backing)?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(ram);
        Ok(())
    }

    /// Memory of `bytes`: what is ready, or else new one.
    pub(super) fn take(&self, bytes: u64, backing: &Backing) -> Result<GuestRam, MemoryError> {
        let layout = memory::layout(bytes)?;
        let ready = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Of another size it makes room.
        match ready.filter(|ram| Layout::of(ram).as_ref() == Ok(&layout)) {
            Some(ram) => Ok(ram),
            None => memory::map(&layout, backing),
        }
    }
}
