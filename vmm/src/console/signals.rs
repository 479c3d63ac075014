//! The signals that concern the terminal, and those that end the process.

use std::fmt;
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::terminal;

/// A signal that asks the process to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Termination {
    /// SIGHUP: the terminal is gone.
    Hangup,
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGQUIT: Ctrl-\.
    Quit,
    /// SIGTERM.
    Terminate,
}

impl Termination {
    /// The signal's number.
    pub fn number(self) -> i32 {
        match self {
            Self::Hangup => libc::SIGHUP,
            Self::Interrupt => libc::SIGINT,
            Self::Quit => libc::SIGQUIT,
            Self::Terminate => libc::SIGTERM,
        }
    }
}

impl fmt::Display for Termination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hangup => "SIGHUP",
            Self::Interrupt => "SIGINT",
            Self::Quit => "SIGQUIT",
            Self::Terminate => "SIGTERM",
        })
    }
}

/// The signals that ask the process to end; from its creation on they do not end it by
/// themselves.
#[derive(Debug)]
pub struct Terminations {
    hangup: Signal,
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
}

impl Terminations {
    /// Must be called in a tokio runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for the next one; can be dropped while waiting. The terminal is restored at once:
    /// whatever the end then takes, the user has it back.
    pub async fn next(&mut self) -> Termination {
        let signal = tokio::select! {
            _ = self.hangup.recv() => Termination::Hangup,
            _ = self.interrupt.recv() => Termination::Interrupt,
            _ = self.quit.recv() => Termination::Quit,
            _ = self.terminate.recv() => Termination::Terminate,
        };
        terminal::restore();
        signal
    }

    /// The process does not end after all: the terminal is as before.
    pub fn refused(&self) {
        if let Err(error) = terminal::enter_raw() {
            tracing::warn!(%error, "cannot make the terminal raw again");
        }
    }
}

/// Makes the terminal raw again whenever the process goes on after it was stopped (Ctrl-Z).
/// Must be called in a tokio runtime.
pub fn raw_after_stop() -> io::Result<()> {
    // There is no name for it in tokio.
    let mut go_on = signal(SignalKind::from_raw(libc::SIGCONT))?;
    tokio::spawn(async move {
        while go_on.recv().await.is_some() {
            if let Err(error) = terminal::enter_raw() {
                tracing::warn!(%error, "cannot make the terminal raw again");
            }
        }
    });
    Ok(())
}
