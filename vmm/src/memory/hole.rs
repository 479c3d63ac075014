//! A place for a mapping that begins where it should: the kernel maps at the highest place with
//! room, so one is made that has just enough.
#![allow(
    unsafe_code,
    reason = "mmap(2) and munmap(2) of address space that nothing uses"
)]

use std::ffi::c_void;
use std::io;
use std::ptr::null_mut;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Free address space between two reservations, which go with this.
pub(super) struct Hole {
    below: (*mut c_void, usize),
    above: (*mut c_void, usize),
}

impl Hole {
    /// One of `len` bytes, a whole number of pages, that begins at a multiple of `align`.
    pub(super) fn new(len: usize, align: usize) -> io::Result<Self> {
        let total = len.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: new address space, which nobody can read or write.
        let start = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            mmap_anonymous(null_mut(), total, ProtFlags::empty(), flags)
        }?;
        let before = start.cast::<u8>().align_offset(align).min(align);
        // SAFETY: within the reservation, as `before` is no more than `align`.
        let (hole, end) = unsafe { (start.byte_add(before), start.byte_add(before + len)) };
        // SAFETY: part of the reservation, which nothing refers to.
        unsafe { munmap(hole, len) }?;
        Ok(Self {
            below: (start, before),
            above: (end, align - before),
        })
    }
}

impl Drop for Hole {
    fn drop(&mut self) {
        for (start, len) in [self.below, self.above] {
            if len > 0 {
                // SAFETY: what is left of the reservation, which nothing refers to. Whether it goes
                // doesn't matter.
                let _ = unsafe { munmap(start, len) };
            }
        }
    }
}
