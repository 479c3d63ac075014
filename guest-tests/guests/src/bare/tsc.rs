//! The time stamp counter and its frequency.
#![allow(unsafe_code, reason = "reads the counter")]

use super::{port, privileged, pvclock};

/// The counter now.
#[must_use]
pub fn now() -> u64 {
    // SAFETY: CR4.TSD is clear, so it is readable at CPL 3.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Its frequency in kHz: `given` unless 0, or else what CPUID, kvmclock or the PIT tell.
#[must_use]
pub fn frequency(given: u64) -> Option<u64> {
    [
        || hypervisor_leaf(),
        || crystal_leaf(),
        || pvclock::tsc_khz(),
        || by_pit(),
    ]
    .into_iter()
    .fold(
        (given != 0).then_some(given),
        |found, source: fn() -> Option<u64>| found.or_else(source),
    )
}

/// Leaf 0x40000010, EAX: as VMware and QEMU (`vmware-cpuid-freq`) have it.
fn hypervisor_leaf() -> Option<u64> {
    let hypervisor = privileged::cpuid(1, 0)[2] >> 31 != 0;
    let reaches = hypervisor && privileged::cpuid(0x4000_0000, 0)[0] >= 0x4000_0010;
    let khz = if reaches {
        privileged::cpuid(0x4000_0010, 0)[0]
    } else {
        0
    };
    (khz != 0).then_some(khz.into())
}

/// Leaf 0x15: a ratio to the crystal's frequency.
fn crystal_leaf() -> Option<u64> {
    if privileged::cpuid(0, 0)[0] < 0x15 {
        return None;
    }
    let [denominator, numerator, hertz, _] = privileged::cpuid(0x15, 0).map(u64::from);
    (hertz * numerator)
        .checked_div(denominator)
        .filter(|&hertz| hertz != 0)
        .map(|hertz| hertz / 1000)
}

/// Lets the PIT's channel 2 count 20 ms.
fn by_pit() -> Option<u64> {
    const PIT_HERTZ: u64 = 1_193_182;
    const COUNT: u64 = PIT_HERTZ / 50;
    const GATE: u16 = 0x61;
    let gate = port::read(GATE) & 0xfc;
    port::write(GATE, gate);
    port::write(0x43, 0xb0); // channel 2, both bytes, mode 0: the output rises at the end
    port::write(0x42, COUNT as u8);
    port::write(0x42, (COUNT >> 8) as u8);
    port::write(GATE, gate | 1);
    let begin = now();
    // 2^34 cycles are seconds on any processor.
    while port::read(GATE) & 0x20 == 0 {
        if now() - begin > 1 << 34 {
            return None;
        }
    }
    let cycles = now() - begin;
    let khz = cycles * PIT_HERTZ / COUNT / 1000;
    // Without a PIT the output may seem high at once.
    (khz > 100_000).then_some(khz)
}

/// Waits.
pub fn sleep_us(khz: u64, microseconds: u64) {
    let begin = now();
    while now().saturating_sub(begin) < microseconds * khz / 1000 {
        core::hint::spin_loop();
    }
}
