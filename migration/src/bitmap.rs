//! A set of pages, or of the blocks of a disk.

/// A set of the blocks of a disk, of [`BLOCK_SIZE`](crate::disk::BLOCK_SIZE) bytes each. What is
/// said here of pages goes for blocks.
pub type BlockBitmap = PageBitmap;

/// A set of page numbers from 0 up to a fixed number of pages, a bit each.
///
/// Bit `n` of the set is bit `n % 64` of word `n / 64`, as in the dirty bitmaps of KVM. Bits past
/// the last page are always zero. Page numbers past the end are ignored by what changes the set
/// and not in it for what reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

/// A run of consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first page's number.
    pub first: u64,
    /// How many pages; never zero.
    pub count: u64,
}

impl PageRun {
    /// The number of the page after the last one.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

const BITS: u64 = 64;

/// The bits of a word from `from` up to and without `to`; `from < 64`, `to` 1 to 64.
fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (BITS - to))
}

impl PageBitmap {
    /// The empty set over `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(BITS) as usize],
            pages,
        }
    }

    /// The set of all pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        set.set_range(0, pages);
        set
    }

    /// How many pages there are, in the set or not.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds a page.
    pub fn set(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / BITS) as usize] |= 1 << (page % BITS);
        }
    }

    /// Removes a page.
    pub fn clear(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / BITS) as usize] &= !(1 << (page % BITS));
        }
    }

    /// Whether the page is in the set.
    pub fn test(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / BITS) as usize] >> (page % BITS) & 1 == 1
    }

    /// Adds `count` pages from `first`.
    pub fn set_range(&mut self, first: u64, count: u64) {
        self.each_word(first, count, |word, mask| *word |= mask);
    }

    /// Removes `count` pages from `first`.
    pub fn clear_range(&mut self, first: u64, count: u64) {
        self.each_word(first, count, |word, mask| *word &= !mask);
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// How many of the `count` pages from `first` are in the set.
    pub fn count_range(&self, first: u64, count: u64) -> u64 {
        let end = first.saturating_add(count).min(self.pages);
        let mut total = 0;
        let mut page = first;
        while page < end {
            let to = (page / BITS + 1) * BITS;
            let word = self.words[(page / BITS) as usize];
            let top = if to <= end { BITS } else { end % BITS };
            total += u64::from((word & mask(page % BITS, top)).count_ones());
            page = to;
        }
        total
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Adds the pages whose bits are set in `words`, of which bit 0 is page `first_page`. So a
    /// slot's dirty log joins the whole; bits past the last page are ignored.
    pub fn or_words(&mut self, first_page: u64, words: &[u64]) {
        let shift = first_page % BITS;
        let start = first_page / BITS;
        let len = self.words.len() as u64;
        for (&bits, index) in words.iter().zip(start..) {
            if index >= len {
                break;
            }
            if bits == 0 {
                continue;
            }
            self.words[index as usize] |= bits << shift;
            if shift != 0 && index + 1 < len {
                self.words[index as usize + 1] |= bits >> (BITS - shift);
            }
        }
        self.trim();
    }

    /// Adds every page of `other`, which has as many pages.
    pub fn or(&mut self, other: &Self) {
        self.or_words(0, &other.words);
    }

    /// Removes every page of `other`, which has as many pages.
    pub fn remove(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// The words of the `count` pages from `first`, which is a multiple of 64: what
    /// `KVM_CLEAR_DIRTY_LOG` takes. The last word may hold pages past the range. `None` if the
    /// range is not within the pages or `first` is not a multiple of 64.
    pub fn words(&self, first: u64, count: u64) -> Option<&[u64]> {
        let end = first.checked_add(count)?;
        if !first.is_multiple_of(BITS) || end > self.pages {
            return None;
        }
        self.words
            .get((first / BITS) as usize..end.div_ceil(BITS) as usize)
    }

    /// The first page in the set from `from` on.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        self.next_set_before(from, self.pages)
    }

    /// The first page in the set from `from` on and before `end`. What follows isn't looked at, so
    /// that going over a large set range by range takes no longer than in one go.
    pub fn next_set_before(&self, from: u64, end: u64) -> Option<u64> {
        self.next(from, end, |word| word)
    }

    /// The first page not in the set from `from` on and before `end`; what follows isn't looked at.
    pub fn next_clear_before(&self, from: u64, end: u64) -> Option<u64> {
        self.next(from, end, |word| !word)
    }

    /// The runs of pages in the set among the `count` pages from `first`, ascending, each at most
    /// `longest` pages long (longer ones come in pieces).
    pub fn runs(&self, first: u64, count: u64, longest: u64) -> Runs<'_> {
        Runs {
            set: self,
            next: first,
            end: first.saturating_add(count).min(self.pages),
            longest: longest.max(1),
        }
    }

    fn next(&self, from: u64, end: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        let end = end.min(self.pages);
        if from >= end {
            return None;
        }
        let start = from / BITS;
        let words = &self.words[start as usize..end.div_ceil(BITS) as usize];
        let (head, rest) = words.split_first()?;
        let head = view(*head) & mask(from % BITS, BITS);
        let (word, index) = if head != 0 {
            (head, start)
        } else {
            let mut rest = rest.iter().map(|&word| view(word)).zip(start + 1..);
            rest.find(|&(word, _)| word != 0)?
        };
        Some(index * BITS + u64::from(word.trailing_zeros())).filter(|&page| page < end)
    }

    fn each_word(&mut self, first: u64, count: u64, change: impl Fn(&mut u64, u64)) {
        let end = first.saturating_add(count).min(self.pages);
        let mut page = first;
        while page < end {
            let to = (page / BITS + 1) * BITS;
            let top = if to <= end { BITS } else { end % BITS };
            change(
                &mut self.words[(page / BITS) as usize],
                mask(page % BITS, top),
            );
            page = to;
        }
    }

    fn trim(&mut self) {
        let tail = self.pages % BITS;
        if let (Some(last), true) = (self.words.last_mut(), tail != 0) {
            *last &= mask(0, tail);
        }
    }
}

