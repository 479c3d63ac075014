//! Slowing vCPUs down: by a migration, because they write faster than their memory moves, and by
//! the user, who limits what they may write. Of all reasons the strongest counts.

use std::time::Instant;

use migration::layout::PAGE_SIZE;
use migration::throttle::Throttle;
use tracing::debug;

use super::dirty_limit::{Allowed, DirtyLimit};
use super::{Machine, Vcpus};
use crate::vcpu::VcpuThread;

/// Why vCPUs are slowed down.
#[derive(Debug, Default)]
pub(super) struct Reasons {
    /// A migration: all alike, in percent of their time.
    all: u8,
    /// A migration: those that write more than it lets them.
    migration: Option<DirtyLimit>,
    /// The user: each by its own limit.
    user: DirtyLimit,
}

/// A vCPU whose writes are limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitedVcpu {
    /// The vCPU.
    pub index: u32,
    /// What it may write to, in bytes a second.
    pub limit: u64,
    /// What it writes to, in bytes a second.
    pub rate: u64,
    /// Whether the rate is only the average of all vCPUs: this host doesn't tell which one writes.
    pub is_average: bool,
    /// The share of its time in percent for which it is kept from running.
    pub share: u8,
}

impl Machine {
    /// Slows the guest down from here on for a migration, whether it runs or not.
    pub fn throttle(&self, throttle: Throttle) {
        let mut vcpus = self.vcpus();
        (vcpus.slowed.all, vcpus.slowed.migration) = match throttle {
            Throttle::Off => (0, None),
            Throttle::Share(share) => (share, None),
            Throttle::DirtyRate {
                total,
                each,
                measured,
            } => {
                let mut limit = vcpus.slowed.migration.take().unwrap_or_default();
                limit.allow(Allowed::Together { total, each });
                let (faults, kept) = (vcpus.write_faults(), vcpus.kept());
                limit.look(Instant::now(), &faults, Some(measured), &kept);
                (0, Some(limit))
            }
        };
        vcpus.slow_down();
    }

    /// Limits what each vCPU may write to, in bytes a second; `None`, and one beyond the end, may
    /// what it likes. It takes effect with the next [look](Self::look_at_writes), but who is not
    /// limited any more is let go at once.
    pub fn limit_writes(&self, limits: Vec<Option<u64>>) {
        let mut vcpus = self.vcpus();
        vcpus.slowed.user.allow(Allowed::Own(limits));
        vcpus.slow_down();
    }

    /// The limits that were set.
    pub fn write_limits(&self) -> Vec<Option<u64>> {
        self.vcpus().slowed.user.own().to_vec()
    }

    /// Holds the vCPUs to their [limits](Self::limit_writes), by what they have written since the
    /// last look. `measured`: what they write to in a second, all together, by the dirty log, if it
    /// was looked at as well. The log must be on, whoever uses it.
    pub fn look_at_writes(&self, measured: Option<u64>) {
        let mut vcpus = self.vcpus();
        let (now, faults) = (Instant::now(), vcpus.write_faults());
        if vcpus.any_running() {
            let kept = vcpus.kept();
            vcpus.slowed.user.look(now, &faults, measured, &kept);
            vcpus.slow_down();
        } else {
            vcpus.slowed.user.skip(now, &faults);
        }
    }

    /// The vCPUs whose writes are limited, by the user or a migration.
    pub fn limited_vcpus(&self) -> Vec<LimitedVcpu> {
        let vcpus = self.vcpus();
        let Reasons {
            migration, user, ..
        } = &vcpus.slowed;
        let writes = migration.as_ref().unwrap_or(user).writes();
        let limited = |(nth, vcpu): (usize, &VcpuThread)| {
            let limits = [
                migration.as_ref().and_then(|by| by.limit(nth)),
                user.limit(nth),
            ];
            Some(LimitedVcpu {
                index: vcpu.index(),
                limit: limits.into_iter().flatten().min()?,
                rate: writes.rates().get(nth).map_or(0, |rate| *rate as u64),
                is_average: writes.are_averages(),
                share: vcpu.throttled(),
            })
        };
        vcpus
            .threads
            .iter()
            .enumerate()
            .filter_map(limited)
            .collect()
    }

    /// The bytes of pages for which each vCPU has had a write fault; 0 where KVM doesn't tell.
    pub fn write_faults(&self) -> Vec<u64> {
        self.vcpus().write_faults()
    }

    /// Whether the guest runs, or some of it.
    pub fn is_running(&self) -> bool {
        self.vcpus().any_running()
    }

    /// Whether KVM counts the faults of each vCPU.
    pub fn has_fault_counts(&self) -> bool {
        self.vcpus()
            .threads
            .iter()
            .all(|vcpu| vcpu.stats().is_some())
    }
}

impl Vcpus {
    fn write_faults(&self) -> Vec<u64> {
        let bytes = |vcpu: &VcpuThread| {
            let faults = vcpu.stats().and_then(|stats| stats.write_faults().ok());
            faults.unwrap_or(0).wrapping_mul(PAGE_SIZE)
        };
        self.threads.iter().map(bytes).collect()
    }

    /// For what share of its time each is kept from running.
    fn kept(&self) -> Vec<u8> {
        self.threads.iter().map(VcpuThread::throttled).collect()
    }

    fn slow_down(&self) {
        let Reasons {
            all,
            migration,
            user,
        } = &self.slowed;
        for (nth, vcpu) in self.threads.iter().enumerate() {
            let migration = migration.as_ref().map_or(0, |by| by.share(nth));
            vcpu.throttle((*all).max(migration).max(user.share(nth)));
        }
        debug!(shares = ?self.kept(), "vCPUs are throttled");
    }
}
