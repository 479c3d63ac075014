//! The parameters of a migration that takes too long.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What becomes of a migration whose time is up before the guest has been stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeoutAction {
    /// It is cancelled.
    #[default]
    Cancel,
    /// The guest is stopped and the rest is sent, however long that takes.
    Force,
    /// The guest moves ahead of its memory.
    Postcopy,
}

/// How long a migration may take until the guest is stopped, and what then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout {
    /// From its start.
    pub after: Duration,
    /// What happens then.
    pub action: TimeoutAction,
}

/// Codes of [`TimeoutAction`].
const CANCEL: u8 = 0;
const FORCE: u8 = 1;
const POSTCOPY: u8 = 2;

/// The timeout that is set. A migration goes by what it is when it begins.
#[derive(Debug, Default)]
pub struct TimeoutParameters {
    ms: AtomicU64,
    action: AtomicU8,
}

impl TimeoutParameters {
    /// The timeout; `None` if there is none.
    pub fn get(&self) -> Option<Timeout> {
        match self.ms() {
            0 => None,
            ms => Some(Timeout {
                after: Duration::from_millis(ms),
                action: self.action(),
            }),
        }
    }

    /// The time in milliseconds; 0 is none.
    pub fn ms(&self) -> u64 {
        self.ms.load(Ordering::Relaxed)
    }

    /// Sets [`ms`](Self::ms).
    pub fn set_ms(&self, ms: u64) {
        self.ms.store(ms, Ordering::Relaxed);
    }

    /// What happens when it is up.
    pub fn action(&self) -> TimeoutAction {
        match self.action.load(Ordering::Relaxed) {
            FORCE => TimeoutAction::Force,
            POSTCOPY => TimeoutAction::Postcopy,
            _ => TimeoutAction::Cancel,
        }
    }

    /// Sets [`action`](Self::action).
    pub fn set_action(&self, action: TimeoutAction) {
        let code = match action {
            TimeoutAction::Cancel => CANCEL,
            TimeoutAction::Force => FORCE,
            TimeoutAction::Postcopy => POSTCOPY,
        };
        self.action.store(code, Ordering::Relaxed);
    }
}
