//! The guest's RAM: where it is in the guest physical address space, and its mapping.
//!
//! RAM starts at 0. What doesn't fit below 3 GiB continues at 4 GiB: the GiB in between is where
//! a PC has its devices (I/O APIC at 0xfec0_0000, local APICs at 0xfee0_0000, room for
//! memory-mapped devices that a 32-bit address must reach), and where KVM wants a few pages of its
//! own on Intel (see [`crate::kvm::Vm`]). Everything that is loaded for boot lies below the hole.
//!
//! What stands behind it is the host's choice ([`Backing`]), which the guest doesn't see.

mod advice;
mod backing;
mod error;
mod hole;
mod hugetlb;
mod map;
mod numa;
mod prealloc;
#[cfg(test)]
mod tests;

pub use self::backing::{Backing, Numa, Pages, Policy};
pub use self::error::MemoryError;
pub use self::map::map;

use std::fs;

use migration::layout::{Layout, MAX_RAM, PAGE_SIZE, Region};

/// The least RAM that a guest can have, in bytes: 16 MiB.
pub const MIN_RAM: u64 = 16 << 20;

/// The end of the RAM below 4 GiB, at most: where the hole for devices begins.
pub const HOLE_START: u64 = 3 << 30;

/// Where the RAM that doesn't fit below the hole continues.
pub const HOLE_END: u64 = 4 << 30;

/// The RAM of this host in bytes, swap left out.
pub fn of_host() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

/// The layout of a machine with `bytes` of RAM, of [`MIN_RAM`] to [`MAX_RAM`] in whole pages.
pub fn layout(bytes: u64) -> Result<Layout, MemoryError> {
    if bytes < MIN_RAM {
        return Err(MemoryError::TooSmall(bytes));
    }
    if bytes > MAX_RAM {
        return Err(MemoryError::TooLarge(bytes));
    }
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::PartialPage(bytes));
    }
    let low = bytes.min(HOLE_START);
    let mut regions = vec![Region { start: 0, len: low }];
    if bytes > low {
        regions.push(Region {
            start: HOLE_END,
            len: bytes - low,
        });
    }
    Ok(Layout::new(regions)?)
}

/// A line of /proc/meminfo that is in KiB, in bytes.
fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key == name).then_some(value)
    })?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1 << 10)
}
