//! The difference between two versions of a page: the runs of 8-byte words that changed, each as
//! the number of its first word, how many they are, and the words.
//!
//! ```text
//! (u16 first word, u16 words, words × 8 bytes)…
//! ```
//!
//! Runs ascend and neither touch nor overlap; a page that is the same has none.

use super::Page;

/// The most bytes of a difference: one that is longer gains too little.
pub const MAX_LEN: usize = size_of::<Page>() / 2;

const WORD: usize = size_of::<u64>();
const WORDS: usize = size_of::<Page>() / WORD;
/// A run's first word and length.
const HEAD: usize = 4;

/// A difference that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It ends within a run.
    #[error("the difference of a page ends within a run, {missing} bytes too early")]
    Truncated {
        /// How many bytes are missing.
        missing: usize,
    },
    /// A run that is empty, out of order, or goes past the page's end.
    #[error(
        "the difference of a page has a run of {words} words at word {first}; words {from} to 511 are left"
    )]
    Run {
        /// Its first word.
        first: usize,
        /// How many words.
        words: usize,
        /// The first word that a run could have begun at.
        from: usize,
    },
}

/// Which words of a page changed: a bit for each.
struct Changed([u64; WORDS / 64]);

impl Changed {
    fn between(old: &Page, new: &Page) -> Self {
        const LINE: usize = 8 * WORD;
        let mut bits = [0; WORDS / 64];
        let lines = old.as_chunks::<LINE>().0.iter();
        for (number, (old, new)) in lines.zip(new.as_chunks::<LINE>().0).enumerate() {
            let (old, new) = (words(old), words(new));
            // Most lines are the same, which one test over all of the line says.
            let any = old.iter().zip(new).fold(0, |any, (a, b)| any | (a ^ b));
            if any == 0 {
                continue;
            }
            let line = old.iter().zip(new).enumerate();
            let line = line.fold(0, |bits, (at, (a, b))| bits | u64::from(*a != b) << at);
            bits[number / 8] |= line << (number % 8 * 8);
        }
        Self(bits)
    }

    fn next(&self, from: usize, changed: bool) -> usize {
        let mut at = from;
        while let Some(bits) = self.0.get(at / 64) {
            let bits = if changed { *bits } else { !bits } >> (at % 64);
            if bits != 0 {
                return at + bits.trailing_zeros() as usize;
            }
            at = (at / 64 + 1) * 64;
        }
        WORDS
    }
}

fn words(line: &[u8; 8 * WORD]) -> [u64; 8] {
    std::array::from_fn(|at| {
        let word = line.as_chunks::<WORD>().0[at];
        u64::from_le_bytes(word)
    })
}

/// Appends the difference from `old` to `new`, and returns its length. `None`, and nothing
/// appended, if that would be more than [`MAX_LEN`].
pub fn encode(old: &Page, new: &Page, out: &mut Vec<u8>) -> Option<usize> {
    let before = out.len();
    let changed = Changed::between(old, new);
    let mut at = changed.next(0, true);
    while at < WORDS {
        let end = changed.next(at, false);
        if out.len() - before + HEAD + (end - at) * WORD > MAX_LEN {
            out.truncate(before);
            return None;
        }
        out.extend((at as u16).to_le_bytes());
        out.extend(((end - at) as u16).to_le_bytes());
        out.extend(&new[at * WORD..end * WORD]);
        at = changed.next(end, true);
    }
    Some(out.len() - before)
}

/// Makes `page`, which is what the difference was taken from, what it was taken to. After an error
/// the page is some mix of both.
pub fn apply(mut delta: &[u8], page: &mut Page) -> Result<(), DeltaError> {
    let mut from = 0;
    while !delta.is_empty() {
        let (head, rest) = split(delta, HEAD)?;
        let number = |at: usize| {
            head.get(at..)
                .and_then(|bytes| bytes.first_chunk())
                .map_or(0, |bytes| usize::from(u16::from_le_bytes(*bytes)))
        };
        let (first, words) = (number(0), number(2));
        let end = first + words;
        let target = match page.get_mut(first * WORD..end * WORD) {
            Some(target) if words > 0 && first >= from => target,
            _ => return Err(DeltaError::Run { first, words, from }),
        };
        let (data, rest) = split(rest, target.len())?;
        target.copy_from_slice(data);
        delta = rest;
        from = end + 1;
    }
    Ok(())
}

