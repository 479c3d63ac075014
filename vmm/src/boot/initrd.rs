//! The initrd: where it goes, and loading it.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;

use migration::layout::{GuestRam, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;

/// The place for an initrd: as high as possible below `limit`, at a page's start, and not below
/// `kernel_end`.
pub(super) fn place(mut file: &File, kernel_end: u64, limit: u64) -> Result<Range<u64>, BootError> {
    let len = file.seek(SeekFrom::End(0)).map_err(BootError::ReadInitrd)?;
    if len == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let start = limit.checked_sub(len).map(|start| start & !(PAGE_SIZE - 1));
    match start {
        Some(start) if start >= kernel_end => Ok(start..start + len),
        _ => Err(BootError::InitrdPlace {
            len,
            from: kernel_end,
            to: limit,
        }),
    }
}

/// Reads the file to its place.
pub(super) fn load(ram: &GuestRam, mut file: &File, range: &Range<u64>) -> Result<(), BootError> {
    file.seek(SeekFrom::Start(0))
        .map_err(BootError::ReadInitrd)?;
    let len = (range.end - range.start) as usize;
    ram.read_exact_volatile_from(GuestAddress(range.start), &mut file, len)
        .map_err(|reason| BootError::Load {
            what: "the initrd",
            addr: range.start,
            reason,
        })
}
