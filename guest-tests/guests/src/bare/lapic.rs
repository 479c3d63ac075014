//! The local APIC, by its registers in memory (Intel SDM, volume 3, chapter 12).
#![allow(unsafe_code, reason = "memory-mapped registers")]

const BASE: usize = 0xfee0_0000;
const SPURIOUS: u32 = 0xf0;
const COMMAND_LOW: u32 = 0x300;
const COMMAND_PENDING: u32 = 1 << 12;

/// Reads a register.
#[must_use]
pub fn read(register: u32) -> u32 {
    // SAFETY: memory.rs maps the page; every vCPU sees its own.
    unsafe { ((BASE + register as usize) as *const u32).read_volatile() }
}

/// Writes a register.
pub fn write(register: u32, value: u32) {
    // SAFETY: as in `read`.
    unsafe { ((BASE + register as usize) as *mut u32).write_volatile(value) };
}

/// Switches it on, with the spurious vector 0xff.
pub fn enable() {
    write(SPURIOUS, 0x1ff);
}

fn broadcast(command: u32) {
    const ALL_BUT_SELF: u32 = 3 << 18;
    write(COMMAND_LOW, ALL_BUT_SELF | command);
    while read(COMMAND_LOW) & COMMAND_PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// INIT to all other vCPUs.
pub fn broadcast_init() {
    broadcast(0x4500);
}

/// Start-up to all other vCPUs, at this page.
pub fn broadcast_startup(page: u8) {
    broadcast(0x4600 | u32::from(page));
}

/// Starts the timer: an interrupt every so many ns (KVM's local APIC counts ns).
pub fn start_timer(vector: u8, ns: u32) {
    const LVT_TIMER: u32 = 0x320;
    const INITIAL_COUNT: u32 = 0x380;
    const DIVIDE: u32 = 0x3e0;
    const BY_ONE: u32 = 0xb;
    const PERIODIC: u32 = 1 << 17;
    write(DIVIDE, BY_ONE);
    write(LVT_TIMER, PERIODIC | u32::from(vector));
    write(INITIAL_COUNT, ns);
}
