//! The two plain kinds of frame that carry memory, while they are filled: PAGES, and ZERO. For
//! the others see `outgoing`.

use crate::bitmap::PageRun;
use crate::frame::MAX_ZERO_RUNS;
use crate::guest_io::GuestPages;
use crate::message::{AddressRun, encode_pages, encode_zero};

/// Pages in as few runs as there can be, each within one region.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    runs: Vec<PageRun>,
    pages: u64,
    addresses: Vec<AddressRun>,
}

impl Runs {
    /// Adds a run within one region.
    pub(crate) fn add(&mut self, pages: &GuestPages, run: PageRun) {
        self.pages += run.count;
        match self.runs.last_mut() {
            // Regions that touch in the guest need not touch in this process.
            Some(last) if last.end() == run.first && !pages.begins_region(run.first) => {
                last.count += run.count;
            }
            _ => self.runs.push(run),
        }
    }

    /// How many pages are in them.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn as_slice(&self) -> &[PageRun] {
        &self.runs
    }

    /// The same on the wire.
    pub(crate) fn addresses(&mut self, pages: &GuestPages) -> &[AddressRun] {
        self.addresses.clear();
        let addresses = self.runs.iter().map(|run| pages.addresses(*run));
        self.addresses.extend(addresses);
        &self.addresses
    }

    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        self.pages = 0;
    }
}

/// A PAGES frame that is being filled.
#[derive(Debug)]
pub(crate) struct PagesFrame {
    checked: bool,
    runs: Runs,
    crcs: Vec<u32>,
    body: Vec<u8>,
}

impl PagesFrame {
    /// An empty one. Pages that are `checked` go with their checksums.
    pub(crate) fn new(checked: bool) -> Self {
        Self {
            checked,
            runs: Runs::default(),
            crcs: Vec::new(),
            body: Vec::new(),
        }
    }

    /// Adds a page as it is now.
    pub(crate) fn add(&mut self, pages: &GuestPages, page: u64) {
        if self.checked {
            self.crcs.push(pages.crc(page));
        }
        let run = PageRun {
            first: page,
            count: 1,
        };
        self.runs.add(pages, run);
    }

    /// How many pages are in it.
    pub(crate) fn pages(&self) -> u64 {
        self.runs.pages()
    }

    /// Its body, and the runs of pages that follow.
    pub(crate) fn encode(&mut self, pages: &GuestPages) -> (&[u8], &[PageRun]) {
        encode_pages(self.runs.addresses(pages), &self.crcs, &mut self.body);
        (&self.body, &self.runs.runs)
    }

    /// Begins the next one.
    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        self.crcs.clear();
    }
}

/// A ZERO frame that is being filled.
#[derive(Debug, Default)]
pub(crate) struct ZeroFrame {
    runs: Runs,
    body: Vec<u8>,
}

impl ZeroFrame {
    /// Adds a run within one region; it must not be [full](Self::is_full).
    pub(crate) fn add(&mut self, pages: &GuestPages, run: PageRun) {
        self.runs.add(pages, run);
    }

    /// Whether the next run may be one too many.
    pub(crate) fn is_full(&self) -> bool {
        self.runs.runs.len() >= MAX_ZERO_RUNS
    }

    /// Its body, if anything is in it. Begins the next one.
    pub(crate) fn take(&mut self, pages: &GuestPages) -> Option<&[u8]> {
        if self.runs.runs.is_empty() {
            return None;
        }
        encode_zero(self.runs.addresses(pages), &mut self.body);
        self.runs.clear();
        Some(&self.body)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::layout::{GuestRam, PAGE_SIZE};
    use crate::message::{decode_pages, decode_zero};

    /// Two regions that touch, of four pages each; in every page its number.
    fn touching() -> GuestPages {
        let region = 4 * PAGE_SIZE;
        let ranges = [0, 1].map(|index| (GuestAddress(index * region), region as usize));
        let ram = GuestRam::from_ranges(&ranges).unwrap();
        for page in 0..8 {
            ram.write_obj(page, GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        GuestPages::new(ram).unwrap()
    }

    fn at(page: u64, pages: u64) -> AddressRun {
        AddressRun {
            address: page * PAGE_SIZE,
            pages,
        }
    }

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first, count }
    }

    #[test]
    fn runs_are_as_long_as_they_can_be_within_a_region() {
        let pages = touching();
        let mut frame = PagesFrame::new(true);
        let (mut addresses, mut crcs) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            for page in [1, 2, 3, 4, 5, 7] {
                frame.add(&pages, page);
            }
            assert_eq!(frame.pages(), 6);
            let (body, runs) = frame.encode(&pages);
            assert_eq!(runs, [run(1, 3), run(4, 2), run(7, 1)]);
            let payload = (6 * PAGE_SIZE) as u32;
            decode_pages(body, payload, true, &mut addresses, &mut crcs).unwrap();
            assert_eq!(addresses, [at(1, 3), at(4, 2), at(7, 1)]);
            let expected = [1, 2, 3, 4, 5, 7].map(|page| pages.crc(page));
            assert_eq!(crcs, expected);
            frame.clear();
            assert_eq!(frame.pages(), 0);
        }
    }

    #[test]
    fn pages_that_go_without_checksums_are_counted_all_the_same() {
        let pages = touching();
        let mut frame = PagesFrame::new(false);
        for page in [1, 2, 7] {
            frame.add(&pages, page);
        }
        assert_eq!(frame.pages(), 3);
        let (body, runs) = frame.encode(&pages);
        assert_eq!(runs, [run(1, 2), run(7, 1)]);
        let (mut addresses, mut crcs) = (Vec::new(), Vec::new());
        let payload = (3 * PAGE_SIZE) as u32;
        decode_pages(body, payload, false, &mut addresses, &mut crcs).unwrap();
        assert_eq!(addresses, [at(1, 2), at(7, 1)]);
        assert!(crcs.is_empty());
        frame.clear();
        assert_eq!(frame.pages(), 0);
    }

    #[test]
    fn zeroes_too() {
        let pages = touching();
        let mut frame = ZeroFrame::default();
        assert_eq!(frame.take(&pages), None);
        for part in [run(0, 2), run(2, 2), run(4, 1), run(5, 1), run(7, 1)] {
            frame.add(&pages, part);
        }
        let mut addresses = Vec::new();
        decode_zero(frame.take(&pages).unwrap(), &mut addresses).unwrap();
        assert_eq!(addresses, [at(0, 4), at(4, 2), at(7, 1)]);
        assert_eq!(frame.take(&pages), None);
    }

    #[test]
    fn a_full_frame_of_zeroes_can_be_decoded() {
        let pages = 2 * MAX_ZERO_RUNS as u64;
        let ranges = [(GuestAddress(0), (pages * PAGE_SIZE) as usize)];
        let pages = GuestPages::new(GuestRam::from_ranges(&ranges).unwrap()).unwrap();
        let mut frame = ZeroFrame::default();
        let mut added = 0;
        while !frame.is_full() {
            frame.add(&pages, run(added * 2, 1));
            added += 1;
        }
        let mut addresses = Vec::new();
        decode_zero(frame.take(&pages).unwrap(), &mut addresses).unwrap();
        assert_eq!(addresses.len() as u64, added);
        assert!(!frame.is_full());
    }
}
