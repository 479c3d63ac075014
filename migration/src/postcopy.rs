//! How users steer a migration in post-copy, and where the engine waits for them.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::cancel::Cancel;
use crate::progress::{Progress, Status};

/// Steers a migration that may go over into post-copy; clones act on the same one. `T` is what
/// replaces a broken connection: an address at the source, a listener at the destination.
#[derive(Debug)]
pub struct Control<T>(Arc<Inner<T>>);

impl<T> Clone for Control<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct Inner<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    /// Its status changes with the state, under the same lock: whoever reads it finds possible what
    /// it says. The observer is told later, by the engine, as it may hold whoever steers back.
    progress: Arc<Progress>,
}

#[derive(Debug)]
struct State<T> {
    /// The switch was asked for.
    started: bool,
    connection: Connection<T>,
}

#[derive(Debug)]
enum Connection<T> {
    /// Not in post-copy yet, or no longer.
    None,
    /// In use; cancelling breaks it.
    Active(Cancel),
    /// Broken: waits for another.
    Paused,
    /// Another is there, which the engine has not taken yet.
    Replaced(T, Cancel),
    /// Nobody waits any more, for that reason.
    Ended(String),
}

/// The migration is not in post-copy with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("migrate_pause is possible only while post-copy is active")]
pub struct NotActive;

/// Why a migration can't go on over another connection.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// It is not in post-copy, or its connection is not broken.
    #[error("there is no post-copy migration that is paused")]
    NotPaused,
    /// There is no descriptor with which the connection could be broken again.
    #[error("no descriptor for another connection: {0}")]
    Resources(io::Error),
}

