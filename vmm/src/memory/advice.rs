//! What the kernel is told about mapped guest memory.
#![allow(unsafe_code, reason = "madvise(2) on raw ranges of guest memory")]

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::GuestMemoryBackend;

use migration::layout::GuestRam;

use super::MemoryError;

/// Asks for huge pages wherever there are some.
pub(super) fn huge_pages(ram: &GuestRam) -> Result<(), MemoryError> {
    for region in ram.iter() {
        let (start, len) = (region.as_ptr().cast(), region.size());
        // SAFETY: the range is a whole mapping, which `ram` keeps; the advice changes no contents.
        let advised = unsafe { madvise(start, len, Advice::LinuxHugepage) };
        advised.map_err(|error| MemoryError::Transparent(error.into()))?;
    }
    Ok(())
}

/// Backs `len` bytes of a region from `offset` on with memory that can be written. The range is
/// within the region.
pub(super) fn populate(
    region: &vm_memory::GuestRegionMmap<vm_memory::bitmap::AtomicBitmap>,
    offset: usize,
    len: usize,
) -> Result<(), Errno> {
    assert!(offset + len <= region.size(), "outside the region");
    loop {
        // SAFETY: the range is within the mapping; populating it changes no contents.
        let advised = unsafe {
            madvise(
                region.as_ptr().add(offset).cast(),
                len,
                Advice::LinuxPopulateWrite,
            )
        };
        match advised {
            Err(Errno::INTR | Errno::AGAIN) => {}
            result => return result,
        }
    }
}
