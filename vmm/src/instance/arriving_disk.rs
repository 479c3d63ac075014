//! Images for disks whose contents arrive with the guest: `migrate -b` and `migrate -i`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::disk::Disk;
use devices::image::{
    self, Cache, ExtentKind, Format, Image, ImageConfig, NewBacking, Scope, free_space,
    sync_directory,
};
use migration::disk::DestinationDisk;
use migration::vm::VmError;
use tracing::warn;

use super::offer::{BackingIdentity, MovingDisk};
use crate::machine::config::DiskOptions;

/// Why an arriving disk can't be kept here.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArrivalError {
    /// The image.
    #[error("disk {id:?}: {source}")]
    Image {
        /// The disk.
        id: String,
        /// Why.
        source: image::Error,
    },
    /// An image of another size.
    #[error(
        "disk {id:?} has {expected} bytes, but {} here has {found}: give an image of the right \
         size, or none, and it is made", path.display()
    )]
    Size {
        /// The disk.
        id: String,
        /// Its size at the source.
        expected: u64,
        /// The image here.
        path: PathBuf,
        /// Its size.
        found: u64,
    },
    /// For an incremental copy there must be an overlay over the same backing file.
    #[error(
        "disk {id:?}: {} {reason}: an incremental migration (migrate -i) needs an image here over \
         a copy of the same backing file (qemu-img create -f qcow2 -b BACKING -F FORMAT {})",
        path.display(), path.display()
    )]
    Backing {
        /// The disk.
        id: String,
        /// The image here.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Not enough room.
    #[error(
        "the disks need {needed} bytes in {}, but {free} are free there: make room, or give the \
         disks overcommit=on to count only what they take at the source", path.display()
    )]
    Space {
        /// The directory.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// The host.
    #[error("disk {id:?}: cannot {what} {}: {source}", path.display())]
    Io {
        /// The disk.
        id: String,
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// A disk that arrives, and where it is to be kept.
pub(super) struct Arrival<'a> {
    pub(super) moving: &'a MovingDisk,
    pub(super) options: &'a DiskOptions,
    /// Its size in bytes.
    pub(super) capacity: u64,
}

/// Checks that there is room for all of them. What an image takes that is here already counts for
/// nothing: it stays until the new one is whole, but what an attempt before has left goes.
pub(super) fn check_space(arrivals: &[Arrival<'_>]) -> Result<(), ArrivalError> {
    let mut needed: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for arrival in arrivals {
        let path = &arrival.options.file;
        if is_block_device(path) {
            continue;
        }
        let left = match Unfinished::before(path).exists() {
            true => fs::metadata(path).ok(),
            false => None,
        };
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let device = fs::metadata(dir).map_err(|source| ArrivalError::Io {
            id: arrival.moving.id.clone(),
            what: "look at the directory",
            path: dir.to_owned(),
            source,
        })?;
        let whole = if arrival.options.overcommit {
            arrival.moving.allocated.min(arrival.capacity)
        } else {
            arrival.capacity
        };
        // Blocks of 512 bytes, whatever the file system's are (stat(2)).
        let taken = left.map_or(0, |left| left.blocks() * 512);
        let (_, sum) = needed
            .entry(device.dev())
            .or_insert_with(|| (dir.to_owned(), 0));
        *sum = sum.saturating_add(whole.saturating_sub(taken));
    }
    for (path, needed) in needed.into_values() {
        // Asked about the directory: a file there is on the same file system.
        let free = free_space(&path.join(".")).map_err(|source| ArrivalError::Image {
            id: path.display().to_string(),
            source,
        })?;
        if needed > free {
            return Err(ArrivalError::Space { path, needed, free });
        }
    }
    Ok(())
}

/// An image to be filled.
pub(super) struct Prepared {
    /// The image, locked.
    pub(super) image: Image,
    /// Whether it has nothing in it yet.
    pub(super) fresh: bool,
    /// What becomes of the file if the disk doesn't arrive.
    pub(super) unfinished: Option<Unfinished>,
}

/// An image under its own name that is not whole yet. What had that name before is kept beside it,
/// with `.before` behind its name; an empty file if there was nothing. As long as that is there, the
/// image is of no use: so the next attempt knows, even after this process was killed.
///
/// Undone when it is dropped.
pub(super) struct Unfinished {
    path: PathBuf,
    before: PathBuf,
    whole: bool,
}

impl Unfinished {
    fn before(path: &Path) -> PathBuf {
        let mut before = path.to_owned().into_os_string();
        before.push(".before");
        before.into()
    }

    /// Makes room for a new image at `path`.
    fn begin(path: &Path) -> io::Result<Self> {
        let before = Self::before(path);
        if before.exists() {
            // What an earlier attempt has left.
            remove(path)?;
        } else if path.exists() {
            fs::rename(path, &before)?;
        } else {
            fs::File::create_new(&before)?;
        }
        Ok(Self {
            path: path.to_owned(),
            before,
            whole: false,
        })
    }

    /// The image is whole, and on the disk: what was there before goes. To be dropped once the
    /// guest runs.
    pub(super) fn finish(mut self) -> io::Result<Replaced> {
        self.whole = true;
        // Without its name it goes with the process at the latest. Where it can't be opened,
        // removing it takes its time.
        let open = fs::File::open(&self.before).ok();
        remove(&self.before)?;
        Ok(Replaced {
            path: self.path.clone(),
            _open: open,
        })
    }

    fn undo(&self) -> Result<(), UndoError> {
        remove(&self.path)?;
        match fs::metadata(&self.before)?.len() {
            0 => remove(&self.before)?,
            _ => fs::rename(&self.before, &self.path)?,
        }
        Ok(sync_directory(&self.path)?)
    }
}

/// Why what was there before is not back, or perhaps not after a crash.
#[derive(Debug, thiserror::Error)]
enum UndoError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Sync(#[from] image::Error),
}

/// An image that has been replaced. It has no name any more, but is open: a file system can take
/// long to free a large file, and does that when it is closed.
pub(super) struct Replaced {
    path: PathBuf,
    _open: Option<fs::File>,
}

impl Drop for Replaced {
    fn drop(&mut self) {
        if let Err(err) = sync_directory(&self.path) {
            warn!("after a crash the image that was there before may be back: {err}");
        }
    }
}

fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|here| here.file_type().is_block_device())
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.whole {
            return;
        }
        if let Err(err) = self.undo() {
            warn!(
                image = %self.path.display(),
                before = %self.before.display(),
                %err,
                "what was there before can't be put back"
            );
        }
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Arrival<'_> {
    /// The image to be filled.
    pub(super) fn prepare(&self) -> Result<Prepared, ArrivalError> {
        let path = &self.options.file;
        if is_block_device(path) {
            let image = self.open(path)?;
            image.lock().map_err(|source| self.failed(source))?;
            return Ok(Prepared {
                image,
                fresh: false,
                unfinished: None,
            });
        }
        let before = Unfinished::before(path);
        let old = if before.exists() {
            // The unfinished image of an attempt that may still go on.
            self.check_unused(path)?;
            before
        } else {
            path.clone()
        };
        let (format, backing) = match &self.moving.backing {
            None => (self.whole_format(&old)?, None),
            Some(expected) => {
                let (format, backing) = self.overlay_format(&old, expected)?;
                (format, Some(backing))
            }
        };
        let io = |source| ArrivalError::Io {
            id: self.moving.id.clone(),
            what: "replace",
            path: path.clone(),
            source,
        };
        let unfinished = Unfinished::begin(path).map_err(io)?;
        let cache = self.options.cache;
        let image = Image::create(path, format, self.capacity, backing.as_ref(), cache)
            .map_err(|source| self.failed(source))?;
        Ok(Prepared {
            image,
            fresh: true,
            unfinished: Some(unfinished),
        })
    }

    /// The format of a whole disk's new image: that of the one that was there, if any.
    fn whole_format(&self, old: &Path) -> Result<Format, ArrivalError> {
        if fs::metadata(old).is_ok_and(|old| !old.is_file() || old.len() > 0) {
            let old = self.open(old)?;
            // Nobody may be using it.
            old.lock().map_err(|source| self.failed(source))?;
            return Ok(old.format());
        }
        Ok(self
            .options
            .format
            .unwrap_or_else(|| self.moving.format.into()))
    }

    /// The format of a new overlay, and its backing file: those of the one that was there, whose
    /// backing file must be the one that is expected.
    fn overlay_format(
        &self,
        old: &Path,
        expected: &BackingIdentity,
    ) -> Result<(Format, NewBacking), ArrivalError> {
        let wrong = |reason: String| ArrivalError::Backing {
            id: self.moving.id.clone(),
            path: self.options.file.clone(),
            reason,
        };
        if !fs::metadata(old).is_ok_and(|old| old.len() > 0) {
            return Err(wrong("does not exist".to_owned()));
        }
        let here = self.open(old)?;
        let Some(backing) = here.backing().map_err(|source| self.failed(source))? else {
            return Err(wrong("has no backing file".to_owned()));
        };
        let found = backing
            .fingerprint()
            .map_err(|source| self.failed(source))?;
        if BackingIdentity::from(found) != *expected {
            return Err(wrong(format!(
                "has the backing file {}, whose contents are not those of the source's",
                backing.path.display()
            )));
        }
        // Nobody may be using it.
        here.lock().map_err(|source| self.failed(source))?;
        let new = NewBacking {
            name: backing.name,
            format: backing.format,
        };
        Ok((here.format(), new))
    }

    /// Checks that nobody has a file locked, whatever is in it.
    fn check_unused(&self, path: &Path) -> Result<(), ArrivalError> {
        if !path.exists() {
            return Ok(());
        }
        Image::open(&ImageConfig {
            path: path.to_owned(),
            format: Some(Format::Raw),
            readonly: false,
            cache: Cache::Writeback,
        })
        .and_then(|image| image.lock())
        .map_err(|source| self.failed(source))
    }

    fn open(&self, path: &Path) -> Result<Image, ArrivalError> {
        let image = Image::open(&ImageConfig {
            path: path.to_owned(),
            format: self.options.format,
            readonly: false,
            cache: self.options.cache,
        })
        .map_err(|source| self.failed(source))?;
        if image.capacity() == self.capacity {
            Ok(image)
        } else {
            Err(ArrivalError::Size {
                id: self.moving.id.clone(),
                expected: self.capacity,
                path: path.to_owned(),
                found: image.capacity(),
            })
        }
    }

    fn failed(&self, source: image::Error) -> ArrivalError {
        ArrivalError::Image {
            id: self.moving.id.clone(),
            source,
        }
    }
}

/// A disk as the engine fills it.
pub(super) struct ArrivingDisk {
    pub(super) disk: Arc<Disk>,
    /// It was made for this: what was not written reads as zeroes, or as its backing file.
    pub(super) fresh: bool,
}

impl DestinationDisk for ArrivingDisk {
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), VmError> {
        Ok(self.disk.image().write_at(&[IoSlice::new(data)], offset)?)
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), VmError> {
        let image = self.disk.image();
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let mut len = end - at;
            let mut zero = false;
            if self.fresh {
                // Telling is cheap, and keeps holes holes.
                let extent = image.extent(at, len, Scope::Chain)?;
                zero = extent.kind == ExtentKind::Zero;
                len = extent.len.min(len);
            }
            if !zero {
                image.write_zeroes(at, len, true)?;
            }
            at += len;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), VmError> {
        Ok(self.disk.image().flush()?)
    }
}
