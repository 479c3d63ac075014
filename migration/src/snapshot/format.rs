//! The bytes of a snapshot's file: see docs/snapshot.md.
//!
//! ```text
//! header │ RAM, each page at its place, zero pages as holes │ table │ blobs │ description
//! ```

use crate::codec::{DecodeError, Reader};
use crate::destination::{MAX_SECTIONS, MAX_STATE};
use crate::frame::Kind;
use crate::layout::{MAX_RAM, PAGE_SIZE};
use crate::message::{Hello, MAX_BLOB, MAX_BLOBS, put_section, take_section};
use crate::section::Section;

/// What the file of a snapshot begins with.
pub const MAGIC: [u8; 8] = *b"\x89FERSNP\n";

/// The version of the format that this build writes and reads.
pub const VERSION: u32 = 1;

/// The length of the header in bytes; RAM follows.
pub(super) const HEADER_LEN: u64 = 4096;

/// How many pages an entry of the table is about.
pub(super) const CHUNK_PAGES: u64 = 512;

/// The bytes of an entry: a bit for each page, a CRC32 for each page, the entry's CRC32.
pub(super) const ENTRY_LEN: usize = BITS_LEN + 4 * CHUNK_PAGES as usize + 4;

const BITS_LEN: usize = CHUNK_PAGES as usize / 8;

/// The most bytes of the description: HELLO, the sections with their names, and some.
const MAX_DESCRIPTION: u64 =
    (Kind::Hello.max_body() + MAX_STATE + MAX_SECTIONS * 128 + 4096) as u64;

/// What is wrong with a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// It is not the header of a snapshot.
    Foreign,
    /// Of another version.
    Version(u32),
    /// Its checksum, or a length that can't be.
    Damaged,
}

/// The header: written last, it makes the file a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// Whether the guest ran when it was saved.
    pub(super) was_running: bool,
    /// Bytes of RAM.
    pub(super) ram: u64,
    /// Bytes of all blobs.
    pub(super) blobs: u64,
    /// Bytes of the description.
    pub(super) description: u64,
    /// The description's CRC32.
    pub(super) description_crc: u32,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_LEN as usize] {
        let mut bytes = [0; HEADER_LEN as usize];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12] = self.was_running.into();
        bytes[16..24].copy_from_slice(&self.ram.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.blobs.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.description.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.description_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..HEADER_LEN as usize - 4]);
        bytes[HEADER_LEN as usize - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_LEN as usize]) -> Result<Self, HeaderError> {
        let u64_at = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u64::from_le_bytes(*b))
        };
        let u32_at = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u32::from_le_bytes(*b))
        };
        if bytes[..8] != MAGIC {
            return Err(HeaderError::Foreign);
        }
        if u32_at(8) != VERSION {
            return Err(HeaderError::Version(u32_at(8)));
        }
        let header = Self {
            was_running: bytes[12] != 0,
            ram: u64_at(16),
            blobs: u64_at(24),
            description: u64_at(32),
            description_crc: u32_at(40),
        };
        let possible = header.ram <= MAX_RAM
            && header.ram.is_multiple_of(PAGE_SIZE)
            && header.blobs <= MAX_BLOB * MAX_BLOBS as u64
            && header.description <= MAX_DESCRIPTION;
        // Whatever is not a field is zero; one comparison is about all of it, and the checksum.
        if possible && header.encode() == *bytes {
            Ok(header)
        } else {
            Err(HeaderError::Damaged)
        }
    }

    /// The number of entries in the table.
    pub(super) fn chunks(&self) -> u64 {
        (self.ram / PAGE_SIZE).div_ceil(CHUNK_PAGES)
    }

    /// Where the table begins.
    pub(super) fn table_at(&self) -> u64 {
        HEADER_LEN + self.ram
    }

    /// Where the blobs begin.
    pub(super) fn blobs_at(&self) -> u64 {
        self.table_at() + self.chunks() * ENTRY_LEN as u64
    }

    /// Where the description begins.
    pub(super) fn description_at(&self) -> u64 {
        self.blobs_at() + self.blobs
    }

    /// The length of the file in bytes.
    pub(super) fn file_len(&self) -> u64 {
        self.description_at() + self.description
    }
}

/// Where the data of a page is.
pub(super) fn page_at(page: u64) -> u64 {
    HEADER_LEN + page * PAGE_SIZE
}

