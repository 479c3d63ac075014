//! Memory for a request's data: the device reads and writes it while the guest has no reference.

use alloc::alloc::{alloc_zeroed, handle_alloc_error};
use core::alloc::Layout;
use core::ptr::NonNull;

use guests::block::{self, Sector};

/// Whole pages; never freed.
pub(crate) struct Buffer {
    memory: NonNull<u8>,
    sectors: usize,
}

impl Buffer {
    pub(crate) fn new(sectors: usize) -> Self {
        let bytes = (sectors.max(1) * block::BYTES).next_multiple_of(4096);
        let Ok(layout) = Layout::from_size_align(bytes, 4096) else {
            guests::bare::give_up(&"a buffer of impossible size");
        };
        // SAFETY: the layout is not empty.
        let Some(memory) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout);
        };
        Self { memory, sectors }
    }

    /// The first so many sectors.
    pub(crate) fn bytes(&mut self, sectors: usize) -> &mut [u8] {
        let bytes = sectors.min(self.sectors) * block::BYTES;
        // SAFETY: as much is allocated, and borrowed as long as `self`.
        unsafe { core::slice::from_raw_parts_mut(self.memory.as_ptr(), bytes) }
    }

    /// One of them.
    pub(crate) fn sector(&mut self, index: usize) -> &mut Sector {
        assert!(index < self.sectors, "no such sector in the buffer");
        // SAFETY: inside what is allocated, aligned to 512 bytes, borrowed as long as `self`.
        unsafe { &mut *self.memory.as_ptr().add(index * block::BYTES).cast() }
    }
}
