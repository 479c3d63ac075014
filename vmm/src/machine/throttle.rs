//! Slowing a guest down that writes faster than its memory moves.

use std::time::Instant;

use migration::layout::PAGE_SIZE;
use migration::throttle::Throttle;
use tracing::debug;

use super::dirty_limit::{Allowed, DirtyLimit};
use super::{Machine, Vcpus};

impl Machine {
    /// Slows the guest down from here on, whether it runs or not.
    pub fn throttle(&self, throttle: Throttle) {
        let mut vcpus = self.vcpus();
        let shares = match throttle {
            Throttle::Off => {
                vcpus.dirty_limit = DirtyLimit::default();
                vec![0; vcpus.threads.len()]
            }
            Throttle::Share(share) => vec![share; vcpus.threads.len()],
            Throttle::DirtyRate {
                total,
                each,
                measured,
            } => {
                let faults = vcpus.write_faults();
                let allowed = Allowed { total, each };
                let limit = &mut vcpus.dirty_limit;
                limit.update(Instant::now(), &faults, measured, allowed)
            }
        };
        debug!(?shares, "vCPUs are throttled");
        for (vcpu, share) in vcpus.threads.iter().zip(shares) {
            vcpu.throttle(share);
        }
    }
}

impl Vcpus {
    /// The bytes of pages for which each vCPU has had a write fault; 0 where KVM doesn't tell.
    fn write_faults(&self) -> Vec<u64> {
        let bytes = |vcpu: &crate::vcpu::VcpuThread| {
            let faults = vcpu.stats().and_then(|stats| stats.write_faults().ok());
            faults.unwrap_or(0).wrapping_mul(PAGE_SIZE)
        };
        self.threads.iter().map(bytes).collect()
    }
}
