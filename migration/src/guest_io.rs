//! Guest memory by page number, and moving it between memory and a socket without a copy: the
//! one place where the engine touches guest memory.
#![allow(
    unsafe_code,
    reason = "guest memory goes to and from the socket straight, as vectors of raw ranges"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::bitmap::PageRun;
use crate::holes;
use crate::layout::{GuestRam, Layout, LayoutError, PAGE_SIZE};
use crate::message::AddressRun;
use crate::pagemap::Pagemap;
use crate::xbzrle::Page;
use crate::zero;

/// How many pages the kernel is asked about at once.
const MINCORE_PAGES: usize = 512;

/// Guest memory, by page number.
#[derive(Debug)]
pub struct GuestPages {
    layout: Layout,
    regions: Vec<Mapped>,
    /// Has the mappings that `regions` points into.
    ram: GuestRam,
}

#[derive(Clone, Copy, Debug)]
struct Mapped {
    first: u64,
    pages: u64,
    address: u64,
    host: *mut u8,
    private: bool,
}

// SAFETY: `host` points into a mapping that `GuestPages` keeps, for as long as it lives, and that
// may be used from any thread. Nothing here makes a reference to it: it is read and written through
// raw pointers and by system calls, as memory that the guest's own threads change at any moment.
unsafe impl Send for Mapped {}
// SAFETY: as above; the fields themselves never change.
unsafe impl Sync for Mapped {}

/// Why guest memory cannot be used, or a run of it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The layout is none.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A region's mapping doesn't begin at a page.
    #[error("guest memory at {0:#x} is not mapped at a page boundary")]
    Unaligned(u64),
    /// A run from the peer that is not RAM.
    #[error(
        "{} pages at {:#x} are not within one region of guest RAM", .0.pages, .0.address
    )]
    Outside(AddressRun),
}

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
    /// Numbers the pages of `ram`.
    pub fn new(ram: GuestRam) -> Result<Self, MemoryError> {
        let layout = Layout::of(&ram)?;
        let mut first = 0;
        let mut regions = Vec::new();
        for (region, mapping) in layout.regions().iter().zip(ram.iter()) {
            let host = mapping.as_ptr();
            if !(host as u64).is_multiple_of(PAGE_SIZE) || mapping.len() != region.len {
                return Err(MemoryError::Unaligned(region.start));
            }
            let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            regions.push(Mapped {
                first,
                pages: region.pages(),
                address: region.start,
                host,
                private: mapping.flags() & private == private && mapping.file_offset().is_none(),
            });
            first += region.pages();
        }
        Ok(Self {
            layout,
            regions,
            ram,
        })
    }

    /// Where the RAM is.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The page numbers of a run that came from a peer: it must be within one region.
    pub fn resolve(&self, run: AddressRun) -> Result<PageRun, MemoryError> {
        let outside = || MemoryError::Outside(run);
        let index = self.regions.partition_point(|r| r.address <= run.address);
        let region = index
            .checked_sub(1)
            .and_then(|index| self.regions.get(index))
            .ok_or_else(outside)?;
        let offset = run.address - region.address;
        let page = offset / PAGE_SIZE;
        let fits = offset.is_multiple_of(PAGE_SIZE)
            && run.pages > 0
            && page < region.pages
            && run.pages <= region.pages - page;
        fits.then_some(PageRun {
            first: region.first + page,
            count: run.pages,
        })
        .ok_or_else(outside)
    }

    /// The guest physical addresses of a run within one region; see [`Self::within_region`].
    pub fn addresses(&self, run: PageRun) -> AddressRun {
        let region = self.region(run.first);
        AddressRun {
            address: region.address + (run.first - region.first) * PAGE_SIZE,
            pages: run.count,
        }
    }

    /// The beginning of `run` that is within one region; the whole run if it is.
    pub fn within_region(&self, run: PageRun) -> PageRun {
        let region = self.region(run.first);
        let left = region.first + region.pages - run.first;
        PageRun {
            first: run.first,
            count: run.count.min(left),
        }
    }

    /// Whether the page is the first of a region.
    pub(crate) fn begins_region(&self, page: u64) -> bool {
        self.region(page).first == page
    }

    /// The host address of a page if it is private anonymous memory, of which the page map tells
    /// the truth.
    fn private_host_address(&self, page: u64) -> Option<u64> {
        let region = self.region(page);
        region.private.then(|| self.host(page) as u64)
    }

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

    /// Whether the page is all zero.
    pub fn is_zero(&self, page: u64) -> bool {
        // SAFETY: `host` points to a whole, mapped, aligned page of guest memory.
        unsafe { zero::is_zero(self.host(page)) }
    }

    /// Copies a page out.
    pub fn read(&self, page: u64, copy: &mut Page) {
        // SAFETY: `host` points to a whole, mapped page of guest memory, in which nothing of this
        // process lies, so that it does not overlap with `copy`. A guest that writes meanwhile
        // makes it a mix of old and new.
        unsafe { std::ptr::copy_nonoverlapping(self.host(page), copy.as_mut_ptr(), copy.len()) };
    }

    /// Replaces a page's contents.
    pub fn write(&self, page: u64, contents: &Page) {
        // SAFETY: as for `read`; no reference to the page exists in this process.
        unsafe {
            let host = self.host(page);
            std::ptr::copy_nonoverlapping(contents.as_ptr(), host, contents.len());
        };
    }

    /// The page's CRC32.
    pub fn crc(&self, page: u64) -> u32 {
        // SAFETY: `host` points to a whole, mapped, aligned page of guest memory.
        unsafe { zero::page_crc(self.host(page)) }
    }

    /// Fills a run with zeroes.
    pub fn fill_zero(&self, run: PageRun) {
        for page in run.first..run.end() {
            // SAFETY: `host` points to a whole, mapped page of guest memory, which belongs to the
            // guest: no reference to it exists in this process.
            unsafe { std::ptr::write_bytes(self.host(page), 0, PAGE_SIZE as usize) };
        }
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

    /// The host address of a page.
    pub(crate) fn host_address(&self, page: u64) -> u64 {
        self.host(page) as u64
    }

    /// The page at a host address, if it is guest memory.
    pub(crate) fn page_at_host_address(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let page = address.checked_sub(region.host as u64)? / PAGE_SIZE;
            (page < region.pages).then_some(region.first + page)
        })
    }

    fn region(&self, page: u64) -> &Mapped {
        let index = self.regions.partition_point(|r| r.first <= page) - 1;
        let region = &self.regions[index];
        assert!(page - region.first < region.pages, "no page {page}");
        region
    }

    /// The address of a page, valid for [`PAGE_SIZE`] bytes.
    fn host(&self, page: u64) -> *mut u8 {
        let region = self.region(page);
        // SAFETY: `region` has checked that the page is within the mapping.
        unsafe {
            region
                .host
                .add(((page - region.first) * PAGE_SIZE) as usize)
        }
    }

    /// The ranges of host memory of `runs`, without the first `skip` bytes.
    fn push_ranges(&self, runs: &[PageRun], mut skip: u64, out: &mut Vec<libc::iovec>) {
        for &run in runs {
            let len = run.count * PAGE_SIZE;
            if skip >= len {
                skip -= len;
                continue;
            }
            assert_eq!(self.within_region(run), run, "a run across regions");
            out.push(libc::iovec {
                // SAFETY: `skip` is less than the length of the run, which is within one mapping.
                iov_base: unsafe { self.host(run.first).add(skip as usize) }.cast(),
                iov_len: (len - skip) as usize,
            });
            skip = 0;
        }
    }
}

