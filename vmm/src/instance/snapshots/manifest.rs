//! What makes a few files a snapshot: the list of them, with what they must be like.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::offer::MovingFormat;
use super::tag::Tag;

/// The first word of the file.
const MAGIC: &str = "ferry-snapshot";
/// The version of what follows.
const VERSION: &str = "1";
/// More than any machine's has.
const MAX_LEN: u64 = 256 << 10;

/// A snapshot's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    /// The snapshot's name.
    pub(super) tag: String,
    /// The number in its files' names.
    pub(super) id: u64,
    /// When it was saved: seconds since 1970.
    pub(super) date: u64,
    /// How long the guest had run by its own clock, in nanoseconds.
    pub(super) vm_clock: u64,
    /// The file with the guest's state.
    pub(super) state: SavedFile,
    /// The copies of the writable disks' images.
    pub(super) disks: Vec<SavedDisk>,
}

/// What a file must be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedFile {
    /// Its length in bytes.
    pub(super) len: u64,
    /// CRC-32: of the header of a state, which has those of the rest; of a sample of an image.
    pub(super) crc32: u32,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedDisk {
    /// Its name.
    pub(super) id: String,
    /// The format of its image.
    pub(super) format: MovingFormat,
    /// The copy.
    pub(super) copy: SavedFile,
}

/// Why a manifest can't be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ManifestError {
    /// It can't be opened or read.
    #[error("cannot read '{}': {error}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It is something else.
    #[error("'{}' is no snapshot of Ferry's", .0.display())]
    Foreign(PathBuf),
    /// Another build wrote it.
    #[error(
        "'{}' is a snapshot of format {found:?}; this build reads format {VERSION} only",
        .path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: String,
    },
    /// It is not as it was written.
    #[error("'{}' is corrupted: {reason}", .path.display())]
    Corrupted {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl Manifest {
    /// Reads the manifest of the snapshot `tag`.
    pub(super) fn read(path: &Path, tag: &Tag) -> Result<Self, ManifestError> {
        let failed = |error| ManifestError::Read {
            path: path.to_owned(),
            error,
        };
        let corrupted = |reason: String| ManifestError::Corrupted {
            path: path.to_owned(),
            reason,
        };
        // Opening something else, such as a named pipe, could take forever.
        if !fs::metadata(path).map_err(failed)?.is_file() {
            return Err(ManifestError::Foreign(path.to_owned()));
        }
        let mut text = Vec::new();
        let file = File::open(path).map_err(failed)?;
        file.take(MAX_LEN + 1)
            .read_to_end(&mut text)
            .map_err(failed)?;
        let text = match String::from_utf8(text) {
            Ok(text) if text.starts_with(MAGIC) && text.len() as u64 <= MAX_LEN => text,
            _ => return Err(ManifestError::Foreign(path.to_owned())),
        };
        let (first, body) = text.split_once('\n').unwrap_or((&text, ""));
        let mut words = first.split(' ').skip(1);
        match words.next() {
            Some(VERSION) => {}
            found => {
                return Err(ManifestError::Version {
                    path: path.to_owned(),
                    found: found.unwrap_or_default().to_owned(),
                });
            }
        }
        let crc32 = words
            .next()
            .and_then(|word| u32::from_str_radix(word, 16).ok());
        if crc32 != Some(crc32fast::hash(body.as_bytes())) {
            return Err(corrupted("it doesn't match its checksum".to_owned()));
        }
        let manifest: Self =
            serde_json::from_str(body).map_err(|error| corrupted(error.to_string()))?;
        if manifest.tag != tag.as_str() {
            let reason = format!("it is of the snapshot {:?}", manifest.tag);
            return Err(corrupted(reason));
        }
        Ok(manifest)
    }

    /// Writes it to `path`, in place of what is there, once it is whole and on the disk. With this
    /// the snapshot comes into being.
    pub(super) fn publish(&self, path: &Path) -> io::Result<()> {
        let body = serde_json::to_string_pretty(self)? + "\n";
        let crc32 = crc32fast::hash(body.as_bytes());
        let directory = directory(path);
        let mut file = tempfile::Builder::new()
            .prefix(".snapshot.")
            .suffix(".tmp")
            .tempfile_in(directory)?;
        write!(file, "{MAGIC} {VERSION} {crc32:08x}\n{body}")?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        sync_directory(directory)
    }
}

/// The directory that a file is in.
pub(super) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Names that were given or taken in a directory are to survive a crash.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.a.snapshot");
        let tag = Tag::new("a").unwrap();
        let manifest = Manifest {
            tag: "a".to_owned(),
            id: 7,
            date: 1_700_000_000,
            vm_clock: 5,
            state: SavedFile { len: 9, crc32: 8 },
            disks: vec![SavedDisk {
                id: "disk0".to_owned(),
                format: MovingFormat::Qcow2,
                copy: SavedFile { len: 4, crc32: 3 },
            }],
        };
        manifest.publish(&path).unwrap();
        assert_eq!(Manifest::read(&path, &tag).unwrap(), manifest);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(Manifest::read(&path, &tag).is_err(), "{cut}");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert!(Manifest::read(&path, &tag).is_err(), "{at}");
        }
        let error = |bytes: &[u8], tag: &str| {
            fs::write(&path, bytes).unwrap();
            let tag = Tag::new(tag).unwrap();
            Manifest::read(&path, &tag).unwrap_err().to_string()
        };
        assert!(error(&whole, "b").contains("of the snapshot \"a\""));
        assert!(error(b"\x7fELF", "a").contains("is no snapshot of Ferry's"));
        assert!(error(b"ferry-snapshot 2 0\n", "a").contains("of format \"2\""));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(Manifest::read(&path, &tag).is_err());
    }
}
