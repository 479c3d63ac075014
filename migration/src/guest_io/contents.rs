//! What is in the pages of guest memory, while the guest may be writing to it.
#![allow(
    unsafe_code,
    reason = "no reference to guest memory may exist: it is copied by raw pointers"
)]

use super::GuestPages;
use crate::bitmap::PageRun;
use crate::layout::PAGE_SIZE;
use crate::xbzrle::Page;
use crate::zero;

impl GuestPages {
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
}