/// The runs of a [`PageBitmap`]; see [`PageBitmap::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    set: &'a PageBitmap,
    next: u64,
    end: u64,
    longest: u64,
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let first = self.set.next_set_before(self.next, self.end)?;
        let end = self.end.min(first.saturating_add(self.longest));
        let end = self.set.next_clear_before(first, end).unwrap_or(end);
        self.next = end;
        Some(PageRun {
            first,
            count: end - first,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a set of pages does, a page at a time.
    #[derive(Clone, Debug)]
    enum Change {
        Set(u64),
        Clear(u64),
        SetRange(u64, u64),
        ClearRange(u64, u64),
        Or(u64, Vec<u64>),
    }

    fn change() -> impl Strategy<Value = Change> {
        let page = || 0u64..300;
        prop_oneof![
            page().prop_map(Change::Set),
            page().prop_map(Change::Clear),
            (page(), page()).prop_map(|(a, b)| Change::SetRange(a, b)),
            (page(), page()).prop_map(|(a, b)| Change::ClearRange(a, b)),
            (page(), prop::collection::vec(any::<u64>(), 0..4))
                .prop_map(|(a, words)| Change::Or(a, words)),
        ]
    }

    fn apply(oracle: &mut [bool], set: &mut PageBitmap, change: &Change) {
        let mut write = |first: u64, count: u64, value: bool| {
            for page in first..first + count {
                if let Some(bit) = oracle.get_mut(page as usize) {
                    *bit = value;
                }
            }
        };
        match change {
            Change::Set(page) => {
                write(*page, 1, true);
                set.set(*page);
            }
            Change::Clear(page) => {
                write(*page, 1, false);
                set.clear(*page);
            }
            Change::SetRange(first, count) => {
                write(*first, *count, true);
                set.set_range(*first, *count);
            }
            Change::ClearRange(first, count) => {
                write(*first, *count, false);
                set.clear_range(*first, *count);
            }
            Change::Or(first, words) => {
                for bit in 0..words.len() as u64 * 64 {
                    if words[(bit / 64) as usize] >> (bit % 64) & 1 == 1 {
                        write(first + bit, 1, true);
                    }
                }
                set.or_words(*first, words);
            }
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_of_booleans(
            pages in 0u64..260,
            changes in prop::collection::vec(change(), 0..12),
            range in (0u64..280, 0u64..280),
            longest in 1u64..70,
        ) {
            let mut oracle = vec![false; pages as usize];
            let mut set = PageBitmap::new(pages);
            for change in &changes {
                apply(&mut oracle, &mut set, change);
            }
            for page in 0..300 {
                let expected = oracle.get(page as usize).copied().unwrap_or(false);
                prop_assert_eq!(set.test(page), expected);
            }
            let count = |range: std::ops::Range<u64>| {
                range.filter(|&p| oracle.get(p as usize) == Some(&true)).count() as u64
            };
            prop_assert_eq!(set.count(), count(0..pages));
            prop_assert_eq!(set.is_empty(), count(0..pages) == 0);
            let (first, len) = range;
            prop_assert_eq!(set.count_range(first, len), count(first..first + len));

            let mut seen = vec![];
            let mut last_end = 0;
            for run in set.runs(first, len, longest) {
                prop_assert!(run.count >= 1 && run.count <= longest && run.first >= last_end);
                last_end = run.end();
                seen.extend(run.first..run.end());
            }
            let expected: Vec<u64> = (first..first + len).filter(|&p| set.test(p)).collect();
            prop_assert_eq!(seen, expected);
            let mut within = first..(first + len).min(pages);
            let next = set.next_set_before(first, first + len);
            prop_assert_eq!(next, within.clone().find(|&page| set.test(page)));
            let next = set.next_clear_before(first, first + len);
            prop_assert_eq!(next, within.find(|&page| !set.test(page)));
        }
    }

    #[test]
    fn words_are_those_of_the_range() {
        let mut set = PageBitmap::new(200);
        set.set(64);
        set.set(199);
        assert_eq!(set.words(64, 64), Some(&[1u64][..]));
        assert_eq!(set.words(128, 72), Some(&[0, 1 << 7][..]));
        assert_eq!(set.words(1, 64), None);
        assert_eq!(set.words(192, 64), None);
        assert_eq!(PageBitmap::full(200).count(), 200);
    }

    #[test]
    fn what_follows_a_range_is_not_looked_at() {
        // 2 TiB of 4 KiB pages. Looked over once for each range, the set would take hours.
        let pages = 1 << 29;
        for (set, expected) in [
            (PageBitmap::new(pages), 0),
            (PageBitmap::full(pages), pages),
        ] {
            let ranges = (0..pages).step_by(512);
            let runs = ranges.flat_map(|first| set.runs(first, 512, 64));
            assert_eq!(runs.map(|run| run.count).sum::<u64>(), expected);
        }
    }

    #[test]
    fn long_runs_come_in_pieces() {
        let set = PageBitmap::full(1000);
        let runs: Vec<_> = set.runs(10, 900, 512).collect();
        assert_eq!(
            runs,
            [
                PageRun {
                    first: 10,
                    count: 512
                },
                PageRun {
                    first: 522,
                    count: 388
                }
            ]
        );
    }
}
