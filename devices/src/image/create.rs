//! Making an image, for a destination that has none yet.

use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;

use super::chain::{self, Layer};
use super::file::HostFile;
use super::lock::{self, Use};
use super::storage::FileStorage;
use super::{Cache, Error, Format, Image, ImageConfig, Result, probe};

/// Sizes that imago's L1 table can hold with clusters of 64 KiB, and that file offsets can.
const MAX_QCOW2: u64 = 1 << 50;
const MAX_RAW: u64 = i64::MAX.cast_unsigned() & !511;

/// The backing file that a new image is to have.
#[derive(Clone, Debug)]
pub struct NewBacking {
    /// Its name as it is to be recorded: relative to the image, or absolute.
    pub name: String,
    /// Its format, which is recorded.
    pub format: Format,
}

impl Image {
    /// Makes an image of `capacity` bytes that reads as zeroes, or as its backing file (qcow2
    /// only), and takes little space until it is written. It is returned locked.
    ///
    /// A file that exists and is not empty is not overwritten: if it is an image of this format,
    /// size and backing file, it is opened and keeps its contents; otherwise this fails with
    /// [`Error::Exists`]. A block device is opened if it is of this size. A file that could not be
    /// made into an image is removed, if it was not there before. A new file's name is durable when
    /// this returns.
    pub fn create(
        path: &Path,
        format: Format,
        capacity: u64,
        backing: Option<&NewBacking>,
        cache: Cache,
    ) -> Result<Image> {
        let invalid = |reason: String| Err(Error::format(path, reason));
        let max = if format == Format::Raw {
            MAX_RAW
        } else {
            MAX_QCOW2
        };
        if capacity == 0 || !capacity.is_multiple_of(512) || capacity > max {
            return invalid(format!(
                "cannot make a {format} image of {capacity} bytes: a multiple of 512 up to {max} is possible"
            ));
        }
        if format == Format::Raw && backing.is_some() {
            return invalid("a raw image can't have a backing file".to_owned());
        }
        let is_new = !path.exists();
        let file = FileStorage(Arc::new(HostFile::open(path, true, cache, true)?));
        // Others must not come in between: the locks are held from here on.
        lock::acquire(&file, Use::of(format))?;
        let result = fill(&file, format, capacity, backing).and_then(|()| {
            let path = path.to_owned();
            let image = Image::from_file(
                file.clone(),
                &ImageConfig {
                    path,
                    format: Some(format),
                    readonly: false,
                    cache,
                },
            )?;
            image.lock()?;
            if is_new {
                sync_directory(&image.path)?;
            }
            Ok(image)
        });
        if result.is_err() {
            if is_new {
                // What is left is of no use; that it can't be removed adds nothing to the error.
                let _ = fs::remove_file(path);
            }
            lock::release(&file);
        }
        result
    }
}

/// Makes an empty file an image, and checks that another one is what is wanted.
fn fill(
    file: &FileStorage,
    format: Format,
    capacity: u64,
    backing: Option<&NewBacking>,
) -> Result<()> {
    let failed = |source| Error::whole(&file.path, "make the image", source);
    if file.refresh_size().map_err(failed)? > 0 {
        return check_same(file, format, capacity, backing);
    }
    match format {
        Format::Raw => {
            rustix::fs::ftruncate(&file.file, capacity).map_err(|error| failed(error.into()))?;
        }
        Format::Qcow2 => {
            let mut builder = Qcow2::<FileStorage>::create_builder(file.clone()).size(capacity);
            if let Some(backing) = backing {
                chain::resolve(&file.path, &backing.name)?;
                builder = builder.backing(backing.name.clone(), backing.format.to_string());
            }
            builder.create().map_err(failed)?;
        }
    }
    file.0.sync().map_err(failed)?;
    file.refresh_size().map_err(failed)?;
    Ok(())
}

fn check_same(
    file: &FileStorage,
    format: Format,
    capacity: u64,
    backing: Option<&NewBacking>,
) -> Result<()> {
    let other = |reason: String| {
        Err(Error::Exists {
            path: file.path.clone(),
            reason,
        })
    };
    let found = probe::recognise_file(file)?;
    match (format, found) {
        (Format::Raw, None) | (Format::Qcow2, Some("qcow2")) => {}
        (_, found) => {
            let found = found.unwrap_or("raw");
            return other(format!(
                "there is something else: it looks like a {found} file"
            ));
        }
    }
    let layer = Layer::new(file.clone(), Some(format))?;
    if layer.capacity() != capacity {
        return other(format!(
            "there is an image of {} bytes, not {capacity}",
            layer.capacity()
        ));
    }
    let recorded = layer
        .header
        .as_ref()
        .and_then(|header| header.backing.as_deref());
    match (recorded, backing.map(|backing| backing.name.as_str())) {
        (recorded, wanted) if recorded == wanted => Ok(()),
        (recorded, wanted) => {
            let or_none = |name: Option<&str>| name.unwrap_or("none").to_owned();
            let (recorded, wanted) = (or_none(recorded), or_none(wanted));
            other(format!(
                "there is an image with the backing file {recorded}, not {wanted}"
            ))
        }
    }
}

/// Makes durable which files the directory of `path` has, and their names.
pub fn sync_directory(path: &Path) -> Result<()> {
    let directory = directory(path);
    let synced = fs::File::open(directory).and_then(|directory| directory.sync_all());
    match synced {
        // The file system has no such thing.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        synced => synced.map_err(|source| Error::whole(directory, "flush the directory", source)),
    }
}

/// The directory that a file is in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Bytes that an unprivileged user can still write to the file system that holds `path`, which
/// need not exist yet.
pub fn free_space(path: &Path) -> Result<u64> {
    let stat = match rustix::fs::statvfs(path) {
        Err(rustix::io::Errno::NOENT) => rustix::fs::statvfs(directory(path)),
        result => result,
    };
    let stat = stat.map_err(|source| Error::whole(path, "ask for free space", source))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
