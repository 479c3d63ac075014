//! The page tables beyond the first GiB, the IDT, and which memory is free.
#![allow(unsafe_code, reason = "page tables and IDT")]

use core::cell::UnsafeCell;

use super::boot::{Boot, Region};

const GIB: u64 = 1 << 30;
/// GiB that can be mapped, each by a page directory.
const DIRECTORIES: usize = 64;
/// Present, writable, user, accessed, dirty, large.
const LARGE_PAGE: u64 = 0xe7;
/// Not cached: for devices.
const UNCACHED: u64 = 0x10;
/// Present, writable, user.
const TABLE: u64 = 7;
/// The GiB of the I/O APIC and the local APIC.
const DEVICES: u64 = 3;

#[repr(C, align(4096))]
struct Tables<const N: usize>(UnsafeCell<[[u64; 512]; N]>);
// SAFETY: only the first vCPU changes them, before it starts others.
unsafe impl<const N: usize> Sync for Tables<N> {}

static TABLES: Tables<DIRECTORIES> = Tables(UnsafeCell::new([[0; 512]; DIRECTORIES]));

// SAFETY: `entry.s`, `traps.s` and the linker script define them, the tables with these sizes.
unsafe extern "C" {
    static mut pdpt: [u64; 512];
    static mut idt: [[u64; 2]; 256];
    static trap_stubs: [u64; 53];
    static image_end: u8;
}

/// Fills the IDT; until then any exception ends in a triple fault.
pub(crate) fn install_traps() {
    const SPURIOUS: usize = 0xff;
    // SAFETY: the stubs are constants of traps.s; nobody else changes the IDT.
    unsafe {
        for (index, &stub) in trap_stubs.iter().enumerate() {
            let vector = if index == 52 { SPURIOUS } else { index };
            // An interrupt gate of DPL 0 to CODE64 (Intel SDM, volume 3, 7.14.1).
            let low = (stub & 0xffff) | 0x08 << 16 | 0x8e00 << 32 | (stub >> 16 & 0xffff) << 48;
            (&raw mut idt[vector]).write([low, stub >> 32]);
        }
    }
}

/// Maps each GiB that has memory, and that of the APICs.
pub(crate) fn map(regions: &[Region]) {
    map_gib(DEVICES);
    for region in regions {
        let end = region
            .base
            .saturating_add(region.size)
            .div_ceil(GIB)
            .min(DIRECTORIES as u64);
        (region.base / GIB..end).for_each(map_gib);
    }
}

/// Whether an address is in the GiB where devices are, all of which is mapped.
#[must_use]
pub fn is_device(address: u64) -> bool {
    address / GIB == DEVICES
}

fn map_gib(gib: u64) {
    if gib == 0 {
        return;
    }
    // SAFETY: only here, and only by the first vCPU, are these tables changed. What was not
    // present before needs no flush.
    unsafe {
        let entry = (&raw mut pdpt).cast::<u64>().add(gib as usize);
        if entry.read() != 0 {
            return;
        }
        let table = TABLES.0.get().cast::<[u64; 512]>().add(gib as usize);
        for index in 0..512u64 {
            let page = gib * GIB + (index << 21);
            // All from 3.5 GiB to 4 GiB is devices or a hole, but RAM may reach further up on
            // some machines: only the last 32 MiB are never RAM.
            let devices = (0xfe00_0000..4 * GIB).contains(&page);
            (*table)[index as usize] = page | LARGE_PAGE | if devices { UNCACHED } else { 0 };
        }
        entry.write(table as u64 | TABLE);
    }
}

/// The parts of the RAM from `from` up that nothing lies in, in whole pages: `each` gets their
/// bases and ends. Below the image's end nothing counts as free.
pub fn free(boot: &Boot, from: u64, mut each: impl FnMut(u64, u64)) {
    let limit = DIRECTORIES as u64 * GIB;
    let image = &raw const image_end as u64;
    for region in boot.memory().iter().filter(|region| region.is_ram()) {
        let end = region.base.saturating_add(region.size).min(limit) & !0xfff;
        let base = region.base.max(image).max(from).next_multiple_of(4096);
        match boot.initrd {
            // The initrd splits the region.
            Some((initrd, size)) if initrd < end && initrd + size > base => {
                let (before, after) = (initrd & !0xfff, (initrd + size).next_multiple_of(4096));
                if base < before {
                    each(base, before);
                }
                if after < end {
                    each(after, end);
                }
            }
            _ if base < end => each(base, end),
            _ => {}
        }
    }
}
