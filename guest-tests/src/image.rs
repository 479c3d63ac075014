//! Looking at a disk image after the guest [`DISK`](crate::DISK) has written it.

use std::io::{self, Read, Seek, SeekFrom};

use crate::block::{self, Contents, Sector};
use crate::disk::Report;

/// Sectors that are read at a time.
const CHUNK: usize = 2048;

/// What an area of an image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Sectors that a guest with this seed wrote, each in its place.
    pub written: u64,
    /// Sectors of zeros.
    pub zero: u64,
    /// Sectors that hold anything else.
    pub wrong: u64,
    /// The first of those.
    pub first_wrong: Option<(u64, Contents)>,
    /// The sum of `block::digest` over the written ones.
    pub digest: u64,
}

/// Reads `sectors` sectors of a raw image, from sector `first` on.
///
/// # Errors
/// If the image can't be read, or ends before.
pub fn read(
    image: &mut (impl Read + Seek),
    seed: u64,
    first: u64,
    sectors: u64,
) -> io::Result<Image> {
    let mut found = Image::default();
    let mut chunk = vec![0; CHUNK * block::BYTES];
    image.seek(SeekFrom::Start(first.saturating_mul(block::BYTES as u64)))?;
    let end = first.saturating_add(sectors);
    let mut next = first;
    while next < end {
        let count = (end - next).min(CHUNK as u64) as usize;
        let bytes = &mut chunk[..count * block::BYTES];
        image.read_exact(bytes)?;
        for (number, bytes) in (next..).zip(bytes.as_chunks::<{ block::BYTES }>().0) {
            found.add(seed, number, block::read(&sector(bytes)));
        }
        next += count as u64;
    }
    Ok(found)
}

fn sector(bytes: &[u8; block::BYTES]) -> Sector {
    let mut sector = [0; block::BYTES / 8];
    for (word, bytes) in sector.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    sector
}

impl Image {
    fn add(&mut self, seed: u64, number: u64, contents: Contents) {
        match contents {
            Contents::Written(mark) if (mark.seed, mark.sector) == (seed, number) => {
                self.written += 1;
                self.digest = self
                    .digest
                    .wrapping_add(block::digest(number, mark.generation));
            }
            Contents::Zero => self.zero += 1,
            _ => {
                self.wrong += 1;
                self.first_wrong.get_or_insert((number, contents));
            }
        }
    }

    /// Whether this is exactly what the guest says should be there. It can't be told while there
    /// are sectors of which the guest knows nothing.
    #[must_use]
    pub fn agrees_with(&self, verified: &Report) -> bool {
        matches!(*verified, Report::Verified { written, zero, unknown: 0, digest, .. }
            if (self.written, self.zero, self.digest) == (written, zero, digest.0))
    }
}

/// Reads the area that a `verified` report is about.
///
/// # Errors
/// If the image can't be read, ends before, or the report is another one.
pub fn read_reported(image: &mut (impl Read + Seek), verified: &Report) -> io::Result<Image> {
    match *verified {
        Report::Verified {
            seed,
            first,
            sectors,
            ..
        } => read(image, seed, first, sectors),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("no report of a verified disk: {verified}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::Hex;
    use crate::block::Mark;

    const SEED: u64 = 5;

    fn image() -> Vec<u8> {
        let mut bytes = vec![0; 10 * block::BYTES];
        for number in 2..5 {
            put(&mut bytes, number, number);
        }
        bytes
    }

    /// Puts what belongs to sector `number` at sector `place`.
    fn put(bytes: &mut [u8], place: u64, number: u64) {
        let mut sector = [0; 64];
        Mark {
            seed: SEED,
            sector: number,
            generation: number as u32 + 100,
            position: 0,
            count: 3,
        }
        .write(&mut sector);
        for (index, word) in sector.iter().enumerate() {
            let at = place as usize * block::BYTES + index * 8;
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
    }

    fn verified(digest: u64) -> Report {
        Report::Verified {
            device: 0,
            seed: SEED,
            first: 1,
            sectors: 8,
            written: 3,
            zero: 5,
            unknown: 0,
            digest: Hex(digest),
            took_us: 0,
            errors: 0,
            io_errors: 0,
        }
    }

    #[test]
    fn an_image_agrees_with_what_was_written_to_it() {
        let digest = (2..5).map(|number| block::digest(number, number as u32 + 100));
        let report = verified(digest.fold(0, u64::wrapping_add));
        let found = read_reported(&mut Cursor::new(image()), &report).unwrap();
        assert_eq!((found.written, found.zero, found.wrong), (3, 5, 0));
        assert!(found.agrees_with(&report));
        assert!(!found.agrees_with(&verified(0)));
    }

    #[test]
    fn misplaced_and_damaged_sectors_are_wrong() {
        let mut bytes = image();
        put(&mut bytes, 7, 3);
        bytes[4 * block::BYTES + 300] ^= 1;
        let found = read(&mut Cursor::new(bytes), SEED, 1, 8).unwrap();
        assert_eq!((found.written, found.zero, found.wrong), (2, 4, 2));
        assert!(matches!(found.first_wrong, Some((4, Contents::Damaged(_)))));
    }

    #[test]
    fn another_seed_is_wrong_and_a_short_image_an_error() {
        let found = read(&mut Cursor::new(image()), SEED + 1, 0, 10).unwrap();
        assert_eq!((found.written, found.zero, found.wrong), (0, 7, 3));
        assert!(read(&mut Cursor::new(image()), SEED, 0, 11).is_err());
    }
}
