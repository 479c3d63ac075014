//! What a driver reads about the disk (section 5.2.4).

use super::SECTOR;

/// The most buffers of a request beside its header and status: those of a queue.
pub(super) const SEGMENTS: u32 = super::QUEUE_SIZE as u32 - 2;
/// The most bytes of one discard or write-zeroes, in sectors: 1 GiB.
pub(super) const MOST_SECTORS: u32 = 1 << 21;
/// The most ranges of one discard or write-zeroes.
pub(super) const MOST_RANGES: u32 = 64;
/// What discards are best aligned to, in sectors: the clusters of qcow2, and a multiple of what
/// file systems have.
const DISCARD_ALIGN: u32 = 128;
/// Where the driver may choose whether writes are durable when they are done.
pub(super) const WRITEBACK: u64 = 32;

/// The configuration space.
pub(super) fn space(capacity: u64, writeback: bool) -> [u8; 60] {
    let mut space = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = space.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &(capacity / SECTOR).to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Physical blocks of 4096 bytes, as an exponent of logical ones, and the best size of an I/O.
    put(24, &[3]);
    put(26, &8u16.to_le_bytes());
    put(WRITEBACK as usize, &[writeback.into()]);
    put(36, &MOST_SECTORS.to_le_bytes());
    put(40, &MOST_RANGES.to_le_bytes());
    put(44, &DISCARD_ALIGN.to_le_bytes());
    put(48, &MOST_SECTORS.to_le_bytes());
    put(52, &MOST_RANGES.to_le_bytes());
    put(56, &[1]); // Write-zeroes may unmap.
    space
}
