//! Waiting for devices: by looking all the time, or halted until an interrupt.

use super::cpu::Cpu;
use super::{interrupts, lapic, privileged};
use crate::mmio::Wait;

/// The timer has the last of the vectors that `traps.s` acknowledges, devices the first three; what
/// more there are share the third.
const DEVICE_VECTORS: u8 = 3;
const TIMER_VECTOR: u8 = interrupts::APIC_VECTORS + DEVICE_VECTORS;
/// ns from one tick of the timer to the next.
const TICK_NS: u32 = 1_000_000;

/// How a guest waits. Interrupts are let in only while it does.
pub struct Waiter {
    wait: Wait,
    cpu: Cpu,
    seen: [u64; DEVICE_VECTORS as usize],
}

impl Waiter {
    /// Opens the interrupts of these pins of the I/O APIC and, if `wait` is `Irq`, starts a timer
    /// that ends the waits in which nothing comes.
    #[must_use]
    pub fn new(wait: Wait, pins: impl Iterator<Item = u8>) -> Self {
        if wait == Wait::Irq {
            interrupts::close_pic();
            for (index, pin) in pins.enumerate() {
                interrupts::open_ioapic(pin, interrupts::APIC_VECTORS + vector(index));
            }
            lapic::start_timer(TIMER_VECTOR, TICK_NS);
        }
        Self {
            wait,
            cpu: Cpu::nth(0),
            seen: [0; DEVICE_VECTORS as usize],
        }
    }

    /// Waits for an interrupt of a device or the timer, or not at all.
    pub fn wait(&self) {
        match self.wait {
            Wait::Poll => core::hint::spin_loop(),
            // An interrupt that is pending already ends the halt at once.
            Wait::Irq => {
                privileged::wait(self.cpu.counter(TIMER_VECTOR), self.cpu.count(TIMER_VECTOR))
            }
        }
    }

    /// Interrupts of a device so far.
    #[must_use]
    pub fn interrupts(&self, index: usize) -> u64 {
        self.cpu.count(interrupts::APIC_VECTORS + vector(index))
    }

    /// Whether there was an interrupt of a device since the last `take_news`.
    #[must_use]
    pub fn has_news(&self, index: usize) -> bool {
        self.wait == Wait::Poll || self.interrupts(index) != self.seen[usize::from(vector(index))]
    }

    /// Notes which interrupts there were.
    pub fn take_news(&mut self) {
        for index in 0..self.seen.len() {
            self.seen[index] = self.interrupts(index);
        }
    }
}

fn vector(index: usize) -> u8 {
    (index as u8).min(DEVICE_VECTORS - 1)
}

/// Looks that something must have been done for, besides the second: the guest may have stood still
/// meanwhile, and the interrupt be on its way.
const LOOKS: u32 = 200;

/// Notices interrupts that don't come.
#[derive(Default)]
pub struct Watchdog {
    since: Option<(u64, u32)>,
    /// How often one did not come.
    pub lost: u64,
}

impl Watchdog {
    /// Whether something has been done for a second, by the TSC, without `news`.
    pub fn misses(&mut self, now: u64, khz: u64, news: bool, done: bool) -> bool {
        if news || !done {
            self.since = None;
            return false;
        }
        let (since, looks) = self.since.get_or_insert((now, 0));
        *looks += 1;
        let missed = *looks >= LOOKS && now.saturating_sub(*since) >= khz * 1000;
        if missed {
            self.since = None;
            self.lost += 1;
        }
        missed
    }
}
