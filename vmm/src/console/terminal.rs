//! The user's terminal: raw while ferry uses it, as it was on every way out.

#![allow(
    unsafe_code,
    reason = "atexit, which runs also where nothing is dropped"
)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::panic;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, tcgetattr,
    tcsetattr,
};

/// A terminal that has been made raw; dropping it restores it. One process has one at most.
///
/// It is restored as well by a panic anywhere, by [`std::process::exit`], and by
/// [`restore`], which those call who end the process in another way (a signal, for one).
#[derive(Debug)]
#[must_use = "dropping it restores the terminal"]
pub struct RawTerminal(());

/// Who gets Ctrl-C and Ctrl-\.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signals {
    /// The process, as signals.
    Process,
    /// Whoever reads the terminal, as bytes.
    Reader,
}

struct Saved {
    fd: OwnedFd,
    original: Termios,
    raw: Termios,
}

static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

fn saved() -> MutexGuard<'static, Option<Saved>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RawTerminal {
    /// Makes the terminal raw: no echo, no lines, no flow control. Output is processed as before
    /// (a line feed still returns the carriage), since others write to it too.
    pub fn new(terminal: BorrowedFd<'_>, signals: Signals) -> io::Result<Self> {
        let original = tcgetattr(terminal)?;
        let mut raw = original.clone();
        raw.input_modes.remove(
            InputModes::IGNBRK
                | InputModes::BRKINT
                | InputModes::PARMRK
                | InputModes::ISTRIP
                | InputModes::INLCR
                | InputModes::IGNCR
                | InputModes::ICRNL
                | InputModes::IXON,
        );
        raw.output_modes.insert(OutputModes::OPOST);
        raw.local_modes.remove(
            LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::IEXTEN,
        );
        if signals == Signals::Reader {
            raw.local_modes.remove(LocalModes::ISIG);
        }
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;

        restore_at_exit();
        let fd = fcntl_dupfd_cloexec(terminal, 0)?;
        let mut saved = saved();
        if saved.is_some() {
            return Err(io::Error::other("the terminal is in use already"));
        }
        *saved = Some(Saved { fd, original, raw });
        drop(saved);
        let guard = Self(());
        enter_raw()?;
        Ok(guard)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        saved().take();
    }
}

/// Makes the terminal raw again, if it is in use: after SIGCONT, for the shell has changed it.
pub fn enter_raw() -> io::Result<()> {
    match &*saved() {
        Some(saved) => Ok(tcsetattr(&saved.fd, OptionalActions::Drain, &saved.raw)?),
        None => Ok(()),
    }
}

/// Restores the terminal, if it is in use. Can be called any number of times.
pub fn restore() {
    restore_saved(&saved());
}

fn restore_saved(saved: &Option<Saved>) {
    if let Some(saved) = saved {
        // Nothing can be done about an error: the terminal is gone, most likely.
        let _ = tcsetattr(&saved.fd, OptionalActions::Now, &saved.original);
    }
}

/// For the ways out on which the guard may not be dropped. There a lock that somebody holds is
/// not waited for: the holder may never go on.
fn restore_at_exit() {
    extern "C" fn at_exit() {
        restore_unless_locked();
    }
    fn restore_unless_locked() {
        if let Ok(saved) = SAVED.try_lock() {
            restore_saved(&saved);
        }
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore_unless_locked();
            report(info);
        }));
        // SAFETY: the function takes nothing, returns nothing and does not unwind.
        if unsafe { libc::atexit(at_exit) } != 0 {
            tracing::warn!("cannot arrange for the terminal to be restored on exit");
        }
    });
}
