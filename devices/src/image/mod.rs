//! Disk images: raw and qcow2 files, and block devices.
//!
//! An [`Image`] is a disk of a whole number of 512-byte sectors, of which several threads may
//! read and write at once, straight from and to the caller's buffers. It knows nothing of the
//! device that shows it to a guest.
//!
//! **Raw** images go to the file as they are. **qcow2** is done by the crate imago, with the
//! files under it opened here: a backing file is only ever read, and its format is the recorded
//! one, never a guessed one.
//!
//! **Locks.** [`Image::open`] neither locks nor writes. Only an image that is locked
//! ([`Image::lock`]) can be written, and what is known of it is read anew at that moment, so a
//! migration's destination can open its images while the source's guest still runs on them. The
//! source gives them away with [`Image::unlock`], which leaves everything on the disk, and can take
//! them back. The locks are those of QEMU: the two exclude each other on one image.

mod chain;
mod copy;
mod create;
mod dirty;
mod discard;
mod error;
mod extent;
mod file;
mod header;
mod identity;
mod lock;
mod probe;
mod refcounts;
mod request;
mod storage;
#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use imago::FormatAccess;

use self::chain::Layer;
use self::file::HostFile;
use self::storage::FileStorage;

pub use self::copy::{copy_file, fingerprint_file};
pub use self::create::{NewBacking, free_space, sync_directory};
pub use self::error::{Error, Result};
pub use self::extent::{Extent, ExtentKind, Scope};
pub use self::identity::{Backing, Fingerprint};

/// How an image's file is organised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's format, versions 2 and 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// How the host's page cache is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Writes are done when the page cache has them, and durable after [`Image::flush`].
    #[default]
    Writeback,
    /// `O_DIRECT`: the page cache is bypassed. Durable after [`Image::flush`], too. Requests and
    /// buffers that are not aligned as the host needs it go through a buffer.
    None,
}

/// Which image to open, and how.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// Its format; without one it is guessed from the first bytes, and the guest can't write
    /// another format's header there ([`Error::ForeignHeader`]).
    pub format: Option<Format>,
    /// Never write to it.
    pub readonly: bool,
    /// How the page cache is used, for the backing files too.
    pub cache: Cache,
}

/// An open disk image.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    format: Format,
    readonly: bool,
    cache: Cache,
    /// The format was guessed to be raw: sector 0 is guarded.
    guessed_raw: bool,
    /// Size of the disk in bytes.
    capacity: u64,
    /// Requests hold this for reading, what changes hands or frees space for writing.
    state: RwLock<State>,
    /// Held by a write to the guarded sector 0.
    sector_zero: Mutex<()>,
    /// The image's file first, then its backing files.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct State {
    locked: bool,
    /// What is known of a qcow2 image, writable only while it is locked. None for raw.
    qcow2: Option<FormatAccess<FileStorage>>,
}

impl Image {
    /// Opens an image and its backing files. Nothing is locked or written.
    pub fn open(config: &ImageConfig) -> Result<Image> {
        let file = HostFile::open(&config.path, !config.readonly, config.cache, false)?;
        Image::from_file(FileStorage(Arc::new(file)), config)
    }

    fn from_file(file: FileStorage, config: &ImageConfig) -> Result<Image> {
        let layers = chain::open_backing(Layer::new(file, config.format)?, config.cache)?;
        let qcow2 = chain::load(&layers, false)?;
        let top = top(&layers, &config.path)?;
        if top.format == Format::Raw && !config.readonly {
            let align = top.file.align.request as u64;
            if !top.file.size().is_multiple_of(align) {
                let size = top.file.size();
                let reason =
                    format!("its size of {size} bytes is not a multiple of the {align} it needs");
                return Err(Error::Direct {
                    path: config.path.clone(),
                    reason,
                });
            }
        }
        Ok(Image {
            path: config.path.clone(),
            format: top.format,
            readonly: config.readonly,
            cache: config.cache,
            guessed_raw: config.format.is_none() && top.format == Format::Raw,
            capacity: top.capacity(),
            state: RwLock::new(State {
                locked: false,
                qcow2,
            }),
            sector_zero: Mutex::new(()),
            layers,
        })
    }

    /// The image's path, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image's format, guessed if none was given.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether writes are refused.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// How the page cache is used.
    pub fn cache(&self) -> Cache {
        self.cache
    }

    /// How many backing files there are, each of the one before.
    pub fn backing_depth(&self) -> usize {
        self.layers.len().saturating_sub(1)
    }

    /// Bytes of a cluster, in a format that has them.
    pub fn cluster_size(&self) -> Option<u64> {
        let header = self.layers.first()?.header.as_ref();
        header.map(|header| header.cluster_size)
    }

