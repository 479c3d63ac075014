//! A set of pages.

/// A set of page numbers from 0 up to a fixed number of pages, a bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl PageBitmap {
    /// An empty set of numbers below `pages`.
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            pages,
        }
    }

    /// Adds `count` pages from `first`.
    pub fn set_range(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            self.words[page as usize / 64] |= 1 << (page % 64);
        }
    }

    /// Adds the pages set in `words`, whose first bit is `first`, a multiple of 64.
    pub fn or_words(&mut self, first: u64, words: &[u64]) {
        for (to, from) in self.words[first as usize / 64..].iter_mut().zip(words) {
            *to |= from;
        }
    }

    /// The words of the `count` pages from `first`, a multiple of 64.
    pub fn words(&self, first: u64, count: u64) -> &[u64] {
        let last = (first + count).min(self.pages).div_ceil(64) as usize;
        &self.words[first as usize / 64..last]
    }
}
