//! What the engine asks of the disks whose contents travel with a guest: `migrate -b` and
//! `migrate -i`. Image formats, backing files, and whether all of a disk travels or only what is
//! above its backing file are the machine's business; so is what the configuration says of them.

use crate::bitmap::BlockBitmap;
use crate::vm::VmError;

/// The size in bytes of the blocks in which writes to a disk are logged: 64 KiB. The last block of
/// a disk may be shorter.
pub const BLOCK_SIZE: u64 = 64 << 10;

/// The size in bytes of a sector: every offset and length on a disk is a multiple of it.
pub const SECTOR_SIZE: u64 = 512;

/// A disk that travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its name, of 1 to 64 printable ASCII characters, once in an offer.
    pub name: String,
    /// Its size in bytes, as the guest sees it: a multiple of [`SECTOR_SIZE`], not 0.
    pub capacity: u64,
}

impl Disk {
    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        self.capacity.div_ceil(BLOCK_SIZE)
    }
}

/// What is in a part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, to be read. It may turn out to be zeroes.
    Data,
    /// Zeroes, known without reading.
    Zero,
    /// Nothing that travels: the destination has it already (it is below the overlay), and the
    /// guest has not written to it.
    Absent,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// What is in it.
    pub kind: ExtentKind,
    /// Its length in bytes: a multiple of [`SECTOR_SIZE`], not 0. May go past the disk's end.
    pub len: u64,
}

/// A disk of the guest that leaves, which goes on writing to it. Never written by the engine.
///
/// Called from two threads: one reads ahead, the other handles the log. After a migration that
/// failed while a read hung, the reading thread keeps the disk until that read ends.
pub trait SourceDisk: Send + Sync {
    /// Starts to log writes, of which none is logged yet.
    ///
    /// A write, a discard or a write of zeroes is logged after it has changed what
    /// [`read`](Self::read) returns and before the guest is told that it is done. So one that a
    /// read has missed, wholly or in part, is seen by a later [`harvest_dirty`](Self::harvest_dirty).
    fn start_log(&self) -> Result<(), VmError>;

    /// Moves the log into `dirty`: adds to it the blocks written since the last harvest, and
    /// forgets them. The engine reads a block only afterwards, so that a write in between is
    /// caught by the next harvest.
    fn harvest_dirty(&self, dirty: &mut BlockBitmap);

    /// Ends logging; called once for every successful start, however the migration ended.
    fn stop_log(&self);

    /// What is at `offset`, and for how many bytes. What the guest writes after the start of the
    /// log may be told as it was or as it is.
    fn extent(&self, offset: u64) -> Result<Extent, VmError>;

    /// Reads what the guest would read there, from its backing file too; the range is within the
    /// disk.
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), VmError>;
}

/// A disk of the guest that arrives. Fresh, it reads as zeroes, or as its backing file.
///
/// Every part of it is written, zeroed or told as absent once, in ascending order; then parts are
/// written or zeroed again, in any order. What is neither written nor zeroed must stay as it is.
pub trait DestinationDisk: Send {
    /// Writes; the range is within the disk. Better begins to write back at once than to leave
    /// all of it to [`flush`](Self::flush).
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), VmError>;

    /// Makes the range read as zeroes: a hole, where the format has holes; nothing to do where it
    /// does so already.
    fn zero(&mut self, offset: u64, len: u64) -> Result<(), VmError>;

    /// Returns when all that was written would survive the host's crash.
    fn flush(&mut self) -> Result<(), VmError>;
}
