//! Memory slots, and the arithmetic between a slot's own page numbers and the dense ones that the
//! migration counts in. Nothing here calls KVM.

use migration::bitmap::PageBitmap;
use migration::layout::{GuestRam, PAGE_SIZE};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// The most pages of one slot, by default: KVM's own limit is 2^31 - 1, and the dirty log counts
/// in 64s.
pub(super) const MAX_SLOT_PAGES: u64 = (1 << 31) - 64;

/// One piece of guest memory as KVM knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// KVM's number of the slot.
    pub id: u32,
    /// Where it is in the guest, in bytes.
    pub guest_addr: u64,
    /// Where it is mapped in this process.
    pub host_addr: u64,
    /// The dense number of its first page.
    pub first_page: u64,
    /// The number of its pages.
    pub pages: u64,
    /// The index of the memory region that it belongs to, and its first page there.
    pub(super) region: (usize, u64),
}

impl Slot {
    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Whether the slot has no page, which is never so.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// The number of words in the slot's bitmap.
    pub(super) fn words(&self) -> u64 {
        self.pages.div_ceil(64)
    }

    /// The slot's own numbers of the pages that it has in common with the `count` dense pages
    /// from `first`; the start is rounded down to a multiple of 64, the end up, as far as the slot
    /// goes.
    pub(super) fn overlap(&self, first: u64, count: u64) -> Option<std::ops::Range<u64>> {
        let end = first.saturating_add(count);
        let from = first.max(self.first_page) - self.first_page;
        let to = end
            .saturating_sub(self.first_page)
            .min(self.pages)
            .next_multiple_of(64)
            .min(self.pages);
        (from < to).then_some(from & !63..to)
    }
}

/// The slots of `ram`, in order, none of them of more than `max_pages`, which is a multiple of 64.
pub(super) fn slots_of(ram: &GuestRam, max_pages: u64) -> Vec<Slot> {
    let mut slots = Vec::new();
    let mut first_page = 0;
    for (index, region) in ram.iter().enumerate() {
        let total = region.len() / PAGE_SIZE;
        let mut done = 0;
        while done < total {
            let pages = (total - done).min(max_pages);
            slots.push(Slot {
                id: slots.len() as u32,
                guest_addr: region.start_addr().raw_value() + done * PAGE_SIZE,
                host_addr: region.as_ptr() as u64 + done * PAGE_SIZE,
                first_page,
                pages,
                region: (index, done),
            });
            done += pages;
            first_page += pages;
        }
    }
    slots
}

/// Fills `words` with the bits of `all` for the slot's own pages `range`, which starts at a
/// multiple of 64, leaving out pages outside of the `count` dense ones from `first`. Whether
/// any is set.
pub(super) fn extract(
    slot: &Slot,
    all: &PageBitmap,
    range: std::ops::Range<u64>,
    (first, count): (u64, u64),
    words: &mut Vec<u64>,
) -> bool {
    let start = slot.first_page + range.start;
    let pages = range.end - range.start;
    let shift = start % 64;
    let Some(source) = all.words(start - shift, pages + shift) else {
        debug_assert!(false, "the bitmap is smaller than the memory");
        return false;
    };
    let end = first.saturating_add(count).min(start + pages);
    words.clear();
    let mut any = 0;
    for index in 0..pages.div_ceil(64) {
        let word_at = |index: u64| source.get(index as usize).copied().unwrap_or(0);
        let mut word = word_at(index) >> shift;
        if shift != 0 {
            word |= word_at(index + 1) << (64 - shift);
        }
        // Bits of pages before `first` and from `end` on don't count.
        let at = start + index * 64;
        word &= above(first.saturating_sub(at)) & !above(end.saturating_sub(at));
        any |= word;
        words.push(word);
    }
    any != 0
}

/// A word with all bits from `bit` on set.
fn above(bit: u64) -> u64 {
    if bit >= 64 { 0 } else { u64::MAX << bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(first_page: u64, pages: u64) -> Slot {
        Slot {
            id: 0,
            guest_addr: 0,
            host_addr: 0,
            first_page,
            pages,
            region: (0, 0),
        }
    }

    /// A reproducible sequence that looks random.
    fn scramble(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[test]
    fn regions_are_cut_into_slots_in_order() {
        let ram = GuestRam::from_ranges(&[
            (vm_memory::GuestAddress(0), 300 << 12),
            (vm_memory::GuestAddress(1 << 32), 5 << 12),
        ])
        .unwrap();
        let slots = slots_of(&ram, 128);
        let facts: Vec<_> = slots
            .iter()
            .map(|s| (s.id, s.guest_addr, s.first_page, s.pages, s.region))
            .collect();
        assert_eq!(
            facts,
            [
                (0, 0, 0, 128, (0, 0)),
                (1, 128 << 12, 128, 128, (0, 128)),
                (2, 256 << 12, 256, 44, (0, 256)),
                (3, 1 << 32, 300, 5, (1, 0)),
            ]
        );
        assert_eq!(slots[1].host_addr - slots[0].host_addr, 128 << 12);
    }

    #[test]
    fn extracting_names_exactly_the_asked_pages_in_ranges_that_kvm_accepts() {
        let mut state = 9;
        let mut words = Vec::new();
        for (first_page, pages) in [(0, 256), (0, 100), (64, 130), (77, 200), (5, 3)] {
            let slot = slot(first_page, pages);
            let total = first_page + pages + 40;
            let mut all = PageBitmap::new(total);
            for word in 0..total.div_ceil(64) {
                let mut value = scramble(&mut state);
                if (word + 1) * 64 > total {
                    value &= (1 << (total % 64)) - 1;
                }
                all.or_words(word * 64, &[value]);
            }
            for first in (0..total).step_by(64) {
                for count in [64, 128, 640] {
                    let mut named = Vec::new();
                    if let Some(range) = slot.overlap(first, count) {
                        assert!(range.start % 64 == 0 && range.end <= pages);
                        let len = range.end - range.start;
                        assert!(len % 64 == 0 || range.end == pages, "as KVM wants it");
                        extract(&slot, &all, range.clone(), (first, count), &mut words);
                        for own in 0..len {
                            if words[own as usize / 64] >> (own % 64) & 1 == 1 {
                                named.push(first_page + range.start + own);
                            }
                        }
                    }
                    let expected: Vec<u64> = (first..first + count)
                        .filter(|&page| page >= first_page && page < first_page + pages)
                        .filter(|&page| all.test(page))
                        .collect();
                    assert_eq!(named, expected, "{slot:?} {first} {count}");
                }
            }
        }
    }
}
