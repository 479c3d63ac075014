//! Where a disk has data, for copies that skip what they need not read.

use std::io;

use imago::{FormatAccess, Mapping, ShallowMapping};

use super::storage::FileStorage;
use super::{Error, Image, Result};

/// What a part of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data; it may still be zero.
    Data,
    /// Reads as zeroes.
    Zero,
    /// Not in the image itself: it comes from the backing file.
    Absent,
}

/// A part of a disk that is all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// What it holds.
    pub kind: ExtentKind,
    /// How long it is, in bytes, at least 1. What follows may be of the same kind.
    pub len: u64,
}

/// Which files a question is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The image alone: what it does not have is [`ExtentKind::Absent`].
    Image,
    /// With its backing files: nothing is absent.
    Chain,
}

impl Image {
    /// What the disk holds at `offset`, and for how long, up to `max` bytes (at least 1). The
    /// answer holds until something is written or discarded there.
    pub fn extent(&self, offset: u64, max: u64, scope: Scope) -> Result<Extent> {
        let op = "map";
        self.check_range(op, offset, max)?;
        if max == 0 {
            let capacity = self.capacity;
            return Err(Error::OutOfRange {
                path: self.path.clone(),
                op,
                offset,
                len: max,
                capacity,
            });
        }
        let file = &self.top()?.file;
        let extent = match &self.state().qcow2 {
            None => data_or_hole(file, offset, max),
            Some(qcow2) if scope == Scope::Chain => map_chain(qcow2, offset, max),
            Some(qcow2) => map_image(qcow2, offset, max),
        };
        match extent {
            // Who asks goes on by what it gets: nothing would be an endless loop.
            Ok(extent) if extent.len > 0 => Ok(extent),
            Ok(_) => Err(self.failed(op, offset, max, io::ErrorKind::InvalidData.into())),
            Err(source) => Err(self.failed(op, offset, max, source)),
        }
    }
}

fn map_chain(qcow2: &FormatAccess<FileStorage>, offset: u64, max: u64) -> io::Result<Extent> {
    let (mapping, len) = qcow2.get_mapping(offset, max)?;
    let kind = match mapping {
        Mapping::Raw {
            storage,
            offset: at,
            ..
        } => return data_or_hole(storage, at, len),
        Mapping::Zero { .. } => ExtentKind::Zero,
        _ => ExtentKind::Data,
    };
    Ok(Extent { kind, len })
}

fn map_image(qcow2: &FormatAccess<FileStorage>, offset: u64, max: u64) -> io::Result<Extent> {
    let (mapping, len) = qcow2.get_shallow_mapping(offset, max)?;
    let kind = match mapping {
        ShallowMapping::Raw {
            storage,
            offset: at,
            ..
        } => return data_or_hole(storage, at, len),
        ShallowMapping::Zero { .. } => ExtentKind::Zero,
        ShallowMapping::Indirect { .. } => ExtentKind::Absent,
        _ => ExtentKind::Data,
    };
    Ok(Extent { kind, len })
}

/// Data that the file has no space for is zero: never written, preallocated, or punched out.
fn data_or_hole(file: &FileStorage, offset: u64, max: u64) -> io::Result<Extent> {
    let (data, len) = file.is_data(offset, max)?;
    let kind = if data {
        ExtentKind::Data
    } else {
        ExtentKind::Zero
    };
    Ok(Extent { kind, len })
}
