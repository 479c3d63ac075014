//! MISSING and ARRIVED: pieces of a bitmap of pages.

use crate::bitmap::PageBitmap;
use crate::codec::{DecodeError, Reader};
use crate::frame::MAX_BITS;

/// How many pages one piece can be about.
pub(crate) const MAX_BIT_PAGES: u64 = MAX_BITS as u64 * 8;

/// The body for the pages of `set` from `first`, a multiple of 64, on, for at most
/// [`MAX_BIT_PAGES`]; false, and no body, if none of them is in the set.
pub fn encode_bits(set: &PageBitmap, first: u64, out: &mut Vec<u8>) -> bool {
    out.clear();
    let count = MAX_BIT_PAGES.min(set.pages().saturating_sub(first));
    let words = set.words(first, count).unwrap_or_default();
    let used = |word: &u64| *word != 0;
    let (Some(from), Some(to)) = (words.iter().position(used), words.iter().rposition(used)) else {
        return false;
    };
    out.extend((first + from as u64 * 64).to_le_bytes());
    for word in words.get(from..=to).unwrap_or_default() {
        out.extend(word.to_le_bytes());
    }
    true
}

/// The first page, a multiple of 64, and the words of a body about some of `pages` pages.
pub fn decode_bits(body: &[u8], pages: u64) -> Result<(u64, Vec<u64>), DecodeError> {
    let mut reader = Reader::new(body);
    let first = reader.u64()?;
    let bits = reader.rest();
    let (words, rest) = bits.as_chunks::<8>();
    DecodeError::within("bytes of a bitmap", bits.len() as u64, MAX_BITS as u64)?;
    if words.is_empty() || !rest.is_empty() || !first.is_multiple_of(64) {
        return Err(DecodeError::Bitmap {
            first,
            len: bits.len(),
        });
    }
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let end = words
        .last()
        .map_or(0, |last| u64::from(64 - last.leading_zeros()));
    let end = first
        .saturating_add(words.len() as u64 * 64 - 64)
        .saturating_add(end);
    DecodeError::within("the page number past a bitmap", end, pages)?;
    Ok((first, words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_goes_over_in_pieces() {
        let pages = 3 * MAX_BIT_PAGES + 100;
        let mut set = PageBitmap::new(pages);
        for page in [0, 77, MAX_BIT_PAGES - 1, 2 * MAX_BIT_PAGES + 640, pages - 1] {
            set.set(page);
        }
        let (mut copy, mut body) = (PageBitmap::new(pages), Vec::new());
        let mut sizes = Vec::new();
        for first in (0..pages).step_by(MAX_BIT_PAGES as usize) {
            if encode_bits(&set, first, &mut body) {
                sizes.push(body.len());
                let (first, words) = decode_bits(&body, pages).unwrap();
                copy.or_words(first, &words);
            }
        }
        assert_eq!(copy, set);
        assert_eq!(sizes, [8 + MAX_BITS, 16, 16]);
    }

    #[test]
    fn pieces_that_fit_nowhere_are_refused() {
        let piece = |first: u64, words: &[u64]| {
            let mut body = first.to_le_bytes().to_vec();
            body.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            body
        };
        assert_eq!(
            decode_bits(&piece(192, &[0xff]), 200),
            Ok((192, vec![0xff]))
        );
        for body in [
            piece(192, &[0x1ff]),
            piece(1, &[1]),
            piece(256, &[1]),
            piece(u64::MAX - 63, &[1, 1]),
            piece(0, &[]),
            piece(0, &[1])[..15].to_vec(),
            piece(0, &[0; MAX_BITS / 8 + 1]),
            vec![0; 7],
        ] {
            assert!(decode_bits(&body, 200).is_err(), "{} bytes", body.len());
        }
    }
}
