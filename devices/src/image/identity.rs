//! Telling on two hosts whether they have the same backing file.

use std::io::IoSliceMut;
use std::path::{Path, PathBuf};

use super::chain;
use super::{Cache, Format, Image, ImageConfig, Result};

/// A disk of up to this size is read as a whole.
const WHOLE: u64 = 16 << 20;
/// Of a larger one its beginning (partition table, boot loader and, with the usual alignment, the
/// superblock of the first file system) and its end are read, …
const HEAD: u64 = 4 << 20;
const TAIL: u64 = 1 << 20;
/// … and as many blocks spread over it.
const SAMPLES: u64 = 2048;
const SAMPLE: u64 = 4096;

/// A backing file as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name that is recorded in the image.
    pub name: String,
    /// Where that is: relative names are looked up where the image is.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// What a disk holds, in short: cheap to make, the same for the same contents whatever the format
/// and the host.
///
/// Different fingerprints prove different contents. Equal ones prove equal contents, up to the
/// chance of 1 in 2³² of a checksum and if nobody tampered with them, only if the disk was read
/// as a whole ([`Fingerprint::whole`], up to 16 MiB). Of a larger disk about 13 MiB are read: 4 MiB at
/// the beginning, 1 MiB at the end and 2,048 blocks of 4 KiB spread evenly. Two file systems that
/// were made or mounted at different times differ at the beginning, and different builds of
/// an operating system's image in many of the blocks; but two disks that differ in a few files
/// only may have equal fingerprints. It guards against mistakes, it does not verify a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    /// The disk's size in bytes.
    pub capacity: u64,
    /// CRC-32 of what was read.
    pub crc32: u32,
    /// Whether that was everything.
    pub whole: bool,
}

impl Image {
    /// The image's backing file, if it has one.
    pub fn backing(&self) -> Result<Option<Backing>> {
        let mut layers = self.layers.iter();
        let header = layers.next().and_then(|top| top.header.as_ref());
        let name = header.and_then(|header| header.backing.as_ref());
        let (Some(name), Some(below)) = (name, layers.next()) else {
            return Ok(None);
        };
        let path = chain::resolve(&self.path, name)?;
        Ok(Some(Backing {
            name: name.clone(),
            path,
            format: below.format,
        }))
    }

    /// Reads a sample of the disk.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let capacity = self.capacity;
        let whole = capacity <= WHOLE;
        let mut crc = crc32fast::Hasher::new();
        let mut buffer = vec![0; 64 << 10];
        let mut add = |mut offset: u64, len: u64| {
            let end = offset.saturating_add(len).min(capacity);
            while offset < end {
                let len = (end - offset).min(buffer.len() as u64);
                let piece = buffer.get_mut(..len as usize).unwrap_or_default();
                self.read_at(&mut [IoSliceMut::new(piece)], offset)?;
                crc.update(piece);
                offset += len;
            }
            Ok(())
        };
        if whole {
            add(0, capacity)?;
        } else {
            add(0, HEAD)?;
            for n in 0..SAMPLES {
                let offset = u128::from(capacity) * u128::from(n) / u128::from(SAMPLES);
                add((offset as u64) & !(SAMPLE - 1), SAMPLE)?;
            }
            add(capacity - TAIL, TAIL)?;
        }
        Ok(Fingerprint {
            capacity,
            crc32: crc.finalize(),
            whole,
        })
    }
}

impl Backing {
    /// The fingerprint of the backing file with what is under it.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        self.open()?.fingerprint()
    }

    fn open(&self) -> Result<Image> {
        let path = Path::to_owned(&self.path);
        Image::open(&ImageConfig {
            path,
            format: Some(self.format),
            readonly: true,
            cache: Cache::Writeback,
        })
    }
}
