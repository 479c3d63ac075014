//! Which pages of private anonymous memory were ever touched. The others read as zeroes, and
//! reading them to find that out would allocate page tables and take far longer than asking.
//!
//! Asked is the kernel's page map, which knows present and swapped pages. (`mincore` is of no use:
//! it counts a page in swap as absent.)
#![allow(
    unsafe_code,
    reason = "the PAGEMAP_SCAN ioctl, which no safe interface offers"
)]

use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::bitmap::PageRun;
use crate::layout::PAGE_SIZE;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = {
    assert!(size_of::<ScanArg>() == 96);
    assert!(offset_of!(ScanArg, walk_end) == 32);
    assert!(offset_of!(ScanArg, return_mask) == 88);
    assert!(size_of::<ScanRegion>() == 24);
    assert!(offset_of!(ScanRegion, categories) == 16);
};

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30) | ((size_of::<ScanArg>() as libc::c_ulong) << 16) | (0x66 << 8) | 16;

/// Bits of an entry of /proc/PID/pagemap: see the kernel's admin-guide/mm/pagemap.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;

const REGIONS_PER_CALL: usize = 256;
const ENTRIES_PER_READ: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// `PAGEMAP_SCAN`, since Linux 6.7.
    Scan,
    /// Reading the map, an entry a page.
    Read,
    /// No map to be had: every page counts as touched.
    None,
}

/// The page map of this process.
#[derive(Debug)]
pub struct Pagemap {
    map: Option<File>,
    method: Method,
}

impl Pagemap {
    /// Opens the map. If there is none, every page will count as touched.
    pub fn open() -> Self {
        match File::open("/proc/self/pagemap") {
            Ok(map) => Self {
                map: Some(map),
                method: Method::Scan,
            },
            Err(error) => {
                tracing::info!(
                    "cannot open /proc/self/pagemap ({error}): untouched memory will be read to find that it is zero"
                );
                Self {
                    map: None,
                    method: Method::None,
                }
            }
        }
    }

    /// Puts into `runs` the runs of touched pages among the `pages` pages at the host address
    /// `start`, ascending; page numbers are relative to `start`. A page that holds only zeroes may
    /// be left out. `start` is a multiple of the page size, and the range is one of private
    /// anonymous memory: in shared memory a page may hold data and yet be absent from the map.
    pub fn touched(&mut self, start: u64, pages: u64, runs: &mut Vec<PageRun>) {
        loop {
            runs.clear();
            let result = match (self.method, &self.map) {
                (Method::Scan, Some(map)) => scan(map, start, pages, runs),
                (Method::Read, Some(map)) => read(map, start, pages, runs),
                _ => {
                    runs.push(PageRun {
                        first: 0,
                        count: pages,
                    });
                    Ok(())
                }
            };
            let Err(error) = result else { return };
            self.method = match self.method {
                Method::Scan => Method::Read,
                _ => Method::None,
            };
            tracing::debug!("the page map: {error}; falling back to {:?}", self.method);
        }
    }

    /// How many of those pages come before the first touched one: all, if none is. Less if that
    /// would take long to find out.
    pub fn untouched(&mut self, start: u64, pages: u64) -> u64 {
        let (Method::Scan, Some(map)) = (self.method, &self.map) else {
            return 0;
        };
        let mut found = [ScanRegion::default()];
        let end = match scan_some(map, start, start + pages * PAGE_SIZE, &mut found, 1) {
            Ok((0, end)) => end,
            Ok(_) => found[0].start,
            // Then the other question will fail as well, and fall back.
            Err(_) => start,
        };
        (end.saturating_sub(start) / PAGE_SIZE).min(pages)
    }
}

fn scan(map: &File, start: u64, pages: u64, runs: &mut Vec<PageRun>) -> io::Result<()> {
    let end = start + pages * PAGE_SIZE;
    let mut from = start;
    let mut found = [ScanRegion::default(); REGIONS_PER_CALL];
    while from < end {
        let (count, walked) = scan_some(map, from, end, &mut found, 0)?;
        for region in found.iter().take(count) {
            if region.start >= start && region.end <= end && region.end > region.start {
                runs.push(PageRun {
                    first: (region.start - start) / PAGE_SIZE,
                    count: (region.end - region.start) / PAGE_SIZE,
                });
            }
        }
        from = walked;
    }
    Ok(())
}

