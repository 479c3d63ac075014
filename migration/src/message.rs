//! The bodies of the frames: typed, explicit little-endian, every count and length bounded before
//! it is believed. See docs/protocol.md.

mod bits;
mod disks;
mod encoded;

pub(crate) use self::bits::MAX_BIT_PAGES;
pub use self::bits::{decode_bits, encode_bits};
pub use self::disks::{BlockRun, MAX_DISK, MAX_DISKS, RunKind, decode_blocks, encode_blocks};
pub use self::encoded::{Compressed, Differences};

use self::disks::{put_disks, take_disks};
use crate::codec::{DecodeError, Reader, put_name};
use crate::frame::{MAX_CHUNK, MAX_PAGES, MAX_REASON, MAX_SECTION, MAX_ZERO_RUNS};
use crate::layout::{Layout, MAX_REGIONS, PAGE_SIZE, Region};
use crate::protocol::{NEWEST_VERSION, OLDEST_VERSION};
use crate::section::Section;
use crate::vm::{Blob, Offer};

/// What a migration begins with, so that a stranger is told from a source. Fixed for all versions.
pub const MAGIC: [u8; 8] = *b"\x89FERRY\r\n";

/// The length of the [`Preamble`] in bytes.
pub const PREAMBLE_LEN: usize = 16;

/// The most configuration sections in a HELLO.
pub const MAX_CONFIGURATION: usize = 256;

/// The most blobs in a HELLO.
pub const MAX_BLOBS: usize = 16;

/// The most bytes in a blob: 2 GiB.
pub const MAX_BLOB: u64 = 2 << 30;

/// A migration's identifier, random.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id(pub [u8; 16]);

impl std::fmt::Debug for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The first bytes on a connection: the versions of the protocol that the source speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// The oldest version.
    pub oldest: u16,
    /// The newest version.
    pub newest: u16,
}

impl Preamble {
    /// What this build says.
    pub const OURS: Self = Self {
        oldest: OLDEST_VERSION,
        newest: NEWEST_VERSION,
    };

