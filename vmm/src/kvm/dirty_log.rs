//! Which pages were written: by the guest, from KVM's log, and by the VMM, from vm-memory's.
//!
//! With manual protection a page goes round like this: written (its bit is set) → harvested (the
//! bit is reported, and stays) → protected (the bit is cleared and the page is write-protected,
//! in one step) → read for sending → written again, which faults and sets the bit. A write at any
//! point after the protection is seen by the next harvest; one before it is in what is read. With
//! `INITIALLY_SET`, all bits begin as set, and switching the log on protects nothing.
//!
//! Without manual protection, the harvest itself clears and protects, and protecting is nothing.

use std::collections::TryReserveError;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use migration::bitmap::PageBitmap;
use vm_memory::{GuestMemoryBackend, GuestRegionMmap};

use super::slots::extract;
use super::{IoctlError, ManualProtect, Vm, ioctl};

/// The dirty log of a VM. Page numbers are dense, as in [`migration::layout`].
#[derive(Debug)]
pub struct DirtyLog {
    manual: bool,
    /// As long as the largest slot's bitmap, kept between harvests.
    words: Vec<u64>,
    /// What is being protected, grown as needed.
    mask: Vec<u64>,
}

impl DirtyLog {
    pub(super) fn new(vm: &Vm) -> Result<Self, TryReserveError> {
        let longest = vm.slots().iter().map(|slot| slot.words()).max();
        let longest = longest.unwrap_or(0) as usize;
        let mut words = Vec::new();
        words.try_reserve_exact(longest)?;
        words.resize(longest, 0);
        Ok(Self {
            manual: vm.capabilities().manual_protect != ManualProtect::No,
            words,
            mask: Vec::new(),
        })
    }

    /// Switches the log on. Writes before this are forgotten; with `INITIALLY_SET`, the first
    /// harvest reports every page.
    ///
    /// If a slot fails, the log is off again in all of them.
    pub fn start(&mut self, vm: &Vm) -> Result<(), IoctlError> {
        // Before KVM's: a write of the VMM's that comes now is in no log, but before the start.
        for region in vm.ram().iter() {
            bitmap_of(region).reset();
        }
        for slot in vm.slots() {
            if let Err(error) = ioctl::set_memory_region(vm.fd(), slot, KVM_MEM_LOG_DIRTY_PAGES) {
                self.stop(vm);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Adds to `dirty` every page that was written since it was last protected, or (by the VMM)
    /// harvested. Pages that weren't may be among them.
    pub fn harvest(&mut self, vm: &Vm, dirty: &mut PageBitmap) -> Result<(), IoctlError> {
        self.harvest_vcpus(vm, dirty)?;
        // The VMM's own. Each word is taken and reset in one atomic step; a write of the VMM's is
        // recorded after the data are there, so one that is recorded only after this is reported
        // by the next harvest. (vm-memory returns a new buffer: 1/32768 of the RAM.)
        let mut first = 0;
        for region in vm.ram().iter() {
            let bitmap = bitmap_of(region);
            dirty.or_words(first, &bitmap.get_and_reset());
            first += bitmap.len() as u64;
        }
        Ok(())
    }

    /// The same of the pages that vCPUs wrote; those that the VMM wrote stay to be harvested.
    pub fn harvest_vcpus(&mut self, vm: &Vm, dirty: &mut PageBitmap) -> Result<(), IoctlError> {
        for slot in vm.slots() {
            ioctl::get_dirty_log(vm.fd(), slot, &mut self.words)?;
            let len = slot.words() as usize;
            dirty.or_words(slot.first_page, self.words.get(..len).unwrap_or_default());
        }
        Ok(())
    }

    /// Arms the log again for the pages set in `dirty` among the `count` from `first`; both are
    /// multiples of 64, or the last page is the RAM's last. Other pages are left as they are.
    pub fn protect(
        &mut self,
        vm: &Vm,
        dirty: &PageBitmap,
        first: u64,
        count: u64,
    ) -> Result<(), IoctlError> {
        if !self.manual {
            return Ok(());
        }
        for slot in vm.slots() {
            let Some(mut range) = slot.overlap(first, count) else {
                continue;
            };
            // A slot may have more pages than the ioctl's 32-bit number can say.
            while !range.is_empty() {
                let pages = (range.end - range.start).min(1 << 30);
                let part = range.start..range.start + pages;
                if extract(slot, dirty, part, (first, count), &mut self.mask) {
                    let start = range.start;
                    ioctl::clear_dirty_log(vm.fd(), slot, start, pages as u32, &mut self.mask)?;
                }
                range.start += pages;
            }
        }
        Ok(())
    }

    /// Switches the log off. A slot that doesn't want to is only logged: the guest is just slower.
    pub fn stop(&mut self, vm: &Vm) {
        for slot in vm.slots() {
            if let Err(error) = ioctl::set_memory_region(vm.fd(), slot, 0) {
                tracing::warn!(slot = slot.id, %error, "cannot stop the dirty log");
            }
        }
    }
}

fn bitmap_of(
    region: &GuestRegionMmap<vm_memory::bitmap::AtomicBitmap>,
) -> &vm_memory::bitmap::AtomicBitmap {
    // Deref of the region is its mapping.
    std::ops::Deref::deref(region).bitmap()
}

#[cfg(test)]
mod tests;
