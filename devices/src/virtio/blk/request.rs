//! A request of the driver's, decoded and carried out (section 5.2.6).

use crate::disk::Disk;
use crate::image;
use crate::virtio::GuestRam;
use crate::virtio::chain::Chain;

use super::config::{MOST_RANGES, MOST_SECTORS};
use super::guest_slices::guest_slices;
use super::{SECTOR, SERIAL_LEN};

/// What is done to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Makes what was written durable.
    Flush,
    /// Asks for the serial number.
    GetId,
    /// Forgets ranges.
    Discard,
    /// Writes zeroes to ranges.
    WriteZeroes,
}

impl Operation {
    /// As QEMU's events call it: all that is no read is a write.
    pub fn event_name(self) -> &'static str {
        match self {
            Self::Read | Self::GetId => "read",
            Self::Write | Self::Flush | Self::Discard | Self::WriteZeroes => "write",
        }
    }
}

/// The status that the driver gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request, checked as far as it can be without carrying it out.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) chain: Chain,
    /// `None` for a type that isn't known.
    pub(super) operation: Option<Operation>,
    /// In sectors.
    sector: u64,
}

/// Why a request can't be answered, not even with an error.
#[derive(Debug, thiserror::Error)]
pub(super) enum Malformed {
    #[error("a request has a header of {0} bytes, less than 16")]
    Header(u64),
    #[error("a request has no room for its status")]
    Status,
}

/// How carrying out a request failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) operation: Operation,
    pub(super) error: image::Error,
}

const HEADER: u64 = 16;
/// The bytes that describe a range to be discarded or zeroed.
const RANGE: u64 = 16;
/// The one flag of such a range.
const UNMAP: u32 = 1;

impl Request {
    pub(super) fn decode(memory: &GuestRam, chain: Chain) -> Result<Self, Malformed> {
        let mut header = [0; HEADER as usize];
        if chain.read(memory, 0, &mut header) < header.len() {
            return Err(Malformed::Header(chain.readable_len()));
        }
        if chain.writable_len() == 0 {
            return Err(Malformed::Status);
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let operation = match u32::from_le_bytes([t0, t1, t2, t3]) {
            0 => Some(Operation::Read),
            1 => Some(Operation::Write),
            4 => Some(Operation::Flush),
            8 => Some(Operation::GetId),
            11 => Some(Operation::Discard),
            13 => Some(Operation::WriteZeroes),
            _ => None,
        };
        Ok(Self {
            chain,
            operation,
            sector: u64::from_le_bytes(sector),
        })
    }

    /// Does what it asks for. `Ok` has the status, and how many bytes of data were written to the
    /// guest.
    pub(super) fn execute(
        &self,
        disk: &Disk,
        serial: &[u8; SERIAL_LEN],
        memory: &GuestRam,
        writeback: bool,
    ) -> Result<(Status, u32), Failure> {
        let Some(operation) = self.operation else {
            return Ok((Status::Unsupported, 0));
        };
        let failed = |error| Failure { operation, error };
        let image = disk.image();
        if image.readonly() && operation.event_name() == "write" && operation != Operation::Flush {
            return Ok((Status::IoError, 0));
        }
        let done = match operation {
            Operation::Read => self.read(disk, memory),
            Operation::Write => self.write(disk, memory),
            Operation::Flush => image.flush().map(|()| (Status::Ok, 0)),
            Operation::GetId => {
                // All but the status.
                let room = (self.chain.writable_len() - 1).min(SERIAL_LEN as u64) as usize;
                let id = serial.get(..room).unwrap_or_default();
                Ok((Status::Ok, self.chain.write(memory, 0, id) as u32))
            }
            Operation::Discard | Operation::WriteZeroes => self.ranges(operation, disk, memory),
        }
        .map_err(failed)?;
        if !writeback && operation != Operation::Read && done.0 == Status::Ok {
            image.flush().map_err(failed)?;
        }
        Ok(done)
    }

    /// The place on the disk of `len` bytes from `sector` on; `None` if it isn't on it, or not
    /// made of whole sectors.
    fn place(disk: &Disk, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= disk.image().capacity()).then_some(offset)
    }

    fn read(&self, disk: &Disk, memory: &GuestRam) -> image::Result<(Status, u32)> {
        let len = self.chain.writable_len() - 1;
        let Some(offset) = Self::place(disk, self.sector, len) else {
            return Ok((Status::IoError, 0));
        };
        let mut slices = guest_slices(memory, &self.chain.writable, 0, len);
        let result = disk.image().read_at(&mut slices.filled_by_host(), offset);
        // Also after an error: it may have come in the middle.
        slices.filled();
        result.map(|()| (Status::Ok, len as u32))
    }

    fn write(&self, disk: &Disk, memory: &GuestRam) -> image::Result<(Status, u32)> {
        let len = self.chain.readable_len() - HEADER;
        let Some(offset) = Self::place(disk, self.sector, len) else {
            return Ok((Status::IoError, 0));
        };
        let slices = guest_slices(memory, &self.chain.readable, HEADER, len);
        debug_assert_eq!(slices.len(), len);
        let result = disk.image().write_at(&slices.read_by_host(), offset);
        disk.written(offset, len);
        result.map(|()| (Status::Ok, 0))
    }

    /// Discards or zeroes every range that the driver names, after a look at all of them.
    fn ranges(
        &self,
        operation: Operation,
        disk: &Disk,
        memory: &GuestRam,
    ) -> image::Result<(Status, u32)> {
        let bytes = self.chain.readable_len() - HEADER;
        let count = bytes / RANGE;
        if count == 0 || !bytes.is_multiple_of(RANGE) || count > u64::from(MOST_RANGES) {
            return Ok((Status::IoError, 0));
        }
        let mut ranges = Vec::new();
        for index in 0..count {
            let mut range = [0; RANGE as usize];
            self.chain.read(memory, HEADER + index * RANGE, &mut range);
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            let unmap = flags & UNMAP != 0;
            if flags & !UNMAP != 0 || unmap && operation == Operation::Discard {
                return Ok((Status::Unsupported, 0));
            }
            let len = u64::from(sectors) * SECTOR;
            match Self::place(disk, sector, len) {
                Some(offset) if sectors <= MOST_SECTORS => ranges.push((offset, len, unmap)),
                _ => return Ok((Status::IoError, 0)),
            }
        }
        for (offset, len, unmap) in ranges {
            let result = match operation {
                Operation::Discard => disk.image().discard(offset, len),
                _ => disk.image().write_zeroes(offset, len, unmap),
            };
            disk.written(offset, len);
            result?;
        }
        Ok((Status::Ok, 0))
    }
}
