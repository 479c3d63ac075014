//! The disks in HELLO, and BLOCKS.

use crate::codec::{DecodeError, Reader, put_name};
use crate::disk::{BLOCK_SIZE, Disk, SECTOR_SIZE};
use crate::frame::{MAX_BLOCK_DATA, MAX_BLOCK_RUNS};

/// The most disks in a HELLO.
pub const MAX_DISKS: usize = 64;

/// The most bytes of a disk: 256 TiB.
pub const MAX_DISK: u64 = 1 << 48;

pub(super) fn put_disks(disks: &[Disk], out: &mut Vec<u8>) -> Result<(), DecodeError> {
    DecodeError::within("disks", disks.len() as u64, MAX_DISKS as u64)?;
    check(disks)?;
    out.extend((BLOCK_SIZE as u32).to_le_bytes());
    out.extend((disks.len() as u16).to_le_bytes());
    for disk in disks {
        put_name(&disk.name, out)?;
        out.extend(disk.capacity.to_le_bytes());
    }
    Ok(())
}

pub(super) fn take_disks(reader: &mut Reader<'_>) -> Result<Vec<Disk>, DecodeError> {
    let block_size = reader.u32()?;
    if u64::from(block_size) != BLOCK_SIZE {
        return Err(DecodeError::BlockSize(block_size));
    }
    let count = reader.count_u16("disks", MAX_DISKS)?;
    let disks = (0..count)
        .map(|_| {
            Ok(Disk {
                name: reader.name()?,
                capacity: reader.u64()?,
            })
        })
        .collect::<Result<Vec<_>, DecodeError>>()?;
    check(&disks)?;
    Ok(disks)
}

fn check(disks: &[Disk]) -> Result<(), DecodeError> {
    for (index, disk) in disks.iter().enumerate() {
        if !(SECTOR_SIZE..=MAX_DISK).contains(&disk.capacity)
            || !disk.capacity.is_multiple_of(SECTOR_SIZE)
        {
            return Err(DecodeError::Capacity {
                name: disk.name.clone(),
                capacity: disk.capacity,
            });
        }
        if disks
            .iter()
            .take(index)
            .any(|other| other.name == disk.name)
        {
            return Err(DecodeError::DuplicateDisk(disk.name.clone()));
        }
    }
    Ok(())
}

/// What a part of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Data, which is in the payload, with its CRC32.
    Data(u32),
    /// Zeroes.
    Zero,
    /// Nothing that travels.
    Absent,
}

/// A part of a disk on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// What it holds.
    pub kind: RunKind,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length in bytes; at most a block of data.
    pub len: u64,
}

impl BlockRun {
    /// Where it ends, in bytes.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// The bytes of it in the payload.
    pub fn data_len(&self) -> u64 {
        match self.kind {
            RunKind::Data(_) => self.len,
            RunKind::Zero | RunKind::Absent => 0,
        }
    }
}

/// The body of a BLOCKS frame, which is built in place: the disk's index in the HELLO, then the
/// runs.
pub fn encode_blocks(disk: u16, runs: &[BlockRun], out: &mut Vec<u8>) {
    out.clear();
    out.extend(disk.to_le_bytes());
    out.extend((runs.len() as u32).to_le_bytes());
    for run in runs {
        let (kind, crc) = match run.kind {
            RunKind::Data(crc) => (0u8, crc),
            RunKind::Zero => (1, 0),
            RunKind::Absent => (2, 0),
        };
        out.push(kind);
        out.extend(run.offset.to_le_bytes());
        out.extend(run.len.to_le_bytes());
        out.extend(crc.to_le_bytes());
    }
}

/// Decodes a BLOCKS body into `runs`, which is cleared first, and the disk's index; `payload_len`
/// is that of the header and must fit.
pub fn decode_blocks(
    body: &[u8],
    payload_len: u32,
    runs: &mut Vec<BlockRun>,
) -> Result<u16, DecodeError> {
    runs.clear();
    let mut reader = Reader::new(body);
    let disk = reader.u16()?;
    let count = reader.count_u32("parts of a disk", MAX_BLOCK_RUNS)?;
    let mut data = 0;
    for _ in 0..count {
        let [kind] = reader.array()?;
        let (offset, len, crc) = (reader.u64()?, reader.u64()?, reader.u32()?);
        let malformed = DecodeError::BlockRun { kind, offset, len };
        let (kind, longest) = match (kind, crc) {
            (0, crc) => (RunKind::Data(crc), BLOCK_SIZE),
            (1, 0) => (RunKind::Zero, MAX_DISK),
            (2, 0) => (RunKind::Absent, MAX_DISK),
            _ => return Err(malformed),
        };
        let run = BlockRun { kind, offset, len };
        if !(SECTOR_SIZE..=longest).contains(&len)
            || !len.is_multiple_of(SECTOR_SIZE)
            || !offset.is_multiple_of(SECTOR_SIZE)
            || offset > MAX_DISK - len
        {
            return Err(malformed);
        }
        data += run.data_len();
        DecodeError::within("bytes of a disk", data, MAX_BLOCK_DATA as u64)?;
        runs.push(run);
    }
    if u64::from(payload_len) != data {
        return Err(DecodeError::BlockPayload {
            stated: data,
            len: payload_len,
        });
    }
    reader.end()?;
    Ok(disk)
}
