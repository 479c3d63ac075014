//! What is behind the pages of guest memory: whether there is anything, having it backed, giving it
//! back.
#![allow(unsafe_code, reason = "the kernel is told of ranges of mapped memory")]

use std::fs::File;
use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::GuestPages;
use crate::bitmap::PageRun;
use crate::holes;
use crate::layout::PAGE_SIZE;
use crate::message::AddressRun;
use crate::pagemap::Pagemap;

/// How many pages the kernel is asked about at once.
const MINCORE_PAGES: usize = 512;

/// The kernel doesn't take pages of guest memory back.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot drop {} pages of guest memory at {:#x}: {error}{}",
    .run.pages, .run.address, locked_hint(.error)
)]
pub struct DiscardError {
    run: AddressRun,
    error: io::Error,
}

fn locked_hint(error: &io::Error) -> &'static str {
    // For memory that is locked, madvise says EINVAL.
    match error.raw_os_error() {
        Some(libc::EINVAL) => " (locked memory can't be dropped)",
        _ => "",
    }
}

impl GuestPages {
    /// Puts into `runs` the parts of a run within one region that may hold something; page numbers
    /// are relative to it. `false` if that is not known.
    pub(crate) fn touched(
        &self,
        run: PageRun,
        pagemap: &mut Pagemap,
        runs: &mut Vec<PageRun>,
    ) -> bool {
        if let Some(host) = self.private_host_address(run.first) {
            pagemap.touched(host, run.count, runs);
            return true;
        }
        let file = self.sparse_file(run);
        file.is_some_and(|(file, at)| holes::between(file, at, run.count, runs).is_ok())
    }

    /// How many pages at the beginning of a run within one region certainly hold nothing; not all of
    /// them, where that would take long to find out.
    pub(crate) fn untouched(&self, run: PageRun, pagemap: &mut Pagemap) -> u64 {
        match self.private_host_address(run.first) {
            Some(host) => pagemap.untouched(host, run.count),
            None => 0,
        }
    }

    /// How many bytes may hold something. Looks at the page map of all of the memory, which takes
    /// milliseconds a GiB.
    pub fn touched_bytes(&self) -> u64 {
        let pages = self.layout.pages();
        let (mut pagemap, mut runs) = (Pagemap::open(), Vec::new());
        let (mut at, mut touched) = (0, 0);
        while at < pages {
            let run = self.within_region(PageRun {
                first: at,
                count: pages - at,
            });
            at = run.end();
            runs.clear();
            touched += match self.touched(run, &mut pagemap, &mut runs) {
                true => runs.iter().map(|run| run.count).sum(),
                false => run.count,
            };
        }
        touched * PAGE_SIZE
    }

    /// A tmpfs file that has the pages of a run within one region, and where in it, in bytes: where
    /// that has a hole, memory is zero.
    fn sparse_file(&self, run: PageRun) -> Option<(&File, u64)> {
        let address = GuestAddress(self.addresses(run).address);
        let region = self.ram.find_region(address)?;
        let file = region
            .file_offset()
            .filter(|_| !self.region(run.first).private)?;
        let offset = file.start() + (address.0 - region.start_addr().0);
        holes::are_told(file.file()).then_some((file.file(), offset))
    }

    /// The host address of a page if it is private anonymous memory, of which the page map tells
    /// the truth.
    fn private_host_address(&self, page: u64) -> Option<u64> {
        let region = self.region(page);
        region.private.then(|| self.host(page) as u64)
    }

    /// Asks the kernel to back a run within one region with memory, all at once, which is faster
    /// than a fault for each page. Only a hint: what fails here is repeated by the fault.
    pub fn populate(&self, run: PageRun) {
        let run = self.within_region(run);
        if self.is_resident(run) {
            // As huge pages or preallocated memory are: looking at that once more costs a third of
            // what receiving it does.
            return;
        }
        // SAFETY: the range is mapped guest memory; populating it changes no contents.
        unsafe {
            libc::madvise(
                self.host(run.first).cast(),
                (run.count * PAGE_SIZE) as usize,
                libc::MADV_POPULATE_WRITE,
            )
        };
    }

