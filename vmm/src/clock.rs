//! The guest's clocks across a stop: its TSC and kvmclock.
//!
//! What holds, wherever the guest goes on: no clock goes back, all vCPUs' TSCs keep their distances
//! (none, unless the guest made one), and the guest misses no more time than it was told to.
//!
//! A [`ClockState`] is taken while the guest is stopped: every vCPU's TSC and kvmclock at one
//! instant, and how long after the guest's last instruction that was. Starting at the
//! destination sets them to what they were then, moved on by the rest of the time that the guest
//! was stopped. That is never less than what the guest last read.
//!
//! Stopped and continued by its user on the same host, the guest has its kvmclock set to where it
//! stopped, as QEMU does; its TSC, which is the hardware's, counts on, as with QEMU too.
//!
//! The TSC is set through its offset (`KVM_VCPU_TSC_OFFSET`, see the kernel's
//! Documentation/virt/kvm/devices/vcpu.rst): the guest's TSC is the host's, scaled if the
//! frequencies differ, plus the offset. Equal offsets are equal TSCs, whenever they are set.
//!
//! Not every KVM can do that. One without hardware virtualization runs user code natively, where
//! RDTSC reads the host's TSC whatever the offset; it takes an offset, ignores it, and keeps the
//! guest's TSC the host's for the guest's kernel too (measured: KVM_GET_DEVICE_ATTR goes on
//! to say 0). So the offset is read back. Between processes of one host the guest then
//! sees the time pass as it should; on a host whose TSC is behind, its TSC would go back, and
//! that is an error.

use std::time::Duration;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use migration::clock::{Clock, MonotonicClock};
use migration::section::Section;
use serde::{Deserialize, Serialize};

use crate::kvm::ioctl::VcpuClockFd;
use crate::kvm::{IoctlError, Vm};
use crate::section_body::{self, BodyError};
use crate::vcpu::{MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE};

/// The version of the section's body that this build writes; it reads no other.
pub const VERSION: u32 = 1;
/// The section's name.
pub const SECTION: &str = "clock";

/// 254 vCPUs of 8 bytes, and the rest.
const MAX_BODY: usize = 4096;

/// How much two frequencies may differ and be taken as the same, in parts per million: what KVM
/// tolerates, too (its parameter `tsc_tolerance_ppm`).
const TOLERANCE_PPM: u64 = 250;

/// Whether a guest whose TSC runs at `guest_khz` notices nothing at `host_khz`.
pub(crate) fn tsc_matches(guest_khz: u32, host_khz: u32) -> bool {
    let (guest, host) = (u64::from(guest_khz), u64::from(host_khz));
    guest.abs_diff(host) * 1_000_000 <= host * TOLERANCE_PPM
}

/// Why the clocks can't be saved or set.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// An ioctl failed.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
    /// The section can't be decoded or encoded.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// Another number of vCPUs.
    #[error("there are TSCs of {found} vCPUs, but the guest has {expected}")]
    Vcpus {
        /// The number in the state.
        found: usize,
        /// The guest's.
        expected: usize,
    },
    /// A frequency of zero.
    #[error("the TSC's frequency is 0")]
    Frequency,
    /// The TSC can't be set, and is behind.
    #[error(
        "this KVM cannot set the guest's TSC: it would go back from {last} to {here}; migrate to a \
         host that has been up for longer, or to one with hardware virtualization"
    )]
    GoesBack {
        /// The guest's TSC when it was stopped.
        last: u64,
        /// What it would be here.
        here: u64,
    },
    /// Another TSC frequency, and no scaling.
    #[error(
        "the guest's TSC runs at {guest} kHz, this host's at {host} kHz, and this KVM cannot scale \
         it"
    )]
    NoScaling {
        /// The guest's frequency in kHz.
        guest: u32,
        /// The host's.
        host: u32,
    },
}

/// The clocks of a stopped guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock in nanoseconds.
    kvmclock: u64,
    /// Each vCPU's TSC at the same instant.
    tscs: Vec<u64>,
    /// Their frequency in kHz.
    tsc_khz: u32,
    /// How long after the guest's last instruction that instant was, in nanoseconds.
    after_stop: u64,
}

impl ClockState {
    /// The guest's kvmclock: the time that it has run, with stops that it was not to notice.
    pub fn kvmclock(&self) -> Duration {
        Duration::from_nanos(self.kvmclock)
    }

