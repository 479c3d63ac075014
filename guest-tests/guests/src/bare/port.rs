//! I/O ports, up to 0xfff: those that a vCPU's task state allows at CPL 3.
#![allow(unsafe_code, reason = "port I/O")]

use core::arch::asm;

/// Reads a byte.
#[must_use]
pub fn read(port: u16) -> u8 {
    let byte;
    // SAFETY: port I/O reaches devices, not memory.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") byte, options(nomem, nostack, preserves_flags))
    };
    byte
}

/// Writes a byte.
pub fn write(port: u16, byte: u8) {
    // SAFETY: as in `read`.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack, preserves_flags))
    };
}

/// Writes two bytes at once.
pub fn write_u16(port: u16, word: u16) {
    // SAFETY: as in `read`.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") word, options(nomem, nostack, preserves_flags))
    };
}
