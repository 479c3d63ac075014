//! What was sent of the pages that are written again and again, up to a set size.

use super::{Page, delta};
use crate::layout::PAGE_SIZE;

/// How many rounds a page stays in its place without being sent, though another wants it. If the guest
/// writes to more than fits, a part of that is served from the cache in each round; else all of
/// it would be replaced before it is of use.
const LIFETIME: u64 = 2;

/// A size that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the size of the XBZRLE cache must be a power of two of at least 4096 bytes, not {0} bytes"
)]
pub struct SizeError(u64);

/// How a page is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// As a difference of that many bytes.
    Delta(usize),
    /// Whole: it was not in the cache.
    Miss,
    /// Whole: it has changed too much.
    Overflow,
}

struct Slot {
    page: u64,
    round: u64,
    data: Box<Page>,
}

/// The cache: a page has one place, by its number, which it may have to share.
pub struct Cache {
    size: u64,
    slots: Vec<Option<Slot>>,
    used: u64,
    round: u64,
}

impl Cache {
    /// Whether it is a size: a power of two that holds a page.
    pub fn check_size(size: u64) -> Result<(), SizeError> {
        if size >= PAGE_SIZE && size.is_power_of_two() {
            Ok(())
        } else {
            Err(SizeError(size))
        }
    }

    /// An empty cache of `size` bytes for a guest of `pages` pages. Memory is taken only as pages
    /// come in, and there are no more places than the guest has pages.
    pub fn new(size: u64, pages: u64) -> Result<Self, SizeError> {
        Self::check_size(size)?;
        let slots = (size / PAGE_SIZE).min(pages.max(1).next_power_of_two());
        Ok(Self {
            size,
            slots: std::iter::repeat_with(|| None)
                .take(slots as usize)
                .collect(),
            used: 0,
            round: 0,
        })
    }

    /// The size that it was made with, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many pages are in it.
    pub fn pages(&self) -> u64 {
        self.used
    }

    /// A round begins, in which each page comes once.
    pub fn begin_round(&mut self) {
        self.round += 1;
    }

    /// The page is sent with these contents. Says how, and appends the difference to `delta`
    /// if it is one. Whichever it is, these contents must be what is sent: they may be what the
    /// next difference is to.
    pub fn exchange(&mut self, page: u64, new: &Page, delta: &mut Vec<u8>) -> Exchange {
        let round = self.round;
        let Some(place) = self.place(page) else {
            return Exchange::Miss;
        };
        match place {
            Some(slot) if slot.page == page => {
                let len = delta::encode(&slot.data, new, delta);
                slot.data.copy_from_slice(new);
                slot.round = round;
                len.map_or(Exchange::Overflow, Exchange::Delta)
            }
            Some(slot) => {
                if slot.round + LIFETIME <= round {
                    slot.data.copy_from_slice(new);
                    slot.page = page;
                    slot.round = round;
                }
                Exchange::Miss
            }
            empty => {
                *empty = Some(Slot {
                    page,
                    round,
                    data: Box::new(*new),
                });
                self.used += 1;
                Exchange::Miss
            }
        }
    }

    /// The destination has something else in these pages now.
    pub fn forget(&mut self, first: u64, count: u64) {
        // Runs of untouched pages are long, and come while nothing is in the cache.
        if self.used == 0 {
            return;
        }
        let mut forgotten = 0;
        let mut forget = |slot: &mut Option<Slot>| {
            if slot
                .as_ref()
                .is_some_and(|slot| slot.page.checked_sub(first).is_some_and(|at| at < count))
            {
                *slot = None;
                forgotten += 1;
            }
        };
        if count < self.slots.len() as u64 {
            let mask = self.slots.len() - 1;
            for page in first..first + count {
                if let Some(slot) = self.slots.get_mut(page as usize & mask) {
                    forget(slot);
                }
            }
        } else {
            self.slots.iter_mut().for_each(forget);
        }
        self.used -= forgotten;
    }

