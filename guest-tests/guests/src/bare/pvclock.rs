//! kvmclock (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).
#![allow(unsafe_code, reason = "KVM writes the page while the guest reads it")]

use core::sync::atomic::{Ordering, fence};

use super::{privileged, tsc};

const SYSTEM_TIME: u32 = 0x4b56_4d01;
/// Leaf 0x40000001, EAX: KVM_FEATURE_CLOCKSOURCE2.
const FEATURE: u32 = 1 << 3;

/// What KVM writes, `pvclock_vcpu_time_info`, alone in its cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Page {
    version: u32,
    _pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    multiplier: u32,
    shift: i8,
    flags: u8,
    _pad2: [u8; 2],
}

/// Whether the VMM offers it.
#[must_use]
pub fn offered() -> bool {
    let hypervisor = privileged::cpuid(1, 0)[2] >> 31 != 0;
    let [_, b, c, d] = privileged::cpuid(0x4000_0000, 0);
    let kvm = hypervisor && [b, c, d] == [0x4b4d_564b, 0x564b_4d56, 0x4d];
    kvm && privileged::cpuid(0x4000_0001, 0)[0] & FEATURE != 0
}

/// A vCPU's clock, while KVM keeps its page up to date.
pub struct Clock<'a> {
    page: &'a mut Page,
}

impl<'a> Clock<'a> {
    /// Starts the clock of this vCPU.
    pub fn start(page: &'a mut Page) -> Self {
        // SAFETY: KVM writes to the page only, until `stop`.
        unsafe { privileged::wrmsr(SYSTEM_TIME, &raw mut *page as u64 | 1) };
        Self { page }
    }

    /// Stops it.
    pub fn stop(self) {
        // SAFETY: nothing else reads it.
        unsafe { privileged::wrmsr(SYSTEM_TIME, 0) };
    }

    /// The page, and the TSC by which to read it, at one time at which KVM was not writing.
    fn snapshot(&self) -> (Page, u64) {
        loop {
            // SAFETY: plain numbers in a page that exists as long as `self`.
            let page = unsafe { (&raw const *self.page).read_volatile() };
            fence(Ordering::SeqCst);
            let tsc = tsc::now();
            fence(Ordering::SeqCst);
            // SAFETY: as above.
            let version = unsafe { (&raw const self.page.version).read_volatile() };
            if page.version == version && version & 1 == 0 {
                return (page, tsc);
            }
        }
    }

    /// Whether KVM says that the clocks of all vCPUs agree (PVCLOCK_TSC_STABLE_BIT).
    #[must_use]
    pub fn is_stable(&self) -> bool {
        self.snapshot().0.flags & 1 != 0
    }

    /// ns of the guest's monotonic time.
    #[must_use]
    pub fn now(&self) -> u64 {
        let (page, tsc) = self.snapshot();
        let delta = tsc.saturating_sub(page.tsc_timestamp);
        let shifted = if page.shift < 0 {
            delta >> -page.shift
        } else {
            delta << page.shift
        };
        page.system_time + ((u128::from(shifted) * u128::from(page.multiplier)) >> 32) as u64
    }
}

/// The TSC's frequency in kHz, by the factor that KVM computes the clock with.
#[must_use]
pub fn tsc_khz() -> Option<u64> {
    if !offered() {
        return None;
    }
    let mut page = Page::default();
    let clock = Clock::start(&mut page);
    let (page, _) = clock.snapshot();
    clock.stop();
    let khz = (1_000_000u64 << 32).checked_div(page.multiplier.into())?;
    Some(if page.shift < 0 {
        khz << -page.shift
    } else {
        khz >> page.shift
    })
}