/// Encodes the entry of chunk `number`: for each of its pages the CRC32 of its data, or `None` if
/// it is zero.
pub(super) fn encode_entry(
    number: u64,
    pages: impl Iterator<Item = Option<u32>>,
) -> [u8; ENTRY_LEN] {
    let mut entry = [0; ENTRY_LEN];
    let (bits, rest) = entry.split_at_mut(BITS_LEN);
    for (index, crc) in pages.take(CHUNK_PAGES as usize).enumerate() {
        if let Some(crc) = crc {
            bits[index / 8] |= 1 << (index % 8);
            rest[index * 4..][..4].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let crc = entry_crc(number, &entry);
    entry[ENTRY_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
    entry
}

/// Decodes what [`encode_entry`] made; `None` if it is damaged.
pub(super) fn decode_entry(number: u64, entry: &[u8; ENTRY_LEN]) -> Option<Vec<Option<u32>>> {
    if entry[ENTRY_LEN - 4..] != entry_crc(number, entry).to_le_bytes() {
        return None;
    }
    let (bits, rest) = entry.split_at(BITS_LEN);
    let crcs = rest.as_chunks::<4>().0.iter().take(CHUNK_PAGES as usize);
    let pages = crcs.enumerate().map(|(index, crc)| {
        (bits[index / 8] & 1 << (index % 8) != 0).then(|| u32::from_le_bytes(*crc))
    });
    Some(pages.collect())
}

/// It covers the number too, so that an entry in another's place shows.
fn entry_crc(number: u64, entry: &[u8; ENTRY_LEN]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(&entry[..ENTRY_LEN - 4]);
    hasher.finalize()
}

/// All about the guest but its RAM and its blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Description {
    /// The body of the HELLO that the guest was offered with.
    pub(super) hello: Vec<u8>,
    /// The CRC32 of each blob.
    pub(super) blobs: Vec<u32>,
    /// The state.
    pub(super) sections: Vec<Section>,
}

impl Description {
    pub(super) fn encode(&self) -> Result<Vec<u8>, DecodeError> {
        let mut out = Vec::new();
        out.extend((self.hello.len() as u32).to_le_bytes());
        out.extend(&self.hello);
        for crc in &self.blobs {
            out.extend(crc.to_le_bytes());
        }
        out.extend((self.sections.len() as u32).to_le_bytes());
        for section in &self.sections {
            put_section(section, &mut out)?;
        }
        Ok(out)
    }

    /// Decodes and checks it; the HELLO comes with it, decoded.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Self, Hello), DecodeError> {
        let mut reader = Reader::new(bytes);
        let len = reader.count_u32("bytes of HELLO", Kind::Hello.max_body())?;
        let hello = reader.take(len)?;
        let decoded = Hello::decode(hello)?;
        let blobs = decoded.offer.blobs.iter().map(|_| reader.u32());
        let blobs = blobs.collect::<Result<_, _>>()?;
        let sections = reader.count_u32("state sections", MAX_SECTIONS)?;
        let sections = (0..sections)
            .map(|_| take_section(&mut reader))
            .collect::<Result<_, _>>()?;
        reader.end()?;
        let description = Self {
            hello: hello.to_vec(),
            blobs,
            sections,
        };
        Ok((description, decoded))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let header = Header {
            was_running: true,
            ram: 3 * PAGE_SIZE,
            blobs: 7,
            description: 0x1_0000,
            description_crc: 0x0403_0201,
        };
        let bytes = header.encode();
        let start = b"\x89FERSNP\n\x01\0\0\0\x01\0\0\0\0\x30\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\
            \0\0\x01\0\0\0\0\0\x01\x02\x03\x04";
        assert_eq!(&bytes[..start.len()], start);
        assert_eq!(Header::decode(&bytes), Ok(header));
        assert_eq!(header.table_at(), 0x4000);
        assert_eq!(header.blobs_at(), 0x4000 + 2116);
        assert_eq!(header.file_len(), 0x4000 + 2116 + 7 + 0x1_0000);
        let entry = encode_entry(0, [None, Some(5), None].into_iter());
        assert_eq!((entry[0], entry[64 + 4]), (0b10, 5));
        assert_eq!(decode_entry(0, &entry).unwrap()[..3], [None, Some(5), None]);
        assert_eq!(decode_entry(1, &entry), None);
    }

    #[test]
    fn no_byte_of_a_header_can_change() {
        let bytes = Header::default().encode();
        for at in 0..bytes.len() {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert!(Header::decode(&damaged).is_err(), "{at}");
        }
        let huge = Header {
            ram: MAX_RAM + PAGE_SIZE,
            ..Header::default()
        };
        assert_eq!(Header::decode(&huge.encode()), Err(HeaderError::Damaged));
    }
}
