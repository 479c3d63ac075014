//! Whether guest memory is all zero, and its checksum, while the guest may be writing to it.
#![allow(
    unsafe_code,
    reason = "guest memory changes under the reader, so it is read through raw pointers"
)]

use std::mem::MaybeUninit;

use crate::layout::PAGE_SIZE;

const WORDS: usize = PAGE_SIZE as usize / size_of::<u64>();
const STEP: usize = 8;

/// Whether all bytes of a page are zero. Stops at the first cache line that isn't, which for most
/// pages is the first.
///
/// # Safety
///
/// `page` is aligned to 8 bytes and a page of readable memory from there stays mapped during the
/// call. Others may write to it meanwhile: then the answer is that of some mix of old and new.
pub(crate) unsafe fn is_zero(page: *const u8) -> bool {
    let words = page.cast::<u64>();
    (0..WORDS).step_by(STEP).all(|line| {
        (0..STEP).fold(0, |bits, word| {
            // SAFETY: `line + word` is below WORDS, so within the page of which the caller says
            // that it is readable and aligned.
            bits | unsafe { words.add(line + word).read_volatile() }
        }) == 0
    })
}

/// A copy of a page. It is aligned as the page is: elsewhere in the processor's sets of cache lines,
/// where a stack happens to be, copying takes up to half as long again (docs/performance.md).
#[repr(align(4096))]
struct Aligned(MaybeUninit<[u8; PAGE_SIZE as usize]>);

/// The CRC32 (IEEE 802.3) of a page.
///
/// # Safety
///
/// As for [`is_zero`].
pub(crate) unsafe fn page_crc(page: *const u8) -> u32 {
    // The checksum is computed over a copy, which holds still; it stays in the first-level cache.
    let mut copy = Aligned(MaybeUninit::uninit());
    // SAFETY: the caller says that a page is readable at `page`, `copy` is one page long, and they
    // do not overlap, as `copy` is on this stack. Every byte of it is written, and any is valid.
    let copy = unsafe {
        std::ptr::copy_nonoverlapping(page, copy.0.as_mut_ptr().cast(), PAGE_SIZE as usize);
        copy.0.assume_init_ref()
    };
    crc32fast::hash(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE as usize]);

    #[test]
    fn one_bit_anywhere_is_seen() {
        let mut page = Page([0; PAGE_SIZE as usize]);
        // SAFETY: a page of this stack.
        unsafe {
            assert!(is_zero(page.0.as_ptr()));
            let zero = page_crc(page.0.as_ptr());
            for at in 0..PAGE_SIZE as usize {
                page.0[at] = 1 << (at % 8);
                assert!(!is_zero(page.0.as_ptr()), "byte {at}");
                assert_ne!(page_crc(page.0.as_ptr()), zero);
                page.0[at] = 0;
            }
            assert_eq!(zero, crc32fast::hash(&page.0));
        }
    }
}
