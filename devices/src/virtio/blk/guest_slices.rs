//! The guest's buffers as slices for the host's I/O, without a copy.
// Slices of memory that the guest may write to at the same time; see the reasons below.
#![allow(unsafe_code)]

use std::io::{IoSlice, IoSliceMut};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::virtio::GuestRam;
use crate::virtio::chain::{Buffer, pieces};

/// Buffers of the guest's, mapped here.
pub(super) struct GuestSlices<'m, B> {
    slices: Vec<VolatileSlice<'m, B>>,
}

/// The `len` bytes from `offset` on of `buffers`, which lie in RAM; fewer if they are shorter.
pub(super) fn guest_slices<'m>(
    memory: &'m GuestRam,
    buffers: &[Buffer],
    offset: u64,
    len: u64,
) -> GuestSlices<'m, impl BitmapSlice + 'm> {
    let slices = pieces(buffers, offset, len)
        .flat_map(|piece| memory.get_slices(piece.address, piece.len as usize))
        .map_while(Result::ok)
        .collect();
    GuestSlices { slices }
}

impl<B: BitmapSlice> GuestSlices<'_, B> {
    /// How many bytes they are.
    pub(super) fn len(&self) -> u64 {
        self.slices.iter().map(|slice| slice.len() as u64).sum()
    }

    /// To be written to the host.
    pub(super) fn read_by_host(&self) -> Vec<IoSlice<'_>> {
        self.slices
            .iter()
            .map(|slice| {
                let place = slice.ptr_guard();
                // SAFETY: the memory stays mapped as long as `self`, which borrows it. The guest
                // may change it meanwhile: what is read is bytes for the disk, of which any
                // value will do, and nothing is concluded from them.
                IoSlice::new(unsafe { std::slice::from_raw_parts(place.as_ptr(), slice.len()) })
            })
            .collect()
    }

    /// To be filled by the host; say [`filled`](Self::filled) afterwards.
    pub(super) fn filled_by_host(&mut self) -> Vec<IoSliceMut<'_>> {
        self.slices
            .iter()
            .map(|slice| {
                let place = slice.ptr_guard_mut();
                // SAFETY: as in `read_by_host`; no other reference of this process to this memory
                // exists while these do, unless the guest names it twice. Then bytes, which have
                // no invalid values, are written by the kernel in some order.
                IoSliceMut::new(unsafe {
                    std::slice::from_raw_parts_mut(place.as_ptr(), slice.len())
                })
            })
            .collect()
    }

    /// Records that the guest's memory was written: what a migration must send again.
    pub(super) fn filled(&self) {
        for slice in &self.slices {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
