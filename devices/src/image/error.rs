//! What can go wrong with a disk image.

use std::io;
use std::path::{Path, PathBuf};

/// The outcome of an operation on an image.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on an image failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be opened.
    #[error("{}: cannot open the disk image: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{}: a disk image must be a regular file or a block device, this is {kind}", path.display())]
    FileType {
        /// The image.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The file system refuses `O_DIRECT`, or the image's size does not allow it.
    #[error("{}: cache=none (O_DIRECT) is not possible: {reason}; use cache=writeback", path.display())]
    Direct {
        /// The image.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file that can't be used as an image of its format: broken, or of features that Ferry
    /// does not know.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// What is wrong, and what helps.
        reason: String,
    },
    /// A backing file can't be opened.
    #[error("{}: its backing file: {source}", path.display())]
    Backing {
        /// The image that has the backing file.
        path: PathBuf,
        /// What is wrong with the backing file.
        source: Box<Error>,
    },
    /// Another process uses the image in a way that excludes this one.
    #[error("{}: failed to get {}\"{permission}\" lock: is another process using the image?",
        path.display(), if *shared { "shared " } else { "" })]
    Locked {
        /// The image.
        path: PathBuf,
        /// The permission, as QEMU calls it.
        permission: &'static str,
        /// Whether the other process uses the permission; otherwise it does not let others use it.
        shared: bool,
    },
    /// The host can't lock the file.
    #[error("{}: cannot lock the image: {source}", path.display())]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A write to an image whose locks are not held.
    #[error("{}: cannot {op}: the image is not locked by this process", path.display())]
    NotLocked {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        op: &'static str,
    },
    /// The image is another one than when it was opened.
    #[error("{}: the image has changed since it was opened: {reason}", path.display())]
    Changed {
        /// The image.
        path: PathBuf,
        /// What has changed.
        reason: String,
    },
    /// A write to a read-only image.
    #[error("{}: cannot {op}: the image is read-only", path.display())]
    ReadOnly {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        op: &'static str,
    },
    /// A request that reaches beyond the end of the disk.
    #[error("{}: cannot {op} {len} bytes at {offset}: the disk ends at {capacity}", path.display())]
    OutOfRange {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        op: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// The disk's size in bytes.
        capacity: u64,
    },
    /// A write that would make an image whose format was guessed look like one of another format.
    #[error("{}: refused to write the header of a {format} image to the first sector: the image's format \
        was not given and would be mistaken from then on; give format=raw to allow it", path.display())]
    ForeignHeader {
        /// The image.
        path: PathBuf,
        /// What it would look like.
        format: &'static str,
    },
    /// A new image would overwrite something.
    #[error("{}: not overwritten: {reason}", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
        /// What is there.
        reason: String,
    },
    /// The host failed a request.
    #[error("{}: cannot {op} {len} bytes at {offset}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        op: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The host failed to copy the image's file.
    #[error("{}: cannot copy it to {}: {source}", path.display(), to.display())]
    Copy {
        /// What was to be copied.
        path: PathBuf,
        /// Where the copy was to be.
        to: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host failed something that concerns the whole image.
    #[error("{}: cannot {op}: {source}", path.display())]
    Whole {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        op: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

impl Error {
    /// Whether the host has no room left (`ENOSPC`, `EDQUOT`): the guest can go on once there is
    /// room again.
    pub fn is_no_space(&self) -> bool {
        self.io().is_some_and(|source| {
            matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        })
    }

    /// The host's error, where there is one.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Error::Open { source, .. }
            | Error::Lock { source, .. }
            | Error::Io { source, .. }
            | Error::Copy { source, .. }
            | Error::Whole { source, .. } => Some(source),
            Error::Backing { source, .. } => source.io(),
            _ => None,
        }
    }

    pub(super) fn format(path: &Path, reason: impl Into<String>) -> Error {
        Error::Format {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    pub(super) fn whole(path: &Path, op: &'static str, source: impl Into<io::Error>) -> Error {
        Error::Whole {
            path: path.to_owned(),
            op,
            source: source.into(),
        }
    }
}
