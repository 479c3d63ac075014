//! The human monitor: commands as lines of text, answers as text.
//!
//! A [`Session`] carries lines out, with the table in [`commands`]; [`info`] words what it shows,
//! [`progress`] follows a migration that somebody waits for, [`complete`] completes what is being
//! typed. [`server`] serves a Unix socket, [`terminal`] standard input and output.

pub mod commands;
pub mod complete;
pub mod info;
pub mod info_migrate;
pub mod line;
pub mod migrate;
pub mod progress;
pub mod server;
mod session;
pub mod terminal;

#[cfg(test)]
mod tests;

pub use session::{Detached, Outcome, Session, is_failure};

/// What a monitor shows when it waits for a command.
pub const PROMPT: &str = "(ferry) ";

/// What a monitor says first.
pub const GREETING: &str = concat!(
    "Ferry ",
    env!("CARGO_PKG_VERSION"),
    " monitor - type 'help' for more information"
);

/// The byte that Ctrl-C sends: it cancels the migration that somebody waits for.
pub const CANCEL: u8 = 0x03;
