//! Ending a migration from another thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::event::{EventfdFlags, eventfd};

const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
const COMMITTED: u8 = 2;

/// Cancels a migration, at any moment before the hand-over; clones act on the same migration.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: AtomicU8,
    reason: OnceLock<String>,
    event: OwnedFd,
}

/// The guest has been handed over, or is about to be: it is too late to cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too late to cancel: the guest is being handed over to the destination")]
pub struct TooLate;

impl Cancel {
    /// One for a new migration.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            state: AtomicU8::new(OPEN),
            reason: OnceLock::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })))
    }

    /// Cancels, for a reason that is told to the peer. A second call changes nothing.
    pub fn cancel(&self, reason: &str) -> Result<(), TooLate> {
        let first = self.0.reason.set(reason.to_owned()).is_ok();
        match self
            .0
            .state
            .compare_exchange(OPEN, CANCELLED, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => {
                // Writing to an eventfd fails only when its count would overflow.
                let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
                tracing::debug!(first, reason, "migration cancelled");
                Ok(())
            }
            Err(CANCELLED) => Ok(()),
            Err(_) => Err(TooLate),
        }
    }

    /// The reason, once cancelled.
    pub fn cancelled(&self) -> Option<&str> {
        (self.0.state.load(Ordering::Acquire) == CANCELLED)
            .then(|| self.0.reason.get().map_or("cancelled", String::as_str))
    }

    /// Ends the time in which cancelling is possible; false if it has been cancelled.
    pub(crate) fn commit(&self) -> bool {
        self.0
            .state
            .compare_exchange(OPEN, COMMITTED, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

impl AsFd for Cancel {
    /// Readable once cancelled.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_cancelled_or_committed() {
        let cancel = Cancel::new().unwrap();
        assert_eq!(cancel.cancelled(), None);
        cancel.clone().cancel("by the user").unwrap();
        cancel.cancel("again").unwrap();
        assert_eq!(cancel.cancelled(), Some("by the user"));
        assert!(!cancel.commit());

        let committed = Cancel::new().unwrap();
        assert!(committed.commit());
        assert_eq!(committed.cancel("late"), Err(TooLate));
        assert_eq!(committed.cancelled(), None);
    }
}
