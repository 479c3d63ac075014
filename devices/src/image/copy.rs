//! Copies of images' files, as they are: for snapshots beside the image.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, PoisonError};

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::{Errno, retry_on_intr};

use super::file::HostFile;
use super::storage::FileStorage;
use super::{Cache, Error, Fingerprint, Format, Image, ImageConfig, Result, dirty, free_space};

/// So much is copied between two looks at whether to go on.
const PIECE: u64 = 16 << 20;

impl Image {
    /// Makes a file at `to`, which must not exist, that is a copy of this image's own file: as if
    /// the image had been closed properly. Nothing is written to the image meanwhile, and the
    /// locks stay as they are. The copy is to be synchronized yet; on failure there is none.
    ///
    /// It shares its data with the image where the file system can do that, and has holes where
    /// the image has some. `go_on` is asked now and then whether to go on.
    pub fn copy_file(&self, to: &Path, go_on: &dyn Fn() -> bool) -> Result<()> {
        // Held for writing: no request is under way.
        let state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        self.flush_state(&state)?;
        let from = self.reopen()?;
        copy_file(&from, &self.path, to, go_on)?;
        if self.format == Format::Raw {
            return Ok(());
        }
        let cleaned = HostFile::open(to, true, Cache::Writeback, false).and_then(|file| {
            let file = FileStorage(Arc::new(file));
            dirty::set_dirty(&file, false)
        });
        if cleaned.is_err() {
            remove(to);
        }
        cleaned
    }

    /// Opens the file at `at` as the image that it is going to be once it is renamed to
    /// `config.path`.
    pub fn open_before_rename(config: &ImageConfig, at: &Path) -> Result<Image> {
        let mut file = HostFile::open(at, !config.readonly, config.cache, false)?;
        file.path.clone_from(&config.path);
        Image::from_file(FileStorage(Arc::new(file)), config)
    }

    /// The image's file once more, without `O_DIRECT` and with a position of its own.
    fn reopen(&self) -> Result<File> {
        let failed = |source| Error::whole(&self.path, "open it for a copy", source);
        let file = File::open(&self.path).map_err(failed)?;
        let (there, here) = (file.metadata(), self.top()?.file.file.metadata());
        let (there, here) = (there.map_err(failed)?, here.map_err(failed)?);
        if (there.dev(), there.ino()) != (here.dev(), here.ino()) {
            return Err(Error::Changed {
                path: self.path.clone(),
                reason: "another file is at this path now".to_owned(),
            });
        }
        Ok(file)
    }
}

/// Makes a file at `to`, which must not exist, with the contents and the permissions of `from`, as
/// [`Image::copy_file`] does; `name` is what `from` is called.
pub fn copy_file(from: &File, name: &Path, to: &Path, go_on: &dyn Fn() -> bool) -> Result<()> {
    let failed = |source| Error::Copy {
        path: name.to_owned(),
        to: to.to_owned(),
        source,
    };
    let metadata = from.metadata().map_err(failed)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    options.mode(metadata.mode() & 0o777);
    let file = options.open(to).map_err(failed)?;
    let copied = fill(from, &file, to, &metadata, go_on);
    if copied.is_err() {
        remove(to);
    }
    copied.map_err(failed)
}

/// What tells whether a file is still the same one, byte for byte: see [`Fingerprint`], whose
/// limits hold here too. The size is rounded up to whole sectors.
pub fn fingerprint_file(path: &Path) -> Result<Fingerprint> {
    Image::open(&ImageConfig {
        path: path.to_owned(),
        format: Some(Format::Raw),
        readonly: true,
        cache: Cache::Writeback,
    })?
    .fingerprint()
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!("{}: cannot remove it: {error}", path.display());
    }
}

fn fill(
    from: &File,
    to: &File,
    path: &Path,
    metadata: &std::fs::Metadata,
    go_on: &dyn Fn() -> bool,
) -> io::Result<()> {
    // Whoever may not give files away keeps it.
    let _ = std::os::unix::fs::fchown(to, Some(metadata.uid()), Some(metadata.gid()));
    to.set_permissions(metadata.permissions())?;
    if ioctl_ficlone(to, from).is_err() {
        let needed = metadata.blocks().saturating_mul(512);
        let free = free_space(path).map_err(io::Error::other)?;
        if needed > free {
            let reason = format!("it takes {needed} bytes, and {free} are free");
            return Err(io::Error::new(io::ErrorKind::StorageFull, reason));
        }
        to.set_len(metadata.len())?;
        copy_data(from, to, metadata.len(), go_on)?;
    }
    Ok(())
}

/// Copies what is not a hole.
fn copy_data(from: &File, to: &File, len: u64, go_on: &dyn Fn() -> bool) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        at = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Only a hole is left.
            Err(Errno::NXIO) => return Ok(()),
            // It can't tell.
            Err(_) => at,
        };
        let end = match seek(from, SeekFrom::Hole(at)) {
            Ok(hole) if hole > at => hole.min(len),
            _ => len,
        };
        while at < end {
            if !go_on() {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
            }
            let copied = copy_piece(from, to, at, (end - at).min(PIECE))?;
            if copied == 0 {
                let reason = format!("it ends before {at}: was it truncated?");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
            }
            at += copied;
        }
    }
    Ok(())
}

/// Copies up to `len` bytes at the same place in both; returns how many, at least one but at the
/// end of `from`.
fn copy_piece(mut from: &File, mut to: &File, at: u64, len: u64) -> io::Result<u64> {
    let (mut here, mut there) = (at, at);
    let copied = retry_on_intr(|| {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        copy_file_range(from, Some(&mut here), to, Some(&mut there), len)
    });
    match copied {
        Ok(copied) => Ok(copied as u64),
        // Not between these two file systems.
        Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
            from.seek(io::SeekFrom::Start(at))?;
            to.seek(io::SeekFrom::Start(at))?;
            let copied = io::copy(&mut from.take(len), &mut to)?;
            to.flush()?;
            Ok(copied)
        }
        Err(error) => Err(error.into()),
    }
}