    /// As it goes on the wire.
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let mut bytes = [0; PREAMBLE_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.oldest.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.newest.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..12]);
        bytes[12..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` if this is not the beginning of a migration.
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Option<Self> {
        let crc = crc32fast::hash(&bytes[..12]).to_le_bytes();
        let preamble = Self {
            oldest: u16::from_le_bytes([bytes[8], bytes[9]]),
            newest: u16::from_le_bytes([bytes[10], bytes[11]]),
        };
        (bytes[..8] == MAGIC && bytes[12..] == crc && preamble.oldest <= preamble.newest)
            .then_some(preamble)
    }
}

/// HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Names this migration.
    pub id: Id,
    /// Bits of what the source cannot do without; unknown ones are refused. The offer's disks
    /// are part of the body if [`BLOCK_MIGRATION`] is set.
    pub required: u32,
    /// Bits of what the source offers beyond the version; the destination picks, and the source uses of that what it
    /// likes.
    pub optional: u32,
    /// The guest.
    pub offer: Offer,
}

/// Required if disks travel with the guest.
pub const BLOCK_MIGRATION: u32 = 1 << 0;

/// Required if memory may come after the guest; see docs/design.md.
pub const POSTCOPY: u32 = 1 << 1;

/// What a source may require of this build; see [`Hello::required`].
pub const REQUIRABLE: u32 = BLOCK_MIGRATION | POSTCOPY;

/// Offered: COMPRESSED frames with lz4.
pub const LZ4: u32 = 1 << 0;

/// Offered: COMPRESSED frames with zstd.
pub const ZSTD: u32 = 1 << 1;

/// Offered: XBZRLE frames.
pub const XBZRLE: u32 = 1 << 2;

/// What this build can leave alone; see [`Hello::optional`].
pub const CAPABILITIES: u32 = LZ4 | ZSTD | XBZRLE;

impl Hello {
    /// The body. What the offer holds beyond the limits is an error that says so.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), DecodeError> {
        out.clear();
        let offer = &self.offer;
        out.extend(self.id.0);
        out.extend(self.required.to_le_bytes());
        out.extend(self.optional.to_le_bytes());
        out.extend((PAGE_SIZE as u32).to_le_bytes());
        out.extend((offer.layout.regions().len() as u16).to_le_bytes());
        for region in offer.layout.regions() {
            out.extend(region.start.to_le_bytes());
            out.extend(region.len.to_le_bytes());
        }
        DecodeError::within(
            "configuration sections",
            offer.configuration.len() as u64,
            MAX_CONFIGURATION as u64,
        )?;
        out.extend((offer.configuration.len() as u16).to_le_bytes());
        for section in &offer.configuration {
            put_section(section, out)?;
        }
        DecodeError::within("blobs", offer.blobs.len() as u64, MAX_BLOBS as u64)?;
        out.extend((offer.blobs.len() as u16).to_le_bytes());
        for blob in &offer.blobs {
            DecodeError::within("bytes of a blob", blob.len, MAX_BLOB)?;
            put_name(&blob.name, out)?;
            out.extend(blob.len.to_le_bytes());
        }
        if self.required & BLOCK_MIGRATION != 0 {
            put_disks(&offer.disks, out)?;
        }
        let limit = crate::frame::Kind::Hello.max_body() as u64;
        DecodeError::within("bytes of HELLO", out.len() as u64, limit)
    }

    /// Decodes and checks a body.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(body);
        let id = Id(reader.array()?);
        let required = reader.u32()?;
        let optional = reader.u32()?;
        let page_size = reader.u32()?;
        if u64::from(page_size) != PAGE_SIZE {
            return Err(DecodeError::PageSize(page_size));
        }
        let regions = reader.count_u16("memory regions", MAX_REGIONS)?;
        let regions = (0..regions)
            .map(|_| {
                Ok(Region {
                    start: reader.u64()?,
                    len: reader.u64()?,
                })
            })
            .collect::<Result<_, DecodeError>>()?;
        let layout = Layout::new(regions)?;
        let sections = reader.count_u16("configuration sections", MAX_CONFIGURATION)?;
        let configuration = (0..sections)
            .map(|_| take_section(&mut reader))
            .collect::<Result<_, _>>()?;
        let blobs = reader.count_u16("blobs", MAX_BLOBS)?;
        let blobs = (0..blobs)
            .map(|_| {
                let name = reader.name()?;
                let len = reader.u64()?;
                DecodeError::within("bytes of a blob", len, MAX_BLOB)?;
                Ok(Blob { name, len })
            })
            .collect::<Result<_, DecodeError>>()?;
        let disks = if required & BLOCK_MIGRATION != 0 {
            take_disks(&mut reader)?
        } else {
            Vec::new()
        };
        // What is required and not known may have brought fields of its own: it is refused by its
        // bits, which says more than that the body is too long.
        if required & !REQUIRABLE == 0 {
            reader.end()?;
        }
        Ok(Self {
            id,
            required,
            optional,
            offer: Offer {
                layout,
                configuration,
                blobs,
                disks,
            },
        })
    }
}

pub(crate) fn put_section(section: &Section, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    put_name(&section.name, out)?;
    out.extend(section.version.to_le_bytes());
    let len = section.body.len();
    DecodeError::within("bytes of a section", len as u64, MAX_SECTION as u64)?;
    out.extend((len as u32).to_le_bytes());
    out.extend(&section.body);
    Ok(())
}

pub(crate) fn take_section(reader: &mut Reader<'_>) -> Result<Section, DecodeError> {
    let name = reader.name()?;
    let version = reader.u32()?;
    let len = reader.u32()?;
    DecodeError::within("bytes of a section", u64::from(len), MAX_SECTION as u64)?;
    Ok(Section {
        name,
        version,
        body: reader.take(len as usize)?.to_vec(),
    })
}

/// STATE: a section.
pub fn encode_state(section: &Section, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    out.clear();
    put_section(section, out)
}

/// Decodes and checks a STATE body.
pub fn decode_state(body: &[u8]) -> Result<Section, DecodeError> {
    let mut reader = Reader::new(body);
    let section = take_section(&mut reader)?;
    reader.end()?;
    Ok(section)
}

/// The beginning of a BLOB: the data follows up to the body's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobChunk {
    /// The blob's index in the HELLO.
    pub index: u16,
    /// Where in the blob this piece begins.
    pub offset: u64,
}

impl BlobChunk {
    /// The length of the encoded chunk without its data.
    pub const LEN: usize = 10;

    /// The bytes before the data.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..2].copy_from_slice(&self.index.to_le_bytes());
        bytes[2..].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    /// The chunk and its data.
    pub fn decode(body: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let mut reader = Reader::new(body);
        let chunk = Self {
            index: reader.u16()?,
            offset: reader.u64()?,
        };
        let data = reader.rest();
        DecodeError::within(
            "bytes of a blob's piece",
            data.len() as u64,
            MAX_CHUNK as u64,
        )?;
        Ok((chunk, data))
    }
}

/// A run of guest physical memory on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRun {
    /// The guest physical address, in bytes.
    pub address: u64,
    /// How many pages.
    pub pages: u64,
}

/// The body of a PAGES frame, which is built in place: the runs, then a CRC32 for each page.
pub fn encode_pages(runs: &[AddressRun], crcs: &[u32], out: &mut Vec<u8>) {
    out.clear();
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
/// the header and must fit.
pub fn decode_pages(
    body: &[u8],
    payload_len: u32,
    runs: &mut Vec<AddressRun>,
    crcs: &mut Vec<u32>,
) -> Result<(), DecodeError> {
    runs.clear();
    crcs.clear();
    let mut reader = Reader::new(body);
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
    for _ in 0..pages {
        crcs.push(reader.u32()?);
    }
    if u64::from(payload_len) != pages * PAGE_SIZE {
        return Err(DecodeError::Payload {
            pages,
            len: payload_len,
        });
    }
    reader.end()
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

/// A reason as it goes on the wire: cut at [`MAX_REASON`] bytes.
pub fn encode_reason(reason: &str, out: &mut Vec<u8>) {
    out.clear();
    let end = reason.floor_char_boundary(MAX_REASON);
    out.extend(&reason.as_bytes()[..end]);
}

/// The reason of a REFUSE, FAILED or CANCEL, safe to print: control characters but the line feed
/// are replaced.
pub fn decode_reason(body: &[u8]) -> Result<String, DecodeError> {
    let text = std::str::from_utf8(body).map_err(|_| DecodeError::NotText)?;
    Ok(text
        .chars()
        .map(|c| match c {
            '\n' => c,
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect())
}

/// A fixed-size body: its fields in order, little-endian.
macro_rules! fixed {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $type:ident),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)+
        }

        impl $name {
            /// Writes the body, replacing what is in `out`.
            pub fn encode(&self, out: &mut Vec<u8>) {
                out.clear();
                $(<$type as Field>::put(self.$field, out);)+
            }

            /// Decodes and checks a body.
            pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
                let mut reader = Reader::new(body);
                let message = Self { $($field: <$type as Field>::take(&mut reader)?,)+ };
                reader.end()?;
                Ok(message)
            }
        }
    };
}

trait Field: Sized {
    fn put(self, out: &mut Vec<u8>);
    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError>;
}

macro_rules! field {
    ($($type:ident => $take:ident),+) => {
        $(impl Field for $type {
            fn put(self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                reader.$take()
            }
        })+
    };
}

field!(u16 => u16, u32 => u32, u64 => u64);

impl Field for bool {
    fn put(self, out: &mut Vec<u8>) {
        out.push(self.into());
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.bool()
    }
}

impl Field for Id {
    fn put(self, out: &mut Vec<u8>) {
        out.extend(self.0);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self(reader.array()?))
    }
}

fixed! {
    /// ACCEPT.
    Accept {
        /// The migration accepted.
        id: Id,
        /// The version that is spoken from here on.
        version: u16,
        /// The optional capabilities that the destination picked.
        capabilities: u32,
    }
}

fixed! {
    /// The beginning of a SYNC; padding follows up to the body's end.
    Sync {
        /// Counts the SYNCs of this migration, from 1.
        mark: u64,
        /// The round that the next page belongs to or, at its end, that it ends; for the log.
        round: u64,
    }
}

impl Sync {
    /// The length of a SYNC without padding.
    pub const LEN: usize = 16;

    /// Decodes the beginning of a body, whatever the padding.
    pub fn decode_padded(body: &[u8]) -> Result<Self, DecodeError> {
        Self::decode(body.get(..Self::LEN).unwrap_or(body))
    }
}

fixed! {
    /// SYNC-ACK.
    SyncAck {
        /// The mark of the SYNC that this answers.
        mark: u64,
    }
}

fixed! {
    /// FLUSH.
    Flush {
        /// The round that it ends; for the log.
        round: u64,
    }
}

fixed! {
    /// FLUSHED.
    Flushed {
        /// How long flushing all disks took, in nanoseconds.
        flush_ns: u64,
    }
}

fixed! {
    /// END.
    End {
        /// How many STATE frames came.
        sections: u32,
        /// Whether the guest ran at the source before it was stopped.
        was_running: bool,
    }
}

fixed! {
    /// READY.
    Ready {
        /// How long checking completeness, flushing the disks and loading the state took, in
        /// nanoseconds.
        load_ns: u64,
    }
}

fixed! {
    /// GO.
    Go {
        /// The migration: a GO of another one is no GO.
        id: Id,
        /// Whether to run the guest; otherwise it stays paused.
        run: bool,
        /// How long the guest has been stopped when this is sent, in nanoseconds; 0 if it was
        /// paused before the migration.
        stopped_ns: u64,
        /// The shortest round trip that the source measured, in nanoseconds.
        round_trip_ns: u64,
    }
}

fixed! {
    /// RUNNING.
    Running {
        /// The time from GO's arrival to the first vCPU about to enter the guest, in nanoseconds.
        start_ns: u64,
    }
}

fixed! {
    /// LATE, LEFT and CONTINUE.
    Missing {
        /// How many pages the destination does not have.
        pages: u64,
    }
}

fixed! {
    /// JOIN and RESUME: which migration the connection belongs to.
    Return {
        /// The migration.
        id: Id,
        /// Counts the connections of a migration: 0 for its first, one more for each recovery.
        attempt: u32,
    }
}

impl Return {
    /// The length of the body.
    pub const LEN: usize = 20;
}

fixed! {
    /// REQUEST.
    Request {
        /// The guest physical address of the first page.
        address: u64,
        /// How many pages.
        pages: u32,
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