    fn place(&mut self, page: u64) -> Option<&mut Option<Slot>> {
        let mask = self.slots.len() - 1;
        self.slots.get_mut(page as usize & mask)
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache")
            .field("size", &self.size)
            .field("pages", &self.used)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(value: u8) -> Page {
        [value; 4096]
    }

    fn changed(value: u8) -> Page {
        let mut page = page(value);
        page[100] ^= 1;
        page
    }

    #[test]
    fn sizes_are_qemus() {
        for size in [4096, 8192, 64 << 20, 1 << 40] {
            assert_eq!(Cache::check_size(size), Ok(()));
        }
        for size in [0, 1, 2048, 4097, 12288, u64::MAX] {
            assert_eq!(Cache::check_size(size), Err(SizeError(size)));
        }
        // Places beyond the guest's pages would be of no use.
        let cache = Cache::new(1 << 62, 1000).unwrap();
        assert_eq!((cache.size(), cache.slots.len()), (1 << 62, 1024));
    }

    #[test]
    fn a_page_that_was_sent_goes_as_a_difference() {
        let mut cache = Cache::new(64 << 10, 100).unwrap();
        let mut delta = vec![];
        assert_eq!(cache.exchange(7, &page(1), &mut delta), Exchange::Miss);
        assert!(delta.is_empty());
        assert_eq!(
            cache.exchange(7, &changed(1), &mut delta),
            Exchange::Delta(12)
        );
        let mut there = page(1);
        delta::apply(&delta, &mut there).unwrap();
        assert!(there == changed(1));
        // Too much has changed: whole, and the next difference is to that.
        delta.clear();
        assert_eq!(cache.exchange(7, &page(2), &mut delta), Exchange::Overflow);
        assert!(delta.is_empty());
        assert_eq!(cache.exchange(7, &page(2), &mut delta), Exchange::Delta(0));
    }

    #[test]
    fn what_was_told_otherwise_is_forgotten() {
        let mut cache = Cache::new(64 << 10, 100).unwrap();
        for number in 0..16 {
            cache.exchange(number, &page(1), &mut vec![]);
        }
        assert_eq!(cache.pages(), 16);
        cache.forget(3, 2);
        cache.forget(3, 2);
        assert_eq!(cache.pages(), 14);
        for (number, expected) in [
            (2, Exchange::Delta(0)),
            (3, Exchange::Miss),
            (4, Exchange::Miss),
            (5, Exchange::Delta(0)),
        ] {
            assert_eq!(cache.exchange(number, &page(1), &mut vec![]), expected);
        }
        // The same place, but another page.
        cache.forget(16, 16);
        assert_eq!(cache.pages(), 16);
        cache.forget(5, u64::MAX - 5);
        assert_eq!(cache.pages(), 5);
    }

    /// Pages 0 and 16 share a place.
    #[test]
    fn a_page_of_late_keeps_its_place() {
        let mut cache = Cache::new(64 << 10, 100).unwrap();
        let send = |cache: &mut Cache, number| cache.exchange(number, &page(1), &mut vec![]);
        cache.begin_round();
        assert_eq!(send(&mut cache, 0), Exchange::Miss);
        cache.begin_round();
        assert_eq!(send(&mut cache, 16), Exchange::Miss);
        assert_eq!(send(&mut cache, 0), Exchange::Delta(0));
        cache.begin_round();
        assert_eq!(send(&mut cache, 16), Exchange::Miss);
        cache.begin_round();
        assert_eq!(send(&mut cache, 16), Exchange::Miss);
        assert_eq!(send(&mut cache, 16), Exchange::Delta(0));
        assert_eq!(cache.pages(), 1);
    }

    #[derive(Clone, Debug)]
    enum Event {
        Round,
        Send(u64, u8),
        Zero(u64, u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            1 => Just(Event::Round),
            6 => (0..40u64, 0..4u8).prop_map(|(page, value)| Event::Send(page, value)),
            1 => (0..40u64, 1..20u64).prop_map(|(first, count)| Event::Zero(first, count)),
        ]
    }

    proptest! {
        /// A destination that does what it is told has what the source has, whatever is sent.
        #[test]
        fn both_sides_agree(
            events in prop::collection::vec(event(), 0..200),
            slots in 0..6u32,
        ) {
            let mut cache = Cache::new(4096 << slots, 60).unwrap();
            let mut there = vec![page(0); 60];
            for event in events {
                match event {
                    Event::Round => cache.begin_round(),
                    Event::Send(number, value) => {
                        let mut new = page(number as u8 / 8);
                        new[..usize::from(value) * 700].fill(value);
                        let mut delta = vec![];
                        let there = &mut there[number as usize];
                        match cache.exchange(number, &new, &mut delta) {
                            Exchange::Delta(_) => delta::apply(&delta, there).unwrap(),
                            Exchange::Miss | Exchange::Overflow => *there = new,
                        }
                        prop_assert!(*there == new);
                    }
                    Event::Zero(first, count) => {
                        cache.forget(first, count);
                        there[first as usize..(first + count) as usize].fill(page(0));
                    }
                }
                let used = cache.slots.iter().flatten().count() as u64;
                prop_assert_eq!(cache.pages(), used);
            }
        }
    }
}
