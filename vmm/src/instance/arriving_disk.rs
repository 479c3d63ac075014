//! Images for disks whose contents arrive with the guest: `migrate -b` and `migrate -i`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::disk::Disk;
use devices::image::{self, ExtentKind, Image, ImageConfig, NewBacking, Scope, free_space};
use migration::disk::DestinationDisk;
use migration::vm::VmError;

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

/// Checks that there is room for all of them. What their images take here already is theirs.
pub(super) fn check_space(arrivals: &[Arrival<'_>]) -> Result<(), ArrivalError> {
    let mut needed: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for arrival in arrivals {
        let path = &arrival.options.file;
        let here = fs::metadata(path).ok();
        if here
            .as_ref()
            .is_some_and(|here| here.file_type().is_block_device())
        {
            continue;
        }
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
        let taken = here.map_or(0, |here| here.blocks() * 512);
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

impl Arrival<'_> {
    /// The image to be filled, locked, and whether it has nothing in it yet.
    pub(super) fn prepare(&self) -> Result<(Image, bool), ArrivalError> {
        match &self.moving.backing {
            None => self.prepare_whole(),
            Some(backing) => Ok((self.prepare_overlay(backing)?, true)),
        }
    }

    fn prepare_whole(&self) -> Result<(Image, bool), ArrivalError> {
        let path = &self.options.file;
        let is_new = match fs::metadata(path) {
            Ok(here) => here.is_file() && here.len() == 0,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if is_new {
            let format = self
                .options
                .format
                .unwrap_or_else(|| self.moving.format.into());
            let image = Image::create(path, format, self.capacity, None, self.options.cache);
            return Ok((image.map_err(|source| self.failed(source))?, true));
        }
        let image = self.open()?;
        image.lock().map_err(|source| self.failed(source))?;
        Ok((image, false))
    }

    /// A new, empty overlay in the place of the one that is here: an overlay that has something
    /// in it can't be made to show its backing file again.
    fn prepare_overlay(&self, expected: &BackingIdentity) -> Result<Image, ArrivalError> {
        let path = &self.options.file;
        let wrong = |reason: String| ArrivalError::Backing {
            id: self.moving.id.clone(),
            path: path.clone(),
            reason,
        };
        if !path.exists() {
            return Err(wrong("does not exist".to_owned()));
        }
        let here = self.open()?;
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
        let mut fresh = path.clone().into_os_string();
        fresh.push(".incoming");
        let fresh = PathBuf::from(fresh);
        let io = |what, path: &Path, source| ArrivalError::Io {
            id: self.moving.id.clone(),
            what,
            path: path.to_owned(),
            source,
        };
        match fs::remove_file(&fresh) {
            // What an earlier attempt has left.
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(io("remove", &fresh, source));
            }
            _ => {}
        }
        let new = NewBacking {
            name: backing.name,
            format: backing.format,
        };
        let cache = self.options.cache;
        let image = Image::create(&fresh, here.format(), self.capacity, Some(&new), cache);
        drop(image.map_err(|source| self.failed(source))?);
        fs::rename(&fresh, path).map_err(|source| io("replace", path, source))?;
        drop(here);
        let image = self.open()?;
        image.lock().map_err(|source| self.failed(source))?;
        Ok(image)
    }

    fn open(&self) -> Result<Image, ArrivalError> {
        let image = Image::open(&ImageConfig {
            path: self.options.file.clone(),
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
                path: self.options.file.clone(),
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
