//! The PICs (Intel 8259A) and the I/O APIC (Intel 82093AA).
#![allow(unsafe_code, reason = "memory-mapped registers")]

use super::{lapic, port};

/// The vector of the PICs' first interrupt line; `traps.s` acknowledges 16 from here to them.
pub const PIC_VECTORS: u8 = 0x20;
/// The first of four vectors that `traps.s` acknowledges to the local APIC.
pub const APIC_VECTORS: u8 = 0x30;
/// The line of COM1.
pub const SERIAL_LINE: u8 = 4;

const PIC1: u16 = 0x20;
const PIC2: u16 = 0xa0;
const LVT_LINT0: u32 = 0x350;
const EXTINT: u32 = 0x700;
const MASKED: u32 = 1 << 16;

/// Sets both PICs up, with these lines open, and lets them through the local APIC.
pub fn open_pic(lines: u16) {
    for (pic, vectors, cascade) in [(PIC1, PIC_VECTORS, 4), (PIC2, PIC_VECTORS + 8, 2)] {
        port::write(pic, 0x11); // edge-triggered, cascaded, with ICW4
        port::write(pic + 1, vectors);
        port::write(pic + 1, cascade);
        port::write(pic + 1, 1); // 8086 mode
    }
    let masks = !(lines | 1 << 2); // the second is on line 2
    port::write(PIC1 + 1, masks as u8);
    port::write(PIC2 + 1, (masks >> 8) as u8);
    lapic::enable();
    lapic::write(LVT_LINT0, EXTINT);
}

/// The masks of both PICs: a set bit is a closed line.
#[must_use]
pub fn pic_masks() -> u16 {
    u16::from(port::read(PIC1 + 1)) | u16::from(port::read(PIC2 + 1)) << 8
}

/// Closes the PICs.
pub fn close_pic() {
    open_pic(0);
    lapic::write(LVT_LINT0, EXTINT | MASKED);
}

const IOAPIC: usize = 0xfec0_0000;
const IOAPIC_WINDOW: usize = 0x10;

/// Reads a register of the I/O APIC.
#[must_use]
pub fn read_ioapic(register: u8) -> u32 {
    // SAFETY: memory.rs maps the page.
    unsafe {
        (IOAPIC as *mut u32).write_volatile(register.into());
        ((IOAPIC + IOAPIC_WINDOW) as *const u32).read_volatile()
    }
}

/// Writes a register of the I/O APIC.
pub fn write_ioapic(register: u8, value: u32) {
    // SAFETY: memory.rs maps the page.
    unsafe {
        (IOAPIC as *mut u32).write_volatile(register.into());
        ((IOAPIC + IOAPIC_WINDOW) as *mut u32).write_volatile(value);
    }
}

/// The I/O APIC's entry for a pin.
#[must_use]
pub fn ioapic_entry(pin: u8) -> u64 {
    u64::from(read_ioapic(0x10 + 2 * pin)) | u64::from(read_ioapic(0x11 + 2 * pin)) << 32
}

/// Sets it.
pub fn set_ioapic_entry(pin: u8, entry: u64) {
    write_ioapic(0x11 + 2 * pin, (entry >> 32) as u32);
    write_ioapic(0x10 + 2 * pin, entry as u32);
}

/// Sends a line to the first vCPU as `vector`, edge-triggered.
pub fn open_ioapic(line: u8, vector: u8) {
    lapic::enable();
    set_ioapic_entry(line, vector.into());
}
