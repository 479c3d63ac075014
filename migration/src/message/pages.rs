//! PAGES and ZERO.

use crate::codec::{DecodeError, Reader};
use crate::frame::{MAX_PAGES, MAX_ZERO_RUNS};
use crate::layout::PAGE_SIZE;

/// A run of guest physical memory on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRun {
    /// The guest physical address, in bytes.
    pub address: u64,
    /// How many pages.
    pub pages: u64,
}

/// The body of a PAGES frame, which is built in place: the runs, then a CRC32 for each page, or none
/// at all if [`UNCHECKED`](super::UNCHECKED) was picked.
pub fn encode_pages(runs: &[AddressRun], crcs: &[u32], out: &mut Vec<u8>) {
    out.clear();
    put_pages(runs, crcs, out);
}

/// What the body of a frame with pages begins with: the runs, then the checksums.
pub(super) fn put_pages(runs: &[AddressRun], crcs: &[u32], out: &mut Vec<u8>) {
    out.extend((runs.len() as u32).to_le_bytes());
    for run in runs {
        out.extend(run.address.to_le_bytes());
        out.extend((run.pages as u32).to_le_bytes());
    }
    for crc in crcs {
        out.extend(crc.to_le_bytes());
    }
}

/// Decodes a PAGES body into `runs` and `crcs`, which are cleared first; `payload_len` is that of
/// the header and must fit. `crcs` stays empty if the pages are not `checked`.
pub fn decode_pages(
    body: &[u8],
    payload_len: u32,
    checked: bool,
    runs: &mut Vec<AddressRun>,
    crcs: &mut Vec<u32>,
) -> Result<(), DecodeError> {
    let mut reader = Reader::new(body);
    let pages = take_pages(&mut reader, checked, runs, crcs)?;
    if u64::from(payload_len) != pages * PAGE_SIZE {
        return Err(DecodeError::Payload {
            pages,
            len: payload_len,
        });
    }
    reader.end()
}

/// Takes what [`put_pages`] writes; returns how many pages.
pub(super) fn take_pages(
    reader: &mut Reader<'_>,
    checked: bool,
    runs: &mut Vec<AddressRun>,
    crcs: &mut Vec<u32>,
) -> Result<u64, DecodeError> {
    runs.clear();
    crcs.clear();
    let count = reader.count_u32("runs", MAX_PAGES as usize)?;
    let mut pages = 0;
    for _ in 0..count {
        let run = AddressRun {
            address: reader.u64()?,
            pages: u64::from(reader.u32()?),
        };
        if run.pages == 0 {
            return Err(DecodeError::EmptyRun(run.address));
        }
        pages += run.pages;
        DecodeError::within("pages", pages, MAX_PAGES)?;
        runs.push(run);
    }
    if checked {
        for _ in 0..pages {
            crcs.push(reader.u32()?);
        }
    }
    Ok(pages)
}

/// The body of a ZERO frame.
pub fn encode_zero(runs: &[AddressRun], out: &mut Vec<u8>) {
    out.clear();
    out.extend((runs.len() as u32).to_le_bytes());
    for run in runs {
        out.extend(run.address.to_le_bytes());
        out.extend(run.pages.to_le_bytes());
    }
}

/// Decodes a ZERO body into `runs`, which is cleared first.
pub fn decode_zero(body: &[u8], runs: &mut Vec<AddressRun>) -> Result<(), DecodeError> {
    runs.clear();
    let mut reader = Reader::new(body);
    let count = reader.count_u32("runs", MAX_ZERO_RUNS)?;
    for _ in 0..count {
        let run = AddressRun {
            address: reader.u64()?,
            pages: reader.u64()?,
        };
        if run.pages == 0 {
            return Err(DecodeError::EmptyRun(run.address));
        }
        runs.push(run);
    }
    reader.end()
}
