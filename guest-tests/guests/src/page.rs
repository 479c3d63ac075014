//! What a page holds, derived from its number and its generation, so that any page can be
//! verified at any time without a copy of it.

use crate::dirtier::Data;

/// Bytes of a page.
pub const BYTES: u64 = 4096;

/// A page, as the generator sees it.
pub type Page = [u64; 512];

const LANES: usize = 4;

/// Four generators side by side (xorshift128+, Vigna 2014), so that SSE2 can run them: a page
/// takes a fraction of a microsecond.
pub(crate) struct Stream {
    a: [u64; LANES],
    b: [u64; LANES],
}

/// SplitMix64 (Steele, Lea and Flood 2014): spreads a seed over all bits.
pub(crate) fn spread(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *seed;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Stream {
    pub(crate) fn new(mut seed: u64) -> Self {
        let mut stream = Self {
            a: [0; LANES],
            b: [0; LANES],
        };
        for lane in stream.a.iter_mut().chain(&mut stream.b) {
            *lane = spread(&mut seed);
        }
        stream
    }

    #[inline(always)]
    pub(crate) fn next(&mut self) -> [u64; LANES] {
        let mut words = [0; LANES];
        for (word, (a, b)) in words.iter_mut().zip(self.a.iter_mut().zip(&mut self.b)) {
            let (mut x, y) = (*a, *b);
            x ^= x << 23;
            x ^= x >> 18;
            x ^= y ^ (y >> 5);
            *word = x.wrapping_add(y);
            (*a, *b) = (y, x);
        }
        words
    }
}

/// Words of eight letters for compressible pages.
const VOCABULARY: [[u8; 8]; 16] = [
    *b"a guest ",
    *b"wanders ",
    *b"from one",
    *b" host to",
    *b" another",
    *b", where ",
    *b"no page ",
    *b"is lost,",
    *b" not one",
    *b" word of",
    *b" it torn",
    *b", while ",
    *b"its tick",
    *b" goes on",
    *b" softly.",
    *b"\nThen a ",
];

/// Calls `each` with every four words of the page, in order.
#[inline(always)]
fn generate(data: Data, page: u64, generation: u32, mut each: impl FnMut(usize, [u64; LANES])) {
    let mut stream = Stream::new((page << 32) ^ u64::from(generation));
    for group in 0..512 / LANES {
        let words = match data {
            Data::Random => stream.next(),
            Data::Text => stream
                .next()
                .map(|word| u64::from_le_bytes(VOCABULARY[(word >> 60) as usize])),
            Data::Zero => [0; LANES],
        };
        each(group, words);
    }
}

/// Writes `generation` of page number `page`.
pub fn write(memory: &mut Page, data: Data, page: u64, generation: u32) {
    let (groups, _) = memory.as_chunks_mut::<LANES>();
    generate(data, page, generation, |group, words| groups[group] = words);
}

/// Whether `memory` holds `generation` of page number `page`.
#[must_use]
pub fn matches(memory: &Page, data: Data, page: u64, generation: u32) -> bool {
    let (groups, _) = memory.as_chunks::<LANES>();
    let mut different = [0; LANES];
    generate(data, page, generation, |group, words| {
        for ((different, expected), found) in different.iter_mut().zip(words).zip(groups[group]) {
            *different |= expected ^ found;
        }
    });
    different == [0; LANES]
}

/// The first word that differs from `generation` of page number `page`: its index, and how it
/// should be.
#[must_use]
pub fn first_difference(
    memory: &Page,
    data: Data,
    page: u64,
    generation: u32,
) -> Option<(usize, u64)> {
    let mut first = None;
    generate(data, page, generation, |group, words| {
        for (lane, expected) in words.into_iter().enumerate() {
            let index = group * LANES + lane;
            if first.is_none() && memory[index] != expected {
                first = Some((index, expected));
            }
        }
    });
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(data: Data, number: u64, generation: u32) -> Page {
        let mut memory = [0; 512];
        write(&mut memory, data, number, generation);
        memory
    }

    #[test]
    fn a_page_matches_itself_and_no_other() {
        for data in [Data::Random, Data::Text] {
            let memory = page(data, 7, 3);
            assert!(matches(&memory, data, 7, 3));
            for (number, generation) in [(7, 2), (7, 4), (6, 3), (8, 3), (3, 7)] {
                assert!(
                    !matches(&memory, data, number, generation),
                    "{number} {generation}"
                );
            }
        }
    }

    #[test]
    fn one_wrong_bit_anywhere_is_found() {
        for data in [Data::Random, Data::Text, Data::Zero] {
            let right = page(data, 1 << 20, 99);
            for index in 0..512 {
                let mut memory = right;
                memory[index] ^= 1 << (index % 64);
                assert!(!matches(&memory, data, 1 << 20, 99));
                assert_eq!(
                    first_difference(&memory, data, 1 << 20, 99),
                    Some((index, right[index]))
                );
            }
            assert_eq!(first_difference(&right, data, 1 << 20, 99), None);
        }
    }

    #[test]
    fn random_pages_have_no_repetition() {
        let mut words = page(Data::Random, 0, 1);
        words.sort_unstable();
        assert!(words.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn text_pages_are_text_and_zero_pages_are_zero() {
        let text = page(Data::Text, 0, 1);
        assert!(
            text.iter()
                .all(|word| word.to_le_bytes().iter().all(u8::is_ascii))
        );
        assert_eq!(page(Data::Zero, 5, 5), [0; 512]);
    }
}