    /// Takes the clocks of a guest whose vCPUs, all in `vcpus` in the order of their indices, are
    /// paused, the last since `stopped_at` on [`MonotonicClock`].
    pub fn take(vm: &Vm, vcpus: &[&VcpuClockFd], stopped_at: Duration) -> Result<Self, ClockError> {
        let map = TscMap::measure(vcpus)?;
        // Before the clock is read, so that the time is rather too short: see `advance`.
        let now = MonotonicClock.now();
        let host_tsc = host_tsc();
        let clock = vm
            .fd()
            .get_clock()
            .map_err(IoctlError::named("KVM_GET_CLOCK"))?;
        // KVM tells the TSC that the clock's value belongs to where it computes one from the other.
        let host_tsc = if clock.flags & KVM_CLOCK_HOST_TSC != 0 {
            clock.host_tsc
        } else {
            host_tsc
        };
        let tscs = vcpus
            .iter()
            .map(|vcpu| Ok(map.guest(host_tsc, map.offset(vcpu)?)))
            .collect::<Result<_, IoctlError>>()?;
        Ok(Self {
            kvmclock: clock.clock,
            tscs,
            tsc_khz: tsc_khz(vcpus)?,
            after_stop: now.saturating_sub(stopped_at).as_nanos() as u64,
        })
    }

    /// Encodes the clocks.
    pub fn to_section(&self) -> Result<Section, ClockError> {
        Ok(Section {
            name: SECTION.to_owned(),
            version: VERSION,
            body: section_body::encode(self)?,
        })
    }

    /// Decodes the clocks of a guest with `vcpus` vCPUs. Nothing in the section is trusted.
    pub fn from_section(section: &Section, vcpus: usize) -> Result<Self, ClockError> {
        let state: Self = section_body::decode::<MAX_BODY, _>(&section.body)?;
        if state.tscs.len() != vcpus {
            return Err(ClockError::Vcpus {
                found: state.tscs.len(),
                expected: vcpus,
            });
        }
        if state.tsc_khz == 0 {
            return Err(ClockError::Frequency);
        }
        Ok(state)
    }

    /// Sets the clocks of a guest that arrives, or that was loaded and begins to run: to where
    /// they were, moved on for a guest that has been stopped for `stopped_for`. The vCPUs are
    /// paused.
    ///
    /// It is called twice: with zero before the vCPUs' states are loaded, because the APIC
    /// timers' deadlines mean something only with the right TSC; and at the start, where it is a
    /// handful of ioctls.
    pub fn set(
        &self,
        vm: &Vm,
        vcpus: &[&VcpuClockFd],
        stopped_for: Duration,
    ) -> Result<(), ClockError> {
        if self.tscs.len() != vcpus.len() {
            return Err(ClockError::Vcpus {
                found: self.tscs.len(),
                expected: vcpus.len(),
            });
        }
        self.set_frequency(vm, vcpus)?;
        let map = TscMap::measure(vcpus)?;
        let advance = self.advance(stopped_for);
        let ticks = ticks(advance, self.tsc_khz);
        // One instant for all vCPUs: what is equal stays equal.
        let host_tsc = host_tsc();
        for (vcpu, tsc) in vcpus.iter().zip(&self.tscs) {
            let here = map.set(vcpu, host_tsc, tsc.wrapping_add(ticks))?;
            // Ahead by less than half of the range: TSCs are compared modulo 2^64.
            if here.wrapping_sub(*tsc) > u64::MAX / 2 {
                return Err(ClockError::GoesBack { last: *tsc, here });
            }
            // A timer that is armed counts from the TSC at the time that it was armed: again.
            if let Some(deadline) = vcpu.msr(MSR_IA32_TSC_DEADLINE)?
                && deadline != 0
            {
                vcpu.set_msr(MSR_IA32_TSC_DEADLINE, deadline)?;
            }
        }
        set_kvmclock(vm, self.kvmclock.saturating_add(advance.as_nanos() as u64))
    }

    /// Sets kvmclock to where it was, for a guest that its user continues on the host on which it
    /// was stopped.
    pub fn resume_kvmclock(&self, vm: &Vm) -> Result<(), ClockError> {
        set_kvmclock(vm, self.kvmclock)
    }

    /// What is left of the time that the guest was stopped after the clocks were taken; at least
    /// zero: they don't go back.
    fn advance(&self, stopped_for: Duration) -> Duration {
        stopped_for.saturating_sub(Duration::from_nanos(self.after_stop))
    }

    fn set_frequency(&self, vm: &Vm, vcpus: &[&VcpuClockFd]) -> Result<(), ClockError> {
        for vcpu in vcpus {
            let host = vcpu.tsc_khz()?;
            if host == self.tsc_khz {
                continue;
            }
            if vm.capabilities().tsc_control {
                vcpu.set_tsc_khz(self.tsc_khz)?;
            } else if !tsc_matches(self.tsc_khz, host) {
                return Err(ClockError::NoScaling {
                    guest: self.tsc_khz,
                    host,
                });
            }
        }
        Ok(())
    }
}

