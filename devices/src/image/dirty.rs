//! The dirty bit of a qcow2 image: its reference counts may be wrong.
//!
//! imago keeps new reference counts in memory until the image is flushed. A process that is killed
//! before that leaves them behind the tables that refer to the clusters, and whoever writes next
//! would take clusters that are in use. So the bit is set as long as the image may be written, as
//! QEMU does with lazy reference counts; the counts of an image that still has it when it is locked
//! are repaired first (see `refcounts`). Images of version 2 have no such bit.

use std::io::IoSliceMut;

use imago::StorageExt;

use super::storage::FileStorage;
use super::{Error, Result, header};

/// The incompatible features, from version 3 on: a big-endian number.
const FEATURES: u64 = 72;
/// Where its lowest byte is, and the bit in it.
const LOWEST: u64 = 79;
const DIRTY: u8 = 1;

/// Whether an image has the bit set.
pub(super) fn is_dirty(file: &FileStorage) -> Result<bool> {
    Ok(has_features(file)? && lowest(file)? & DIRTY != 0)
}

/// Sets the bit or clears it.
pub(super) fn set_dirty(file: &FileStorage, dirty: bool) -> Result<()> {
    if !has_features(file)? {
        return Ok(());
    }
    let lowest = lowest(file)?;
    let wanted = if dirty {
        lowest | DIRTY
    } else {
        lowest & !DIRTY
    };
    if wanted == lowest {
        return Ok(());
    }
    let op = "mark the image as being written";
    StorageExt::write(file, [wanted].as_slice(), LOWEST)
        .map_err(|source| Error::whole(&file.path, op, source))
}

/// Whether an image of this version can have the bit.
pub(super) fn has_features(file: &FileStorage) -> Result<bool> {
    let version = header::read(file, 4, 4)?;
    Ok(version.last().is_some_and(|version| *version >= 3))
}

fn lowest(file: &FileStorage) -> Result<u8> {
    let features = header::read(file, FEATURES, 8)?;
    Ok(features.last().copied().unwrap_or_default())
}

/// Takes the bit out of what was read at `offset`: imago opens no image that has it.
pub(super) fn hide(bufs: &mut [IoSliceMut<'_>], offset: u64) {
    let Some(mut at) = LOWEST.checked_sub(offset) else {
        return;
    };
    for buf in bufs {
        match usize::try_from(at).ok().and_then(|at| buf.get_mut(at)) {
            Some(byte) => {
                *byte &= !DIRTY;
                return;
            }
            None => at -= buf.len() as u64,
        }
    }
}