    /// Whether all pages of a run within one region have memory behind them already.
    fn is_resident(&self, run: PageRun) -> bool {
        let mut resident = [0_u8; MINCORE_PAGES];
        (run.first..run.end()).step_by(MINCORE_PAGES).all(|first| {
            let count = (run.end() - first).min(MINCORE_PAGES as u64);
            // SAFETY: the range is mapped guest memory, and there is a byte for each of its pages.
            let result = unsafe {
                libc::mincore(
                    self.host(first).cast(),
                    (count * PAGE_SIZE) as usize,
                    resident.as_mut_ptr(),
                )
            };
            let pages = resident.iter().take(count as usize);
            result == 0 && pages.fold(1, |all, page| all & page) == 1
        })
    }

    /// Gives the memory of a run within one region back to the kernel: nothing is mapped there
    /// any more, and whoever touches it finds zeroes, or waits where a userfaultfd watches.
    pub fn discard(&self, run: PageRun) -> Result<(), DiscardError> {
        let run = self.within_region(run);
        // Of a shared mapping, MADV_DONTNEED would drop the page tables and keep the contents.
        let advice = match self.region(run.first).private {
            true => libc::MADV_DONTNEED,
            false => libc::MADV_REMOVE,
        };
        // SAFETY: the range is mapped guest memory, which belongs to the guest: no reference to it
        // exists in this process, so its contents may change.
        let result = unsafe {
            libc::madvise(
                self.host(run.first).cast(),
                (run.count * PAGE_SIZE) as usize,
                advice,
            )
        };
        if result == 0 {
            return Ok(());
        }
        Err(DiscardError {
            run: self.addresses(run),
            error: io::Error::last_os_error(),
        })
    }

    /// The same for all of the memory, of which nothing is needed any more, or is there yet.
    pub fn discard_all(&self) -> Result<(), DiscardError> {
        self.regions.iter().try_for_each(|region| {
            self.discard(PageRun {
                first: region.first,
                count: region.pages,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::tests::memory;
    use super::*;
    use crate::layout::GuestRam;

    #[test]
    fn discarded_pages_of_shared_memory_are_gone_too() {
        let file = tempfile::tempfile().unwrap();
        let len = 4 * PAGE_SIZE;
        file.set_len(len).unwrap();
        let file = vm_memory::FileOffset::new(file, 0);
        let range = (GuestAddress(0), len as usize, Some(file));
        let ram = GuestRam::from_ranges_with_files([range]).unwrap();
        let pages = GuestPages::new(ram.clone()).unwrap();
        for page in 0..4u64 {
            ram.write_obj(page + 1, GuestAddress(page * PAGE_SIZE))
                .unwrap();
        }
        pages.discard(PageRun { first: 1, count: 2 }).unwrap();
        for page in 0..4 {
            assert_eq!(pages.is_zero(page), (1..3).contains(&page), "page {page}");
        }
    }

    #[test]
    fn memory_is_resident_once_it_is_populated_and_until_it_is_discarded() {
        let (_, pages) = memory();
        let (all, part) = (
            PageRun { first: 0, count: 8 },
            PageRun { first: 2, count: 3 },
        );
        assert!(!pages.is_resident(part));
        pages.populate(part);
        assert!(pages.is_resident(part) && !pages.is_resident(all));
        pages.populate(all);
        assert!(pages.is_resident(all));
        pages.discard(part).unwrap();
        assert!(!pages.is_resident(all) && !pages.is_resident(part));
    }

    #[test]
    fn discarded_pages_are_gone_and_locked_ones_are_refused() {
        let (ram, pages) = memory();
        for page in 0..8u64 {
            ram.write_obj(page + 1, GuestAddress(page * PAGE_SIZE))
                .unwrap();
        }
        pages.discard(PageRun { first: 2, count: 3 }).unwrap();
        for page in 0..8 {
            assert_eq!(pages.is_zero(page), (2..5).contains(&page), "page {page}");
        }
        // SAFETY: a page of the test's own memory; locking it changes no contents.
        let locked = unsafe { libc::mlock(pages.host(6).cast(), PAGE_SIZE as usize) };
        if locked != 0 {
            return guest_tests::driver::skip("in part: cannot lock a page of memory");
        }
        let error = pages.discard(PageRun { first: 6, count: 1 }).unwrap_err();
        assert!(error.to_string().contains("locked memory"), "{error}");
        assert!(!pages.is_zero(6));
    }
}
