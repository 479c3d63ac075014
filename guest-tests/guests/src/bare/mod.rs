//! The machine under the guests. Start reading at `entry.s`, then `privileged`.
//!
//! A guest is a bin with `guest!(pvh, main)` and `fn main(boot: &Boot) -> !`.
#![allow(
    unsafe_code,
    reason = "bare metal: ports, page tables, the VMM's structures in memory"
)]

pub mod boot;
pub mod console;
pub mod cpu;
pub mod dma;
mod entry;
pub mod heap;
pub mod interrupts;
pub mod intrinsics;
pub mod lapic;
pub mod memory;
pub mod port;
pub mod power;
pub mod privileged;
pub mod pvclock;
pub mod random;
pub mod serial;
pub mod smp;
pub mod timer;
pub mod tsc;
pub mod virtio;
pub mod waiter;

pub use entry::start;

use core::fmt;

use crate::fault::PANIC;

/// Says why the guest can't go on, and powers off.
pub fn give_up(reason: &dyn fmt::Display) -> ! {
    serial::line(&format_args!("{PANIC}{reason}"));
    power::off()
}

/// Makes a bin a guest: `pvh` with a PVH note, `linux64` without, to be entered by the 64-bit boot
/// protocol of Linux. `main` is a `fn(&Boot) -> !`.
#[macro_export]
macro_rules! guest {
    (pvh, $main:path) => {
        // XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h). QEMU reads eight bytes.
        core::arch::global_asm!(
            ".section .note.Xen, \"a\", @note",
            ".balign 4",
            ".long 4, 8, 18",
            ".asciz \"Xen\"",
            ".quad pvh_entry",
            ".text",
        );
        $crate::guest!(linux64, $main);
    };
    (linux64, $main:path) => {
        // SAFETY: nothing else has this name.
        #[unsafe(no_mangle)]
        extern "C" fn user_start(info: u64, entry: u64, block: u64) -> ! {
            $crate::bare::start(info, entry, block, $main)
        }

        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
            $crate::bare::give_up(info)
        }

        // What compiled code calls without naming it. In the bin, since a library that is also
        // built for the host must not define them.
        // SAFETY: each is what C says of that name, and defined nowhere else.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
            // SAFETY: as the caller promises.
            unsafe { $crate::bare::intrinsics::copy(to, from, count) }
        }
        #[unsafe(no_mangle)]
        unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
            // SAFETY: as the caller promises.
            unsafe { $crate::bare::intrinsics::move_bytes(to, from, count) }
        }
        #[unsafe(no_mangle)]
        unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
            // SAFETY: as the caller promises.
            unsafe { $crate::bare::intrinsics::set(to, byte as u8, count) }
        }
        #[unsafe(no_mangle)]
        unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
            // SAFETY: as the caller promises.
            unsafe { $crate::bare::intrinsics::compare(a, b, count) }
        }
        #[unsafe(no_mangle)]
        unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
            // SAFETY: as the caller promises.
            unsafe { $crate::bare::intrinsics::compare(a, b, count) }
        }
    };
}