    /// Size of the disk in bytes, a multiple of 512.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes that the image takes on the host, without its backing files.
    pub fn allocated(&self) -> Result<u64> {
        let op = "ask for the space it takes";
        self.top()?
            .file
            .allocated()
            .map_err(|source| Error::whole(&self.path, op, source))
    }

    /// Takes the locks of the image and its backing files, and reads anew what is known of them.
    /// From here on the image can be written, unless it is read-only. Does nothing if they are
    /// held.
    ///
    /// Fails with [`Error::Locked`] if another process (or another `Image`) excludes this, and
    /// with [`Error::Changed`] if the disk's size or backing file is not what it was. The locks
    /// are not held then.
    pub fn lock(&self) -> Result<()> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.locked {
            return Ok(());
        }
        let writable = !self.readonly;
        chain::lock(&self.layers, writable)?;
        let loaded = self
            .check_unchanged()
            .and_then(|()| chain::load(&self.layers, writable))
            .and_then(|qcow2| self.set_dirty(true).map(|()| qcow2));
        match loaded {
            Ok(qcow2) => {
                *state = State {
                    locked: true,
                    qcow2,
                };
                Ok(())
            }
            Err(error) => {
                chain::unlock(&self.layers);
                Err(error)
            }
        }
    }

    fn check_unchanged(&self) -> Result<()> {
        let changed = |reason| Error::Changed {
            path: self.path.clone(),
            reason,
        };
        for layer in &self.layers {
            let failed = |source| Error::whole(&layer.file.path, "ask for the file's size", source);
            layer.file.refresh_size().map_err(failed)?;
        }
        let top = self.top()?;
        if let Some(header) = &top.header {
            let now = header::Qcow2Header::read(&top.file)?;
            if now != *header {
                return Err(changed("its header says something else".to_owned()));
            }
            if !self.readonly {
                refcounts::repair(&top.file)?;
            }
            if let Some(offset) = header::lost_cluster(&top.file)? {
                let (path, size) = (self.path.display(), top.file.size());
                tracing::warn!(
                    "{path}: uses a cluster at {offset}, but the file ends at {size}: was it \
                     truncated? What is lost reads as zeroes"
                );
            }
        }
        match top.capacity() {
            now if now == self.capacity => Ok(()),
            now => Err(changed(format!("{} bytes then, {now} now", self.capacity))),
        }
    }

    /// Makes everything written durable and gives the locks away: from here on another process
    /// may take the image. Does nothing if they are not held. The locks are kept on failure.
    pub fn unlock(&self) -> Result<()> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if !state.locked {
            return Ok(());
        }
        self.flush_state(&state)?;
        // Nothing is left to be written, so dropping the old one touches nothing.
        let qcow2 = chain::load(&self.layers, false)?;
        self.set_dirty(false)?;
        *state = State {
            locked: false,
            qcow2,
        };
        chain::unlock(&self.layers);
        Ok(())
    }

    /// Whether the locks are held.
    pub fn locked(&self) -> bool {
        self.state().locked
    }

    /// Asks the host to forget what its page cache has of the image. For a destination, before it
    /// takes the locks: on a network file system the cache may be older than what the source's
    /// host has written. On a local one nothing is forgotten: its cache is never older.
    pub fn drop_page_cache(&self) -> Result<()> {
        for layer in &self.layers {
            let failed = |source| Error::whole(&layer.file.path, "drop the page cache", source);
            layer.file.drop_page_cache().map_err(failed)?;
        }
        Ok(())
    }

    /// Says in the image whether it may be being written, and makes it durable that it is not.
    fn set_dirty(&self, dirty: bool) -> Result<()> {
        let top = self.top()?;
        if self.readonly || top.format == Format::Raw {
            return Ok(());
        }
        dirty::set_dirty(&top.file, dirty)?;
        if dirty {
            // The next flush does it: what is written until then may be lost as well.
            return Ok(());
        }
        let synced = top.file.0.sync();
        synced.map_err(|source| Error::whole(&self.path, "flush", source))
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn top(&self) -> Result<&Layer> {
        top(&self.layers, &self.path)
    }
}

impl Drop for Image {
    /// As [`Image::unlock`], but it gives the locks away in any case.
    fn drop(&mut self) {
        let flushed = self.flush();
        if let Err(error) = &flushed {
            tracing::error!("{error}");
        }
        let clean = flushed.is_ok() && self.locked();
        let state = self.state.get_mut();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        // It may write what a failed flush left, so it goes first.
        state.qcow2 = None;
        let locked = state.locked;
        if clean && let Err(error) = self.set_dirty(false) {
            tracing::error!("{error}");
        }
        if locked {
            // Closing the files is not enough: a child process that is just being started has
            // them too.
            chain::unlock(&self.layers);
        }
    }
}

fn top<'a>(layers: &'a [Layer], path: &Path) -> Result<&'a Layer> {
    layers
        .first()
        .ok_or_else(|| Error::format(path, "has no layers"))
}
