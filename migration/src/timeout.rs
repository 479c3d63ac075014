//! A migration whose time is up: a thread that waits for that, so that it is noticed also while the
//! engine waits for the link.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Runs something once so much time has gone by, unless it is dropped before.
#[derive(Debug)]
pub(crate) struct Timer {
    dropped: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Timer {
    pub(crate) fn start(
        after: Duration,
        expired: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let dropped = Arc::new((Mutex::new(false), Condvar::new()));
        let shared = Arc::clone(&dropped);
        let until = Instant::now().checked_add(after);
        let thread = thread::Builder::new()
            .name("timeout".to_owned())
            .spawn(move || {
                if is_up(&shared, until) {
                    expired();
                }
            })?;
        Ok(Self {
            dropped,
            thread: Some(thread),
        })
    }
}

/// Waits; false if nobody is interested any more.
fn is_up((dropped, changed): &(Mutex<bool>, Condvar), until: Option<Instant>) -> bool {
    let mut dropped = dropped.lock().unwrap_or_else(PoisonError::into_inner);
    while !*dropped {
        // A time that the clock can't tell is never.
        let left = until.map_or(Duration::MAX, |until| {
            until.saturating_duration_since(Instant::now())
        });
        if left.is_zero() {
            return true;
        }
        let left = left.min(Duration::from_secs(3600));
        let waited = changed.wait_timeout(dropped, left);
        (dropped, _) = waited.unwrap_or_else(PoisonError::into_inner);
    }
    false
}

impl Drop for Timer {
    /// Afterwards it has run, or never will.
    fn drop(&mut self) {
        let (dropped, changed) = &*self.dropped;
        *dropped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn it_runs_once_its_time_is_up_or_never() {
        let (told, is_told) = mpsc::channel();
        let _timer = Timer::start(Duration::ZERO, move || told.send(()).unwrap()).unwrap();
        is_told.recv().unwrap();

        let (told, is_told) = mpsc::channel::<()>();
        let timer = Timer::start(Duration::MAX, move || told.send(()).unwrap()).unwrap();
        drop(timer);
        assert!(is_told.recv().is_err());
    }
}