/// Finds touched regions until `found` is full, or there are `most` pages in it, unless that is 0:
/// how many regions, and the address up to which it looked.
fn scan_some(
    map: &File,
    start: u64,
    end: u64,
    found: &mut [ScanRegion],
    most: u64,
) -> io::Result<(usize, u64)> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start,
        end,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: most,
        // Not the kernel's shared page of zeroes, and present or in swap.
        category_inverted: PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..ScanArg::default()
    };
    // SAFETY: the argument is the structure that this ioctl takes, and `vec` points to
    // `vec_len` regions that live through the call.
    let count = unsafe { libc::ioctl(map.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let Ok(count) = usize::try_from(count) else {
        return Err(io::Error::last_os_error());
    };
    if arg.walk_end <= start {
        return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
    }
    Ok((count, arg.walk_end))
}

fn read(map: &File, start: u64, pages: u64, runs: &mut Vec<PageRun>) -> io::Result<()> {
    let mut bytes = [0u8; ENTRIES_PER_READ * size_of::<u64>()];
    let mut run: Option<PageRun> = None;
    let mut page = 0;
    while page < pages {
        let entries = (pages - page).min(ENTRIES_PER_READ as u64);
        let bytes = &mut bytes[..entries as usize * size_of::<u64>()];
        map.read_exact_at(bytes, (start / PAGE_SIZE + page) * size_of::<u64>() as u64)?;
        let (entries, _) = bytes.as_chunks();
        for entry in entries {
            let touched = u64::from_ne_bytes(*entry) & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
            match (&mut run, touched) {
                (Some(run), true) => run.count += 1,
                (None, true) => {
                    run = Some(PageRun {
                        first: page,
                        count: 1,
                    });
                }
                (_, false) => runs.extend(run.take()),
            }
            page += 1;
        }
    }
    runs.extend(run);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    const PAGES: u64 = 3000;

    fn touched(map: &mut Pagemap, memory: &GuestMemoryMmap) -> Vec<u64> {
        use vm_memory::GuestMemoryBackend;
        let host = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        let mut runs = vec![];
        map.touched(host, PAGES, &mut runs);
        runs.iter().flat_map(|run| run.first..run.end()).collect()
    }

    #[test]
    fn both_ways_find_what_was_touched() {
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (PAGES * PAGE_SIZE) as usize)])
                .unwrap();
        let written: Vec<u64> = (0..PAGES)
            .filter(|p| p % 7 == 3 || (900..1500).contains(p) || *p == PAGES - 1)
            .collect();
        let mut map = Pagemap::open();
        assert!(touched(&mut map, &memory).is_empty());
        for page in &written {
            memory
                .write_obj(1u8, GuestAddress(page * PAGE_SIZE))
                .unwrap();
        }
        map.method = Method::Read;
        assert_eq!(touched(&mut map, &memory), written);
        assert_eq!(map.method, Method::Read, "reading the map failed");
        map.method = Method::Scan;
        assert_eq!(touched(&mut map, &memory), written);
        if map.method == Method::Scan {
            use vm_memory::GuestMemoryBackend;
            let host = |page: u64| {
                let address = GuestAddress(page * PAGE_SIZE);
                memory.get_host_address(address).unwrap() as u64
            };
            assert_eq!(map.untouched(host(0), PAGES), 3);
            assert_eq!(map.untouched(host(3), PAGES - 3), 0);
            assert_eq!(map.untouched(host(4), 2), 2);
            assert_eq!(map.untouched(host(1502), PAGES - 1502), 6);
        } else {
            guest_tests::driver::skip("in part: PAGEMAP_SCAN; needs Linux 6.7");
        }
        // A page that was only read is the kernel's page of zeroes, which the scan tells.
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
        if map.method == Method::Scan {
            assert_eq!(touched(&mut map, &memory), written);
        }
        map.method = Method::None;
        assert_eq!(touched(&mut map, &memory).len() as u64, PAGES);
    }
}
