//! What becomes of errors of the disk, beside what the driver is told.

pub use super::request::Operation;

/// What was done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The driver was told.
    Report,
    /// The machine is to be stopped: the request is made again when it runs on.
    Stop,
}

/// An error of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoError {
    /// The disk's name.
    pub disk: String,
    /// What was to be done.
    pub operation: Operation,
    /// What is done about it.
    pub action: Action,
    /// Whether the host has no space left.
    pub no_space: bool,
    /// The error, with its place.
    pub reason: String,
}

/// Where a disk's errors are told. Called on the disk's threads: must not wait for them.
pub trait ErrorSink: Send + Sync {
    /// There was an error.
    fn io_error(&self, error: IoError);
}
