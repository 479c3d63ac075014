//! An image and the backing files under it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use super::file::HostFile;
use super::header::Qcow2Header;
use super::lock::{self, Use};
use super::probe;
use super::storage::FileStorage;
use super::{Cache, Error, Format, Result};

/// More layers than anyone stacks; a chain that loops ends here.
const MAX_LAYERS: usize = 64;

/// One file of a chain.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) file: FileStorage,
    pub(super) format: Format,
    /// For qcow2.
    pub(super) header: Option<Qcow2Header>,
}

impl Layer {
    pub(super) fn new(file: FileStorage, format: Option<Format>) -> Result<Self> {
        let format = match format {
            Some(format) => format,
            None => probe::probe(&file)?,
        };
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(Qcow2Header::read(&file)?),
        };
        Ok(Layer {
            file,
            format,
            header,
        })
    }

    /// Size of the disk in bytes. A raw file is taken for whole sectors, as QEMU does: what it
    /// lacks of the last one reads as zeroes, and a write there completes it.
    pub(super) fn capacity(&self) -> u64 {
        match &self.header {
            Some(header) => header.capacity,
            None => self.file.size().next_multiple_of(512),
        }
    }
}

/// Opens the files under `top`, each for reading only, and returns the whole chain, `top` first.
pub(super) fn open_backing(top: Layer, cache: Cache) -> Result<Vec<Layer>> {
    let mut layers = vec![top];
    while let Some(above) = layers.last()
        && let Some((path, format)) = backing_of(above)?
    {
        let failed = |source| Error::Backing {
            path: above.file.path.clone(),
            source: Box::new(source),
        };
        if layers.len() >= MAX_LAYERS {
            let reason = format!("is file {MAX_LAYERS} below the image: the chain probably loops");
            return Err(failed(Error::format(&path, reason)));
        }
        let file = HostFile::open(&path, false, cache, false).map_err(failed)?;
        let file = FileStorage(Arc::new(file));
        let layer = match format {
            Some(format) => Layer::new(file, Some(format)),
            None => unrecorded(file),
        };
        layers.push(layer.map_err(failed)?);
    }
    Ok(layers)
}

/// Path and recorded format of a layer's backing file, if it has one.
fn backing_of(layer: &Layer) -> Result<Option<(PathBuf, Option<Format>)>> {
    let Some(header) = &layer.header else {
        return Ok(None);
    };
    let Some(name) = &header.backing else {
        return Ok(None);
    };
    let image = &layer.file.path;
    let format = match header.backing_format.as_deref() {
        None | Some("") => None,
        Some("raw" | "file" | "host_device") => Some(Format::Raw),
        Some("qcow2") => Some(Format::Qcow2),
        Some(other) => {
            let reason =
                format!("has a backing file of format {other:?}; raw and qcow2 are supported");
            return Err(Error::format(image, reason));
        }
    };
    Ok(Some((resolve(image, name)?, format)))
}

/// A backing file is looked for where the image that names it is, not where the process runs.
pub(super) fn resolve(image: &Path, name: &str) -> Result<PathBuf> {
    let local = name.strip_prefix("file:").unwrap_or(name);
    // As QEMU does: a colon before the first slash is that of a protocol.
    let protocol = local
        .split('/')
        .next()
        .is_some_and(|first| first.contains(':'));
    if protocol || local.is_empty() {
        let reason = format!("has the backing file {name:?}; only files are supported");
        return Err(Error::format(image, reason));
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(local))
}

/// A backing file whose format is not recorded is raw, and must look like it: a guest that once
/// had it as its raw disk could have written a header into it that names any file of the host as
/// its backing file.
fn unrecorded(file: FileStorage) -> Result<Layer> {
    let layer = Layer::new(file, Some(Format::Raw))?;
    if let Some(name) = probe::recognise_file(&layer.file)? {
        let reason = format!(
            "looks like a {name} image, but its format is not recorded in the image above it; if it is right, \
             record it with `qemu-img rebase -u -b FILE -F {name} IMAGE`"
        );
        return Err(Error::format(&layer.file.path, reason));
    }
    Ok(layer)
}

/// Reads the metadata of the whole chain; none if the top is raw, which needs no imago.
pub(super) fn load(layers: &[Layer], writable: bool) -> Result<Option<FormatAccess<FileStorage>>> {
    if layers.first().is_none_or(|top| top.format == Format::Raw) {
        return Ok(None);
    }
    let mut below = None;
    for (n, layer) in layers.iter().enumerate().rev() {
        let failed = |source| Error::whole(&layer.file.path, "read the image's metadata", source);
        let file = layer.file.clone();
        let gate = DenyImplicitOpenGate::default();
        let access = match layer.format {
            Format::Raw => FormatAccess::new(Raw::builder(file).open(gate).map_err(failed)?),
            Format::Qcow2 => {
                let qcow2 = Qcow2::builder(file)
                    .write(writable && n == 0)
                    .backing(below);
                layer.file.hide_dirty(true);
                let opened = qcow2.open(gate);
                layer.file.hide_dirty(false);
                FormatAccess::new(opened.map_err(failed)?)
            }
        };
        below = Some(access);
    }
    Ok(below)
}

/// Locks all files, or none.
pub(super) fn lock(layers: &[Layer], writable: bool) -> Result<()> {
    for (n, layer) in layers.iter().enumerate() {
        let usage = if writable && n == 0 {
            Use::of(layer.format)
        } else {
            Use::Read
        };
        if let Err(error) = lock::acquire(&layer.file, usage) {
            unlock(layers.get(..n).unwrap_or_default());
            return Err(error);
        }
    }
    Ok(())
}

/// Frees the locks of all files.
pub(super) fn unlock(layers: &[Layer]) {
    layers.iter().for_each(|layer| lock::release(&layer.file));
}
