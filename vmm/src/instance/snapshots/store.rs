//! Where the snapshots of a machine are: beside the images of its writable disks.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use devices::image::{ImageConfig, fingerprint_file};
use migration::snapshot::{Snapshot, SnapshotError};
use tracing::warn;

use super::manifest::{Manifest, ManifestError, SavedFile, directory, sync_directory};
use super::tag::{FileName, Tag};
use crate::control::snapshot::{SavedInfo, SnapshotInfo};
use crate::machine::config::Given;

/// How much of a state's file is under the manifest's checksum: its header, which has checksums of
/// the rest, but for its own checksum in the end, with which all headers have the same.
const STATE_HEADER: usize = 4092;

/// The writable disks, and with them the places of their snapshots.
#[derive(Debug)]
pub(super) struct Store {
    /// The first one's: manifest and state are beside it.
    first: PathBuf,
    pub(super) disks: Vec<StoredDisk>,
}

/// A writable disk.
#[derive(Debug)]
pub(super) struct StoredDisk {
    pub(super) id: String,
    /// Its image, as it was given.
    pub(super) config: ImageConfig,
    /// The file that the image is, behind symbolic links.
    pub(super) image: PathBuf,
}

/// Why there is no snapshot, or none that can be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    /// There is no writable disk.
    #[error("No block device can accept snapshots")]
    NoDisk,
    /// A writable disk is not a file.
    #[error(
        "Device '{0}' is writable but does not support snapshots: its image is not a regular file, \
         and a snapshot is a file beside it"
    )]
    NotAFile(String),
    /// An image is not there.
    #[error("disk '{id}': {}: {error}", .path.display())]
    Image {
        id: String,
        path: PathBuf,
        error: io::Error,
    },
    /// There is no snapshot of that name.
    #[error("Snapshot '{0}' does not exist in one or more devices")]
    Missing(Tag),
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The state.
    #[error(transparent)]
    State(#[from] SnapshotError),
    /// A file.
    #[error("'{}': {error}", .path.display())]
    File { path: PathBuf, error: io::Error },
    /// A copy of an image can't be read.
    #[error(transparent)]
    Copy(#[from] devices::image::Error),
    /// A file is another one than was saved.
    #[error("'{}' is not the file that was saved with the snapshot: {reason}", .path.display())]
    Other { path: PathBuf, reason: String },
    /// The machine has other disks.
    #[error("the snapshot is of the writable disks {saved:?}, but the machine has {here:?}")]
    Disks {
        saved: Vec<String>,
        here: Vec<String>,
    },
}

impl Store {
    /// The store of a machine with these disks.
    pub(super) fn of(given: &Given) -> Result<Self, StoreError> {
        let mut disks = Vec::new();
        for (index, options) in given.disks.iter().enumerate() {
            if options.readonly {
                continue;
            }
            let id = options.id(index);
            let path = &options.file;
            let image = path.canonicalize().map_err(|error| StoreError::Image {
                id: id.clone(),
                path: path.clone(),
                error,
            })?;
            if !image.is_file() {
                return Err(StoreError::NotAFile(id));
            }
            let config = ImageConfig {
                path: path.clone(),
                format: options.format,
                readonly: false,
                cache: options.cache,
            };
            disks.push(StoredDisk { id, config, image });
        }
        let first = disks.first().ok_or(StoreError::NoDisk)?.image.clone();
        Ok(Self { first, disks })
    }

    pub(super) fn manifest_path(&self, tag: &Tag) -> PathBuf {
        FileName::Manifest(tag.clone()).beside(&self.first)
    }

    pub(super) fn state_path(&self, tag: &Tag, id: u64) -> PathBuf {
        FileName::State(tag.clone(), id).beside(&self.first)
    }

    /// The snapshot of that name, as far as its manifest tells.
    pub(super) fn read(&self, tag: &Tag) -> Result<Manifest, StoreError> {
        let path = self.manifest_path(tag);
        match Manifest::read(&path, tag) {
            Err(ManifestError::Read { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::Missing(tag.clone()))
            }
            result => Ok(result?),
        }
    }

    /// Checks all that is quickly checked of a snapshot's files; returns the state.
    pub(super) fn check(&self, tag: &Tag, manifest: &Manifest) -> Result<Snapshot, StoreError> {
        let saved: Vec<_> = manifest.disks.iter().map(|disk| disk.id.clone()).collect();
        let here: Vec<_> = self.disks.iter().map(|disk| disk.id.clone()).collect();
        if saved != here {
            return Err(StoreError::Disks { saved, here });
        }
        let state = Snapshot::open(&self.state_path(tag, manifest.id))?;
        check_file(state.path(), &manifest.state, state_file(state.path()))?;
        for (disk, saved) in self.disks.iter().zip(&manifest.disks) {
            let path = disk.copy_path(tag, manifest.id);
            let len = fs::metadata(&path).map_err(|error| StoreError::File {
                path: path.clone(),
                error,
            })?;
            if len.len() != saved.copy.len {
                let reason = format!("{} bytes, not {}", len.len(), saved.copy.len);
                return Err(StoreError::Other { path, reason });
            }
        }
        Ok(state)
    }

    /// All snapshots that there are, by date; those that can't be read last.
    pub(super) fn list(&self) -> Result<Vec<SnapshotInfo>, StoreError> {
        let mut tags = Vec::new();
        for (name, _) in beside(&self.first)? {
            if let FileName::Manifest(tag) = name {
                tags.push(tag);
            }
        }
        tags.sort();
        let mut list: Vec<_> = tags.iter().map(|tag| self.info(tag)).collect();
        list.sort_by_key(|info| (info.saved.is_none(), info.saved.map(|saved| saved.date)));
        Ok(list)
    }

    fn info(&self, tag: &Tag) -> SnapshotInfo {
        let manifest = self.read(tag);
        let problem = match &manifest {
            Ok(manifest) => self.check(tag, manifest).err().map(|err| err.to_string()),
            Err(error) => Some(error.to_string()),
        };
        SnapshotInfo {
            tag: tag.to_string(),
            saved: manifest.ok().map(|manifest| SavedInfo {
                state_bytes: manifest.state.len,
                date: SystemTime::UNIX_EPOCH
                    .checked_add(Duration::from_secs(manifest.date))
                    .unwrap_or(SystemTime::UNIX_EPOCH),
                vm_clock: Duration::from_nanos(manifest.vm_clock),
            }),
            problem,
        }
    }

    /// Deletes a snapshot, whatever is left of it, and what attempts to save it have left.
    pub(super) fn delete(&self, tag: &Tag) -> Result<(), StoreError> {
        let manifest = self.manifest_path(tag);
        let mut found = false;
        // First: from then on it is none, should the rest fail.
        match fs::remove_file(&manifest) {
            Ok(()) => found = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(StoreError::File {
                    path: manifest,
                    error,
                });
            }
        }
        found |= self.remove_others(tag, None)?;
        if found {
            Ok(())
        } else {
            Err(StoreError::Missing(tag.clone()))
        }
    }

    /// Removes the files of `tag` but those of the number `keep`. Whether there were any.
    pub(super) fn remove_others(&self, tag: &Tag, keep: Option<u64>) -> Result<bool, StoreError> {
        let mut found = false;
        for disk in &self.disks {
            for (name, path) in beside(&disk.image)? {
                let other = match &name {
                    FileName::Manifest(_) => false,
                    FileName::State(_, id) | FileName::Copy(_, id) => Some(*id) != keep,
                };
                if other && name.tag() == tag {
                    found = true;
                    fs::remove_file(&path).map_err(|error| StoreError::File { path, error })?;
                }
            }
            if let Err(error) = sync_directory(directory(&disk.image)) {
                warn!("{}: cannot synchronize: {error}", disk.image.display());
            }
        }
        Ok(found)
    }
}

