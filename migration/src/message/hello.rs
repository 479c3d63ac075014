//! HELLO: the guest that is to come.

use super::Id;
use super::disks::{put_disks, take_disks};
use super::section::{put_section, take_section};
use crate::codec::{DecodeError, Reader, put_name};
use crate::frame::Kind;
use crate::layout::{Layout, MAX_REGIONS, PAGE_SIZE, Region};
use crate::vm::{Blob, Offer};

/// The most configuration sections in a HELLO.
pub const MAX_CONFIGURATION: usize = 256;

/// The most blobs in a HELLO.
pub const MAX_BLOBS: usize = 16;

/// The most bytes in a blob: 2 GiB.
pub const MAX_BLOB: u64 = 2 << 30;

/// HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Names this migration.
    pub id: Id,
    /// Bits of what the source cannot do without; unknown ones are refused. The offer's disks
    /// are part of the body if [`BLOCK_MIGRATION`] is set.
    pub required: u32,
    /// Bits of what the source offers beyond the version; the destination picks, and the source
    /// uses of that what it likes.
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

/// Offered: more connections, which begin with CHANNEL.
pub const MULTIFD: u32 = 1 << 3;

/// Offered: pages go without checksums, all of them if it is picked.
pub const UNCHECKED: u32 = 1 << 4;

/// What this build can leave alone; see [`Hello::optional`].
pub const CAPABILITIES: u32 = LZ4 | ZSTD | XBZRLE | MULTIFD | UNCHECKED;

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
        let limit = Kind::Hello.max_body() as u64;
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
