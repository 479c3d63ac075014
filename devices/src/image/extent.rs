//! Where a disk has data, for copies that skip what they need not read.

use std::io;

use imago::{Mapping, ShallowMapping};

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
        let extent = self.map(offset, max, scope);
        let extent = extent.map_err(|source| self.failed(op, offset, max, source))??;
        // Nothing must come to nothing: who asks goes on by what it gets.
        match extent.len {
            0 => Err(self.failed(op, offset, max, io::ErrorKind::InvalidData.into())),
            _ => Ok(extent),
        }
    }

    fn map(&self, offset: u64, max: u64, scope: Scope) -> io::Result<Result<Extent>> {
        let state = self.state();
        let Some(qcow2) = &state.qcow2 else {
            let file = match self.top() {
                Ok(top) => &top.file,
                Err(error) => return Ok(Err(error)),
            };
            let (data, len) = file.is_data(offset, max)?;
            return Ok(Ok(Extent {
                kind: kind(data),
                len,
            }));
        };
        // Data that the file has no space for is zero: preallocated, or punched out.
        let extent = if scope == Scope::Chain {
            match qcow2.get_mapping(offset, max)? {
                (
                    Mapping::Raw {
                        storage,
                        offset: at,
                        ..
                    },
                    len,
                ) => {
                    let (data, len) = storage.is_data(at, len)?;
                    Extent {
                        kind: kind(data),
                        len,
                    }
                }
                (Mapping::Zero { .. }, len) => Extent {
                    kind: ExtentKind::Zero,
                    len,
                },
                (_, len) => Extent {
                    kind: ExtentKind::Data,
                    len,
                },
            }
        } else {
            match qcow2.get_shallow_mapping(offset, max)? {
                (
                    ShallowMapping::Raw {
                        storage,
                        offset: at,
                        ..
                    },
                    len,
                ) => {
                    let (data, len) = storage.is_data(at, len)?;
                    Extent {
                        kind: kind(data),
                        len,
                    }
                }
                (ShallowMapping::Zero { .. }, len) => Extent {
                    kind: ExtentKind::Zero,
                    len,
                },
                (ShallowMapping::Indirect { .. }, len) => Extent {
                    kind: ExtentKind::Absent,
                    len,
                },
                (_, len) => Extent {
                    kind: ExtentKind::Data,
                    len,
                },
            }
        };
        Ok(Ok(extent))
    }
}

fn kind(data: bool) -> ExtentKind {
    if data {
        ExtentKind::Data
    } else {
        ExtentKind::Zero
    }
}