/// How bytes are handed to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Copied.
    Copied,
    /// Copied, and more follow at once: they may wait for those.
    More,
    /// Not copied: the pages are pinned until the socket is done with them, and says so on its
    /// error queue; see [`crate::zero_copy`]. There are no parts then, as they may be gone by that
    /// time.
    Pinned,
}

/// Moves memory to and from sockets; its buffers are reused from call to call.
#[derive(Debug, Default)]
pub struct PageIo {
    ranges: Vec<libc::iovec>,
}

// SAFETY: between calls the list is empty; its addresses are used within one call only.
unsafe impl Send for PageIo {}

impl PageIo {
    /// Sends `parts`, then the pages of `runs`, without the first `skip` bytes of it all; returns
    /// how many bytes the socket took. Each run is within one region. There are no more than
    /// 1024 parts and runs.
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        parts: &[&[u8]],
        memory: Option<&GuestPages>,
        runs: &[PageRun],
        skip: u64,
        manner: Manner,
    ) -> io::Result<usize> {
        self.ranges.clear();
        let parts = match manner {
            Manner::Copied | Manner::More => parts,
            Manner::Pinned => &[],
        };
        let mut skip = skip as usize;
        for part in parts {
            let left = part.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(part.len());
            if !left.is_empty() {
                self.ranges.push(libc::iovec {
                    iov_base: left.as_ptr().cast_mut().cast(),
                    iov_len: left.len(),
                });
            }
        }
        if let Some(memory) = memory {
            memory.push_ranges(runs, skip as u64, &mut self.ranges);
        }
        // SAFETY: all zeroes is a valid message header: no address, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.ranges.as_mut_ptr();
        message.msg_iovlen = self.ranges.len();
        let flags = match manner {
            Manner::Copied => 0,
            Manner::More => libc::MSG_MORE,
            Manner::Pinned => libc::MSG_ZEROCOPY,
        };
        // SAFETY: every range is memory that lives through the call: `parts`, which are
        // borrowed, and mapped guest memory, which `memory` keeps. The kernel only reads them;
        // pages that it reads later it holds itself, whatever becomes of the mapping. A guest
        // writing meanwhile tears the data, which the checksums show.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | flags,
            )
        };
        self.ranges.clear();
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Receives into the pages of `runs`, past their first `skip` bytes; returns how many bytes
    /// came, 0 at the stream's end. Each run is within one region.
    pub fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        memory: &GuestPages,
        runs: &[PageRun],
        skip: u64,
    ) -> io::Result<usize> {
        self.ranges.clear();
        memory.push_ranges(runs, skip, &mut self.ranges);
        // SAFETY: every range is mapped guest memory, which `memory` keeps; no reference to it
        // exists in this process, so the kernel may write it.
        let received = unsafe {
            libc::readv(
                socket.as_raw_fd(),
                self.ranges.as_ptr(),
                self.ranges.len() as libc::c_int,
            )
        };
        self.ranges.clear();
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Copies `bytes` into the pages of `runs`, from their start; what doesn't fit is left.
    pub fn place(&mut self, memory: &GuestPages, runs: &[PageRun], mut bytes: &[u8]) {
        self.ranges.clear();
        memory.push_ranges(runs, 0, &mut self.ranges);
        for range in self.ranges.drain(..) {
            let (now, later) = bytes.split_at(bytes.len().min(range.iov_len));
            // SAFETY: the range is mapped guest memory at least as long as `now`, and disjoint
            // from it, as no slice of this process lies in guest memory.
            unsafe {
                std::ptr::copy_nonoverlapping(now.as_ptr(), range.iov_base.cast(), now.len());
            }
            bytes = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    fn memory() -> (GuestRam, GuestPages) {
        let ram: GuestRam = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 8 * PAGE_SIZE as usize),
            (GuestAddress(1 << 32), 4 * PAGE_SIZE as usize),
        ])
        .unwrap();
        (ram.clone(), GuestPages::new(ram).unwrap())
    }

    #[test]
    fn only_runs_within_a_region_are_ram() {
        let (_, pages) = memory();
        let run = |address, pages| AddressRun { address, pages };
        for (address, count, first) in [(0, 8, 0), (7 << 12, 1, 7), ((1 << 32) + 4096, 3, 9)] {
            let resolved = PageRun { first, count };
            assert_eq!(pages.resolve(run(address, count)), Ok(resolved));
            assert_eq!(pages.addresses(resolved), run(address, count));
        }
        for (address, count) in [
            (0, 9),
            (0, 0),
            (1, 1),
            (8 << 12, 1),
            ((1 << 32) - 4096, 2),
            ((1 << 32) + 4096, 4),
            ((1 << 32) + (4 << 12), 1),
            (u64::MAX - 4095, 1),
            (4096, u64::MAX),
        ] {
            assert_eq!(
                pages.resolve(run(address, count)),
                Err(MemoryError::Outside(run(address, count))),
            );
        }
        let across = PageRun { first: 6, count: 4 };
        assert_eq!(pages.within_region(across), PageRun { first: 6, count: 2 });
    }

    #[test]
    fn host_addresses_are_those_of_pages() {
        let (_, pages) = memory();
        for page in 0..pages.layout().pages() {
            let address = pages.host_address(page);
            assert_eq!(pages.page_at_host_address(address), Some(page));
            assert_eq!(pages.page_at_host_address(address + 4095), Some(page));
        }
        for outside in [0, u64::MAX] {
            assert_eq!(pages.page_at_host_address(outside), None);
        }
    }

    #[test]
    fn discarded_pages_of_shared_memory_are_gone_too() {
        let file = tempfile::tempfile().unwrap();
        let len = 4 * PAGE_SIZE;
        file.set_len(len).unwrap();
        let file = vm_memory::FileOffset::new(file, 0);
        let range = (GuestAddress(0), len as usize, Some(file));
        let ram: GuestRam = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
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

    #[test]
    fn pages_go_through_a_socket_in_pieces() {
        let (from, source) = memory();
        let (to, destination) = memory();
        let runs = [
            PageRun { first: 2, count: 3 },
            PageRun { first: 9, count: 1 },
        ];
        for page in (2..5).map(|p| p << 12).chain([(1 << 32) + 4096]) {
            for at in (0..PAGE_SIZE).step_by(8) {
                from.write_obj(page ^ at << 20, GuestAddress(page + at))
                    .unwrap();
            }
        }
        let (a, b) = UnixStream::pair().unwrap();
        let mut io = PageIo::default();
        let head: [&[u8]; 2] = [b"header", b"body"];
        let total = 10 + 4 * PAGE_SIZE;
        let mut sent = 0;
        while sent < total {
            sent += io
                .send(a.as_fd(), &head, Some(&source), &runs, sent, Manner::Copied)
                .unwrap() as u64;
        }
        let mut start = [0; 1010];
        io::Read::read_exact(&mut &b, &mut start).unwrap();
        assert_eq!(&start[..10], b"headerbody");
        io.place(&destination, &runs, &start[10..]);
        let mut received = 1000;
        while received < 4 * PAGE_SIZE {
            received += io
                .receive(b.as_fd(), &destination, &runs, received)
                .unwrap() as u64;
        }
        for page in [2, 3, 4, 9] {
            assert_eq!(source.crc(page), destination.crc(page));
            assert!(!destination.is_zero(page));
        }
        assert!(destination.is_zero(1) && destination.is_zero(8));
        destination.fill_zero(runs[0]);
        assert!((2..5).all(|page| destination.is_zero(page)));
        assert_eq!(to.read_obj::<u64>(GuestAddress(2 << 12)).unwrap(), 0);
    }
}
