//! How urgent the engine's threads are to the host's scheduler, beside the guest's vCPUs.

use std::thread;
use std::time::{Duration, Instant};

/// Of a thread that brings what a vCPU waits for, where it may be raised (`CAP_SYS_NICE`). See
/// setpriority(2).
const URGENT: i32 = -10;

/// How long a thread works that moves memory which nobody waits for, before it lets others have its
/// CPU: a scheduler that looks at the clock only at its ticks would let them wait for several
/// milliseconds.
const TURN: Duration = Duration::from_millis(1);

/// Has the calling thread go first, if the process may do so.
pub(crate) fn urgent() {
    // Without a process it is about the calling thread, on Linux.
    if let Err(error) = rustix::process::setpriority_process(None, URGENT) {
        tracing::debug!(URGENT, "the thread's priority stays as it is: {error}");
    }
}

/// A thread that gives way to the guest.
#[derive(Debug)]
pub(crate) struct Background {
    since: Instant,
}

impl Background {
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
        }
    }

    /// Lets others have this CPU if it is their turn. Costs nothing worth telling if nobody waits.
    pub(crate) fn give_way(&mut self) {
        if self.since.elapsed() >= TURN {
            thread::yield_now();
            self.since = Instant::now();
        }
    }
}