/// Tells each guest kernel that uses kvmclock that it was stopped, so that its watchdogs don't take
/// the gap for a hang. One that doesn't use it need not know.
pub fn tell_stopped(vm: &Vm, vcpus: &[&VcpuClockFd]) {
    if vm.capabilities().kvmclock_ctrl {
        for vcpu in vcpus {
            // EINVAL says that this vCPU has no kvmclock.
            let _ = vcpu.kvmclock_ctrl();
        }
    }
}

fn set_kvmclock(vm: &Vm, nanos: u64) -> Result<(), ClockError> {
    // Without flags: with KVM_CLOCK_REALTIME KVM would add the difference of the two hosts'
    // wall clocks, which nobody guarantees to agree.
    vm.fd()
        .set_clock(&kvm_clock_data {
            clock: nanos,
            ..Default::default()
        })
        .map_err(IoctlError::named("KVM_SET_CLOCK"))?;
    Ok(())
}

fn tsc_khz(vcpus: &[&VcpuClockFd]) -> Result<u32, IoctlError> {
    vcpus.first().map_or(Ok(1), |vcpu| vcpu.tsc_khz())
}

/// A time in ticks of a TSC.
fn ticks(time: Duration, khz: u32) -> u64 {
    (time.as_nanos() * u128::from(khz) / 1_000_000) as u64
}

/// The TSC of the host, as KVM's arithmetic has it.
fn host_tsc() -> u64 {
    crate::kvm::ioctl::host_tsc()
}

/// From the host's TSC to the guests', offsets aside.
#[derive(Clone, Copy, Debug, PartialEq)]
struct TscMap {
    /// The host's TSC at some instant, and the guest's less its offset then.
    host: u64,
    scaled: u64,
    /// The frequencies of the guest's TSC and of the host's in kHz; equal if both are one clock.
    rates: (u32, u32),
    /// Without the attribute for offsets (before Linux 5.16) TSCs are set by writing the MSR; KVM
    /// gives vCPUs that are written at about the same time the same offset.
    has_offset: bool,
}

impl TscMap {
    fn measure(vcpus: &[&VcpuClockFd]) -> Result<Self, IoctlError> {
        let Some(vcpu) = vcpus.first() else {
            return Ok(Self::between((0, 0), 0, (1, 1), true));
        };
        let offset = vcpu.tsc_offset().ok();
        let before = host_tsc();
        let guest = vcpu.msr(MSR_IA32_TSC)?.unwrap_or(0);
        let after = host_tsc();
        let scaled = guest.wrapping_sub(offset.unwrap_or(0));
        let rates = (vcpu.tsc_khz()?, vcpu.host_tsc_khz());
        Ok(Self::between(
            (before, after),
            scaled,
            rates,
            offset.is_some(),
        ))
    }

    /// From a guest TSC, less its offset, that was read between two readings of the host's.
    fn between(
        (before, after): (u64, u64),
        scaled: u64,
        rates: (u32, u32),
        has_offset: bool,
    ) -> Self {
        if has_offset && (before..=after).contains(&scaled) {
            // The same clock: exact, however long the reading took.
            return Self {
                host: scaled,
                scaled,
                rates: (1, 1),
                has_offset,
            };
        }
        // The later one: the guest's TSC comes out rather too high than too low.
        Self {
            host: after,
            scaled,
            rates,
            has_offset,
        }
    }

    /// The guest's TSC less its offset when the host's is `host_tsc`.
    fn scaled(&self, host_tsc: u64) -> u64 {
        let since = host_tsc.wrapping_sub(self.host) as i64;
        let (guest_khz, host_khz) = self.rates;
        let scaled = i128::from(since) * i128::from(guest_khz) / i128::from(host_khz.max(1));
        self.scaled.wrapping_add_signed(scaled as i64)
    }

    /// A guest's TSC when the host's is `host_tsc`.
    fn guest(&self, host_tsc: u64, offset: u64) -> u64 {
        self.scaled(host_tsc).wrapping_add(offset)
    }

    fn offset(&self, vcpu: &VcpuClockFd) -> Result<u64, IoctlError> {
        if self.has_offset {
            vcpu.tsc_offset()
        } else {
            Ok(0)
        }
    }

    /// Sets a guest's TSC for the instant when the host's is `host_tsc`. Returns what it really is
    /// then.
    fn set(&self, vcpu: &VcpuClockFd, host_tsc: u64, tsc: u64) -> Result<u64, IoctlError> {
        if !self.has_offset {
            vcpu.set_msr(MSR_IA32_TSC, tsc)?;
            return Ok(tsc);
        }
        vcpu.set_tsc_offset(tsc.wrapping_sub(self.scaled(host_tsc)))?;
        Ok(self.guest(host_tsc, vcpu.tsc_offset()?))
    }
}

#[cfg(test)]
mod tests;
