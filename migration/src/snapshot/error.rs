//! Why a file is no snapshot, or can't become one.

use std::io;
use std::path::PathBuf;

use super::format::VERSION;
use crate::channel::ChannelError;
use crate::layout::PAGE_SIZE;
use crate::listener::ListenError;
use crate::message::MAGIC as PROTOCOL_MAGIC;
use crate::placement::Incomplete;

/// What is wrong with a snapshot's file.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Another kind of file is at the path.
    #[error("'{}' is not a regular file: a snapshot can be nothing else", .0.display())]
    NotAFile(PathBuf),
    /// It can't be made.
    #[error("cannot create a file for '{}': {error}", .path.display())]
    Create {
        /// Where the snapshot was to be.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It can't be written.
    #[error("cannot write '{}': {error}", .path.display())]
    Write {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// What was to be saved can't be.
    #[error("cannot save to '{}': {reason}", .path.display())]
    Unfit {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// It can't be opened or read.
    #[error("cannot read '{}': {error}", .path.display())]
    Read {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It is something else.
    #[error("'{}' is no snapshot of Ferry's: {looks}", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it seems to be.
        looks: String,
    },
    /// It was written by another version.
    #[error(
        "'{}' is a snapshot of format {found}; this build reads format {VERSION} only",
        .path.display()
    )]
    Version {
        /// The snapshot.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It is not as long as its header says.
    #[error(
        "'{}' has {len} bytes, but its header says that it has {stated}: it was {}",
        .path.display(), if .len < .stated { "cut off" } else { "added to" }
    )]
    Length {
        /// The snapshot.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// What the header says.
        stated: u64,
    },
    /// A part of it doesn't match its checksum, or can't be.
    #[error("'{}' is corrupted: {what}", .path.display())]
    Corrupted {
        /// The snapshot.
        path: PathBuf,
        /// Which part.
        what: String,
    },
}

/// Why a guest was not saved or not loaded, at the file's end of the connection.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The file.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The engine at the other end has given up, and says why.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No connection came about.
    #[error(transparent)]
    Connection(#[from] ListenError),
    /// Memory is not whole.
    #[error(transparent)]
    Incomplete(#[from] Incomplete),
    /// No socket, or no thread.
    #[error("cannot begin: {0}")]
    Begin(#[from] io::Error),
}

/// What a file that is no snapshot seems to be, from its first bytes.
pub(super) fn looks_like(start: &[u8]) -> String {
    let known: [(&[u8], &str); 6] = [
        (&PROTOCOL_MAGIC, "it is a recorded migration"),
        (b"QEVM", "it is a migration or a snapshot of QEMU's"),
        (b"QFI\xfb", "it is a qcow2 image"),
        (b"\x7fELF", "it is an ELF file"),
        (b"\x1f\x8b", "it is compressed (gzip)"),
        (b"\x28\xb5\x2f\xfd", "it is compressed (zstd)"),
    ];
    if start.is_empty() {
        return "it is empty".to_owned();
    }
    if let Some((_, looks)) = known.iter().find(|(magic, _)| start.starts_with(magic)) {
        return (*looks).to_owned();
    }
    if start.len() as u64 >= PAGE_SIZE && start.iter().all(|byte| *byte == 0) {
        return "it begins with zeroes, perhaps because saving it did not finish".to_owned();
    }
    let start = start.get(..8).unwrap_or(start);
    format!("it begins with {start:02x?}")
}
