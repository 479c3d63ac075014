//! What a sector of a disk holds: who wrote it, when, and data that follows from that. So each
//! sector can be verified by itself, by the guest and in an image file.

use crate::page::{self, Stream};

/// Bytes of a sector.
pub const BYTES: usize = 512;

/// A sector, as the generator sees it.
pub type Sector = [u64; BYTES / 8];

/// Sectors of the largest request.
pub const MAX_SECTORS: u32 = 256;

const MAGIC: u64 = u64::from_le_bytes(*b"FerrySec");

/// What a written sector says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The seed of the guest that wrote it.
    pub seed: u64,
    /// Its number, counted from the beginning of the disk.
    pub sector: u64,
    /// The guest's how many-th write to this disk it was, from 1.
    pub generation: u32,
    /// How many sectors of the same request are before it.
    pub position: u16,
    /// The sectors of the request.
    pub count: u16,
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Nothing but zeros.
    Zero,
    /// What a guest wrote, whole.
    Written(Mark),
    /// It begins as if a guest had written it, but goes on in another way.
    Damaged(Mark),
    /// Anything else.
    Foreign,
}

impl Mark {
    fn header(&self) -> [u64; 4] {
        let numbers = u64::from(self.generation)
            | u64::from(self.position) << 32
            | u64::from(self.count) << 48;
        [MAGIC, self.seed, self.sector, numbers]
    }

    fn stream(&self) -> Stream {
        let [_, seed, sector, numbers] = self.header();
        Stream::new(seed ^ sector.rotate_left(32) ^ numbers.rotate_left(17))
    }

    /// Writes the sector.
    pub fn write(&self, memory: &mut Sector) {
        let (groups, _) = memory.as_chunks_mut::<4>();
        let mut stream = self.stream();
        for (index, group) in groups.iter_mut().enumerate() {
            *group = if index == 0 {
                self.header()
            } else {
                stream.next()
            };
        }
    }
}

/// Reads a sector.
#[must_use]
pub fn read(memory: &Sector) -> Contents {
    let (groups, _) = memory.as_chunks::<4>();
    let [magic, seed, sector, numbers] = groups[0];
    if magic != MAGIC {
        return if memory.iter().all(|&word| word == 0) {
            Contents::Zero
        } else {
            Contents::Foreign
        };
    }
    let mark = Mark {
        seed,
        sector,
        generation: numbers as u32,
        position: (numbers >> 32) as u16,
        count: (numbers >> 48) as u16,
    };
    let mut stream = mark.stream();
    let mut different = 0;
    for group in &groups[1..] {
        for (expected, found) in stream.next().into_iter().zip(group) {
            different |= expected ^ found;
        }
    }
    if different == 0 {
        Contents::Written(mark)
    } else {
        Contents::Damaged(mark)
    }
}

/// A sector's part of a digest of many: their wrapping sum, in whatever order, stands for which
/// sectors hold which generations.
#[must_use]
pub fn digest(sector: u64, generation: u32) -> u64 {
    let mut seed = sector ^ u64::from(generation).rotate_left(32);
    page::spread(&mut seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Mark = Mark {
        seed: 7,
        sector: 1 << 33,
        generation: 99,
        position: 3,
        count: 256,
    };

    fn sector(mark: Mark) -> Sector {
        let mut memory = [0; 64];
        mark.write(&mut memory);
        memory
    }

    #[test]
    fn a_sector_reads_back_as_written() {
        assert_eq!(read(&sector(MARK)), Contents::Written(MARK));
        assert_eq!(read(&[0; 64]), Contents::Zero);
        assert_eq!(read(&[1; 64]), Contents::Foreign);
    }

    #[test]
    fn one_wrong_bit_anywhere_is_found() {
        for index in 0..64 {
            let mut memory = sector(MARK);
            memory[index] ^= 1 << index;
            assert_ne!(read(&memory), Contents::Written(MARK), "{index}");
        }
    }

    #[test]
    fn two_halves_of_different_writes_are_damaged() {
        let newer = Mark {
            generation: 100,
            ..MARK
        };
        let mut memory = sector(newer);
        memory[32..].copy_from_slice(&sector(MARK)[32..]);
        assert_eq!(read(&memory), Contents::Damaged(newer));
    }

    #[test]
    fn the_digest_tells_which_sector_has_which_generation() {
        let sum = |pairs: [(u64, u32); 2]| {
            pairs
                .map(|(sector, generation)| digest(sector, generation))
                .into_iter()
                .fold(0, u64::wrapping_add)
        };
        assert_eq!(sum([(1, 2), (3, 4)]), sum([(3, 4), (1, 2)]));
        assert_ne!(sum([(1, 2), (3, 4)]), sum([(1, 4), (3, 2)]));
    }
}