impl StoredDisk {
    pub(super) fn copy_path(&self, tag: &Tag, id: u64) -> PathBuf {
        FileName::Copy(tag.clone(), id).beside(&self.image)
    }
}

/// What a state's file is like.
pub(super) fn state_file(path: &Path) -> Result<SavedFile, StoreError> {
    let read = || {
        let file = File::open(path)?;
        let mut header = vec![0; STATE_HEADER];
        file.read_exact_at(&mut header, 0)?;
        Ok(SavedFile {
            len: file.metadata()?.len(),
            crc32: crc32fast::hash(&header),
        })
    };
    read().map_err(|error| StoreError::File {
        path: path.to_owned(),
        error,
    })
}

/// What an image's file is like.
pub(super) fn image_file(path: &Path) -> Result<SavedFile, StoreError> {
    let metadata = fs::metadata(path).map_err(|error| StoreError::File {
        path: path.to_owned(),
        error,
    })?;
    Ok(SavedFile {
        len: metadata.len(),
        crc32: fingerprint_file(path)?.crc32,
    })
}

/// Whether the file at `path` is as was saved.
pub(super) fn check_file(
    path: &Path,
    saved: &SavedFile,
    found: Result<SavedFile, StoreError>,
) -> Result<(), StoreError> {
    let found = found?;
    if found == *saved {
        return Ok(());
    }
    let reason = if found.len == saved.len {
        "its checksum is another one".to_owned()
    } else {
        format!("{} bytes, not {}", found.len, saved.len)
    };
    Err(StoreError::Other {
        path: path.to_owned(),
        reason,
    })
}

/// The files beside an image that belong to its snapshots.
fn beside(image: &Path) -> Result<Vec<(FileName, PathBuf)>, StoreError> {
    let failed = |error| StoreError::File {
        path: directory(image).to_owned(),
        error,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory(image)).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Some(name) = FileName::parse(image, &entry.file_name()) {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}