impl<T> Control<T> {
    /// Of the migration with that progress, which has not begun.
    pub fn new(progress: Arc<Progress>) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(State {
                started: false,
                connection: Connection::None,
            }),
            changed: Condvar::new(),
            progress,
        }))
    }

    /// At the source: has the guest handed over as soon as possible, whatever of its memory is
    /// left to be sent.
    pub fn start(&self) {
        self.state().started = true;
    }

    /// Whether that was asked for.
    pub(crate) fn is_started(&self) -> bool {
        self.state().started
    }

    /// Breaks the connection; both sides are paused then, and can be recovered.
    pub fn pause(&self) -> Result<(), NotActive> {
        match &self.state().connection {
            Connection::Active(breaker) | Connection::Replaced(_, breaker) => {
                let _ = breaker.cancel("paused by the user");
                Ok(())
            }
            _ => Err(NotActive),
        }
    }

    /// Goes on over another connection.
    pub fn recover(&self, with: T) -> Result<(), RecoverError> {
        let mut state = self.state();
        if !matches!(state.connection, Connection::Paused) {
            return Err(RecoverError::NotPaused);
        }
        let breaker = Cancel::new().map_err(RecoverError::Resources)?;
        state.connection = Connection::Replaced(with, breaker);
        self.0.progress.change_status(Status::PostcopyRecover);
        self.0.changed.notify_all();
        Ok(())
    }

    /// Whether the connection is broken, and nothing replaces it yet.
    pub fn is_paused(&self) -> bool {
        matches!(self.state().connection, Connection::Paused)
    }

    /// The guest, or this process, ends: nobody waits any more, and the peer is told why if it
    /// can be. The first reason counts.
    pub fn end(&self, reason: &str) {
        let mut state = self.state();
        let before = match &state.connection {
            Connection::Ended(_) => return,
            _ => std::mem::replace(&mut state.connection, Connection::Ended(reason.to_owned())),
        };
        if let Connection::Active(breaker) = before {
            let _ = breaker.cancel(reason);
        }
        self.0.changed.notify_all();
    }

    /// Why it was [ended](Self::end).
    pub(crate) fn ended(&self) -> Option<String> {
        match &self.state().connection {
            Connection::Ended(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    /// A connection is in use, which `breaker` breaks.
    pub(crate) fn activate(&self, breaker: Cancel) {
        let mut state = self.state();
        match &state.connection {
            Connection::Ended(reason) => {
                let _ = breaker.cancel(reason);
            }
            _ => state.connection = Connection::Active(breaker),
        }
        self.0.progress.change_status(Status::PostcopyActive);
        drop(state);
        self.0.progress.tell_status();
    }

    /// Post-copy is over: there is nothing to break or to wait for.
    pub(crate) fn finish(&self) {
        let mut state = self.state();
        if !matches!(state.connection, Connection::Ended(_)) {
            state.connection = Connection::None;
        }
    }

    /// The connection is broken: it can be replaced from here on.
    pub(crate) fn paused(&self) {
        let mut state = self.state();
        if !matches!(state.connection, Connection::Ended(_)) {
            state.connection = Connection::Paused;
            self.0.progress.change_status(Status::PostcopyPaused);
        }
        drop(state);
        self.0.progress.tell_status();
    }

    /// Waits for what replaces it, and what breaks that; `None` once nobody waits any more.
    pub(crate) fn wait(&self) -> Option<(T, Cancel)> {
        let mut state = self.state();
        let (with, breaker) = loop {
            match std::mem::replace(&mut state.connection, Connection::None) {
                Connection::Replaced(with, breaker) => break (with, breaker),
                other @ Connection::Ended(_) => {
                    state.connection = other;
                    return None;
                }
                other => state.connection = other,
            }
            let waiting = self.0.changed.wait(state);
            state = waiting.unwrap_or_else(PoisonError::into_inner);
        };
        state.connection = Connection::Active(breaker.clone());
        drop(state);
        self.0.progress.tell_status();
        Some((with, breaker))
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::MonotonicClock;

    fn progress() -> Arc<Progress> {
        Arc::new(Progress::new(Arc::new(MonotonicClock), None))
    }

    #[test]
    fn a_broken_connection_is_replaced_once_and_by_whoever_comes_first() {
        let progress = progress();
        let control = Control::new(Arc::clone(&progress));
        assert_eq!(control.pause(), Err(NotActive));
        assert!(matches!(control.recover(1), Err(RecoverError::NotPaused)));
        let breaker = Cancel::new().unwrap();
        control.activate(breaker.clone());
        assert_eq!(progress.status(), Status::PostcopyActive);
        assert!(matches!(control.recover(1), Err(RecoverError::NotPaused)));
        control.pause().unwrap();
        assert_eq!(breaker.cancelled(), Some("paused by the user"));
        control.paused();
        assert_eq!(progress.status(), Status::PostcopyPaused);
        assert_eq!(control.pause(), Err(NotActive));
        control.recover(2).unwrap();
        assert_eq!(progress.status(), Status::PostcopyRecover);
        assert!(matches!(control.recover(3), Err(RecoverError::NotPaused)));
        assert_eq!(control.wait().unwrap().0, 2);
    }

    #[test]
    fn what_replaces_it_can_be_given_up_before_the_engine_has_taken_it() {
        let control = Control::new(progress());
        control.paused();
        control.recover(1).unwrap();
        control.pause().unwrap();
        let (with, breaker) = control.wait().unwrap();
        assert_eq!((with, breaker.cancelled()), (1, Some("paused by the user")));
    }

    #[test]
    fn whoever_waits_is_told_of_the_end() {
        let control = Control::<u8>::new(progress());
        control.paused();
        let waiting = std::thread::spawn({
            let control = control.clone();
            move || control.wait()
        });
        control.end("the process ends");
        control.end("later");
        assert!(waiting.join().unwrap().is_none());
        assert_eq!(control.ended().as_deref(), Some("the process ends"));
        let breaker = Cancel::new().unwrap();
        control.activate(breaker.clone());
        assert_eq!(breaker.cancelled(), Some("the process ends"));
    }
}
