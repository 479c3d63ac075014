//! How users steer a migration in post-copy, and where the engine waits for them.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::cancel::Cancel;
use crate::listener::Listener;
use crate::message::{Gone, GoneCause};
use crate::progress::{Progress, Status};
use crate::uri::Uri;

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
    /// At the destination: all has arrived. From here on the connection only serves to tell the
    /// source so, and what becomes of it changes no status.
    complete: bool,
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
    /// At the destination: the source has not come to the listener; cancelling closes that.
    Listening(Cancel),
    /// Nobody waits any more, for that reason.
    Ended(Gone),
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
                complete: false,
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
        let state = self.state();
        match &state.connection {
            Connection::Active(breaker) if !state.complete => {
                let _ = breaker.cancel("paused by the user");
                Ok(())
            }
            // At the source it is in recovery as soon as it has an address.
            Connection::Replaced(_, breaker)
                if self.0.progress.status() == Status::PostcopyRecover =>
            {
                let _ = breaker.cancel("paused by the user");
                Ok(())
            }
            _ => Err(NotActive),
        }
    }

    /// Whether the connection is broken, and nothing replaces it yet.
    pub fn is_paused(&self) -> bool {
        matches!(self.state().connection, Connection::Paused)
    }

    /// This process ends, or has no more need of the migration: nobody waits any more, and the peer
    /// is told why if it can be. What is not at the destination then is lost. The first reason
    /// counts.
    pub fn end(&self, reason: &str) {
        self.end_by(GoneCause::Lost, reason);
    }

    fn end_by(&self, cause: GoneCause, reason: &str) {
        let mut state = self.state();
        if matches!(state.connection, Connection::Ended(_)) {
            return;
        }
        let reason = reason.to_owned();
        let ended = Connection::Ended(Gone { cause, reason });
        let before = std::mem::replace(&mut state.connection, ended);
        if let (
            Connection::Active(breaker) | Connection::Listening(breaker),
            Connection::Ended(gone),
        ) = (before, &state.connection)
        {
            let _ = breaker.cancel(&gone.reason);
        }
        self.0.changed.notify_all();
    }

    /// Why it was [ended](Self::end).
    pub(crate) fn ended(&self) -> Option<Gone> {
        match &self.state().connection {
            Connection::Ended(gone) => Some(gone.clone()),
            _ => None,
        }
    }

    /// A connection is in use, which `breaker` breaks.
    pub(crate) fn activate(&self, breaker: Cancel) {
        let mut state = self.state();
        match &state.connection {
            Connection::Ended(gone) => {
                let _ = breaker.cancel(&gone.reason);
            }
            _ => state.connection = Connection::Active(breaker),
        }
        self.change_status(&state, Status::PostcopyActive);
        drop(state);
        self.0.progress.tell_status();
    }

    /// Post-copy is over: there is nothing to break or to wait for.
    pub(crate) fn finish(&self) {
        let mut state = self.state();
        if !matches!(state.connection, Connection::Ended(_)) {
            state.connection = Connection::None;
        }
        self.0.progress.update(|snapshot| snapshot.error = None);
    }

    /// The connection is broken, for a reason to be shown: it can be replaced from here on.
    pub(crate) fn paused(&self, error: String) {
        let mut state = self.state();
        match state.connection {
            Connection::Ended(_) => {}
            // That it was broken off for another is no reason to be shown in place of an older one.
            Connection::Replaced(..) => self.0.progress.update(|snapshot| {
                snapshot.error.get_or_insert(error);
            }),
            _ => {
                state.connection = Connection::Paused;
                self.broken(&state, error);
            }
        }
        drop(state);
        self.0.progress.tell_status();
    }

    /// There is no connection.
    fn broken(&self, state: &State<T>, error: String) {
        self.0
            .progress
            .update(|snapshot| snapshot.error = Some(error));
        self.change_status(state, Status::PostcopyPaused);
    }

    fn change_status(&self, state: &State<T>, status: Status) {
        if !state.complete {
            self.0.progress.change_status(status);
        }
    }

    /// Gives it `with`; `status` is what that makes of it.
    fn replace(
        &self,
        mut state: MutexGuard<'_, State<T>>,
        with: T,
        status: Status,
    ) -> Result<(), RecoverError> {
        let breaker = Cancel::new().map_err(RecoverError::Resources)?;
        let replaced = Connection::Replaced(with, breaker);
        let before = std::mem::replace(&mut state.connection, replaced);
        if let Connection::Active(breaker) | Connection::Listening(breaker) = before {
            let _ = breaker.cancel("another address was given");
        }
        self.change_status(&state, status);
        self.0.changed.notify_all();
        Ok(())
    }

    /// Waits for what replaces it, and what breaks that; `None` once nobody waits any more.
    fn take(&self, becomes: impl FnOnce(Cancel) -> Connection<T>) -> Option<(T, Cancel)> {
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
        state.connection = becomes(breaker.clone());
        drop(state);
        self.0.progress.tell_status();
        Some((with, breaker))
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Control<Uri> {
    /// Goes on over another connection.
    pub fn recover(&self, with: Uri) -> Result<(), RecoverError> {
        let state = self.state();
        match state.connection {
            Connection::Paused => self.replace(state, with, Status::PostcopyRecover),
            _ => Err(RecoverError::NotPaused),
        }
    }

    /// Waits for an address, and what breaks the connection there; `None` once nobody waits any
    /// more.
    pub(crate) fn wait(&self) -> Option<(Uri, Cancel)> {
        self.take(Connection::Active)
    }
}

impl Control<Listener> {
    /// Goes on over another connection, which the source makes to that listener. Until it has come,
    /// nothing else changes; another listener takes the first one's place.
    pub fn recover(&self, with: Listener) -> Result<(), RecoverError> {
        let state = self.state();
        if !state.is_recoverable() {
            return Err(RecoverError::NotPaused);
        }
        self.replace(state, with, Status::PostcopyPaused)
    }

    /// The guest has ended by itself, and needs no more memory: as [`end`](Self::end), but nothing
    /// is lost.
    pub fn guest_ended(&self, reason: &str) {
        self.end_by(GoneCause::Ended, reason);
    }

    /// Whether the source is waited for: the connection is broken, or it was before the source could
    /// say that it knows that all has arrived.
    pub fn is_recoverable(&self) -> bool {
        self.state().is_recoverable()
    }

    /// Waits for a listener, and what closes that; `None` once nobody waits any more.
    pub(crate) fn wait(&self) -> Option<(Listener, Cancel)> {
        self.take(Connection::Listening)
    }

    /// The source has come to the listener: both sides agree, until that is over or `breaker` breaks
    /// it. False if it is not waited for any more.
    pub(crate) fn agree(&self, breaker: Cancel) -> bool {
        let mut state = self.state();
        let listening = matches!(state.connection, Connection::Listening(_));
        if listening {
            state.connection = Connection::Active(breaker);
            self.change_status(&state, Status::PostcopyRecover);
        }
        drop(state);
        self.0.progress.tell_status();
        listening
    }

    /// They did not agree, for a reason to be shown: it waits at the listener again, which `breaker`
    /// closes. False if it is not to.
    pub(crate) fn listen_on(&self, breaker: Cancel, error: String) -> bool {
        let mut state = self.state();
        let agreeing = matches!(state.connection, Connection::Active(_));
        if agreeing {
            state.connection = Connection::Listening(breaker);
            self.broken(&state, error);
        }
        drop(state);
        self.0.progress.tell_status();
        agreeing
    }

    /// All has arrived. If there is a connection, which `breaker` breaks, the source is about to say
    /// that it knows.
    pub(crate) fn complete(&self, breaker: Option<Cancel>) {
        let mut state = self.state();
        self.0.progress.update(|snapshot| snapshot.error = None);
        self.change_status(&state, Status::Completed);
        state.complete = true;
        match (&state.connection, breaker) {
            (Connection::Ended(gone), Some(breaker)) => {
                let _ = breaker.cancel(&gone.reason);
            }
            (Connection::Ended(_), None) => {}
            (_, Some(breaker)) => state.connection = Connection::Active(breaker),
            (_, None) => state.connection = Connection::None,
        }
        drop(state);
        self.0.progress.tell_status();
    }
}

impl<T> State<T> {
    fn is_recoverable(&self) -> bool {
        match self.connection {
            Connection::Paused | Connection::Listening(_) | Connection::Replaced(..) => true,
            // It may be dead, which takes long to notice.
            Connection::Active(_) => self.complete,
            Connection::None | Connection::Ended(_) => false,
        }
    }
}

#[cfg(test)]
mod tests;
