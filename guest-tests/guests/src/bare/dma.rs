//! Memory that a device reads or writes while the guest has no reference to it.
#![allow(unsafe_code, reason = "memory that devices write")]

use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr::NonNull;

const PAGE: usize = 4096;

/// Whole pages, zeroed. A device that has its address must be done with it before it is dropped.
pub struct Dma {
    memory: NonNull<u8>,
    layout: Layout,
}

impl Dma {
    /// At least so many bytes; `None` if there is no such piece of memory.
    #[must_use]
    pub fn new(bytes: usize) -> Option<Self> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE)?;
        let layout = Layout::from_size_align(bytes, PAGE).ok()?;
        // SAFETY: the layout is not empty.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { memory, layout })
    }

    /// All of it. The device must not write to what is read or written.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: as much is allocated, and borrowed as long as `self`.
        unsafe { core::slice::from_raw_parts_mut(self.memory.as_ptr(), self.layout.size()) }
    }

    /// Its physical address, which is also where the guest sees it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        // SAFETY: `new` has allocated it so.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) };
    }
}