fn split(bytes: &[u8], len: usize) -> Result<(&[u8], &[u8]), DeltaError> {
    bytes
        .split_at_checked(len)
        .ok_or_else(|| DeltaError::Truncated {
            missing: len - bytes.len(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(old: &Page, new: &Page) -> Option<usize> {
        let mut delta = vec![9; 3];
        let len = encode(old, new, &mut delta);
        assert_eq!(delta.len(), 3 + len.unwrap_or(0));
        if let Some(len) = len {
            assert!(len <= MAX_LEN);
            let mut page = *old;
            apply(&delta[3..], &mut page).unwrap();
            assert!(page == *new);
        }
        len
    }

    #[test]
    fn the_format_is_fixed() {
        let old = [7; 4096];
        let mut new = old;
        new[8] = 1;
        new[4095] = 2;
        let mut delta = vec![];
        assert_eq!(encode(&old, &new, &mut delta), Some(24));
        assert_eq!(
            delta,
            [
                1, 0, 1, 0, 1, 7, 7, 7, 7, 7, 7, 7, // Word 1.
                255, 1, 1, 0, 7, 7, 7, 7, 7, 7, 7, 2, // Word 511.
            ]
        );
    }

    #[test]
    fn what_has_not_changed_costs_nothing_and_what_has_changed_too_much_is_left() {
        let old = [5; 4096];
        assert_eq!(check(&old, &old), Some(0));
        assert_eq!(check(&old, &[6; 4096]), None);
        // 255 words in one run fit, 256 don't.
        for (words, len) in [(255, Some(255 * 8 + 4)), (256, None)] {
            let mut new = old;
            new[..words * 8].fill(0);
            assert_eq!(check(&old, &new), len);
        }
        // Every third word, all over the page: 171 runs of 12 bytes are too much.
        let mut new = old;
        new.chunks_mut(24).for_each(|chunk| chunk[0] = 0);
        assert_eq!(check(&old, &new), None);
    }

    #[test]
    fn every_byte_is_seen() {
        let old = [0; 4096];
        for at in 0..4096 {
            let mut new = old;
            new[at] = 0x10;
            assert_eq!(check(&old, &new), Some(12), "byte {at}");
        }
    }

    #[test]
    fn runs_that_can_not_be_are_refused() {
        let run = |first: u16, words: u16| {
            let mut delta = [first.to_le_bytes(), words.to_le_bytes()].concat();
            delta.resize(4 + usize::from(words) * 8, 1);
            delta
        };
        let error = |first, words, from| Err(DeltaError::Run { first, words, from });
        let mut page = [0; 4096];
        assert_eq!(apply(&run(0, 512), &mut page), Ok(()));
        assert_eq!(apply(&run(511, 1), &mut page), Ok(()));
        assert_eq!(apply(&run(3, 0), &mut page), error(3, 0, 0));
        assert_eq!(apply(&run(511, 2), &mut page), error(511, 2, 0));
        assert_eq!(apply(&run(512, 1), &mut page), error(512, 1, 0));
        assert_eq!(apply(&run(65535, 65535), &mut page), error(65535, 65535, 0));
        // Runs that touch would have been one.
        for (first, from) in [(4, 6), (5, 6), (0, 6)] {
            let delta = [run(3, 2), run(first, 1)].concat();
            assert_eq!(
                apply(&delta, &mut page),
                error(first.into(), 1, from),
                "{first}"
            );
        }
        let delta = run(3, 2);
        for len in 1..delta.len() {
            let missing = if len < 4 { 4 - len } else { 20 - len };
            assert_eq!(
                apply(&delta[..len], &mut page),
                Err(DeltaError::Truncated { missing })
            );
        }
    }

    proptest! {
        #[test]
        fn any_change_comes_back(
            seed in any::<u8>(),
            changes in prop::collection::vec((0..4096usize, 1..40usize, any::<u8>()), 0..40),
        ) {
            let old: Page = std::array::from_fn(|at| (at as u8).wrapping_mul(seed));
            let mut new = old;
            for (at, len, value) in changes {
                let end = (at + len).min(4096);
                new[at..end].fill(value);
            }
            check(&old, &new);
        }

        #[test]
        fn anything_may_come(delta in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = apply(&delta, &mut [0; 4096]);
        }

        #[test]
        fn a_damaged_difference_is_refused_or_makes_another_page(
            at in 0..24usize,
            flip in 1..=255u8,
        ) {
            let old: Page = [7; 4096];
            let mut new = old;
            new[8] = 1;
            new[4095] = 2;
            let mut delta = vec![];
            encode(&old, &new, &mut delta).unwrap();
            delta[at] ^= flip;
            let mut page = old;
            if apply(&delta, &mut page).is_ok() {
                prop_assert_ne!(crc32fast::hash(&page), crc32fast::hash(&new));
            }
        }
    }
}
