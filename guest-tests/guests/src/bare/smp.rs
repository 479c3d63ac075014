//! Starting the second vCPUs (Intel SDM, volume 3, 10.4.4).
#![allow(unsafe_code, reason = "starts code on other vCPUs")]

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::cpu::{self, Cpu};
use super::{intrinsics, lapic, privileged, tsc};

/// The page below 1 MiB that a started vCPU begins in. The VMM's boot information may have been
/// there; `Boot` has a copy.
const TRAMPOLINE: u64 = 0x8000;

// SAFETY: `entry.s` defines them; of the first two only the address is used.
unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static seconds_arrived: AtomicU32;
}

/// What the others run once they are there, as an address; 0: nothing yet.
static MAIN: AtomicUsize = AtomicUsize::new(0);

/// Starts all other vCPUs with `main`, and returns how many vCPUs run, the first included: as soon
/// as there are `expected`, else after a second.
pub fn start(khz: u64, expected: u64, main: fn(Cpu) -> !) -> u64 {
    MAIN.store(main as usize, Ordering::SeqCst);
    // SAFETY: the trampoline's page is RAM on any PC and nobody's by now.
    unsafe {
        let code = &raw const trampoline;
        intrinsics::copy(
            TRAMPOLINE as *mut u8,
            code,
            (&raw const trampoline_end).offset_from_unsigned(code),
        );
    }
    lapic::enable();
    lapic::broadcast_init();
    tsc::sleep_us(khz, 10_000);
    for _ in 0..2 {
        lapic::broadcast_startup((TRAMPOLINE >> 12) as u8);
        tsc::sleep_us(khz, 200);
    }
    let begin = tsc::now();
    while running() < expected && tsc::now().saturating_sub(begin) < khz * 1_000 {
        core::hint::spin_loop();
    }
    running()
}

/// vCPUs that run, the first included.
fn running() -> u64 {
    // SAFETY: entry.s changes it with locked instructions only.
    let seconds = unsafe { seconds_arrived.load(Ordering::SeqCst) };
    u64::from(seconds).min(cpu::MAX as u64 - 1) + 1
}

/// Where a second vCPU comes from entry.s.
pub(crate) fn second(cpu: Cpu) -> ! {
    let main = MAIN.load(Ordering::SeqCst);
    if main == 0 {
        privileged::stop();
    }
    // SAFETY: only `start` stores it, from a function of this type.
    let main: fn(Cpu) -> ! = unsafe { core::mem::transmute(main) };
    main(cpu)
}
