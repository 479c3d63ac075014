//! Stopping a machine: its vCPUs, then its devices.

use std::time::{Duration, Instant};

use migration::clock::{Clock, MonotonicClock};
use tracing::warn;

use super::{Machine, Vcpus};
use crate::clock::ClockState;
use crate::vcpu::{VcpuEnded, VcpuThread};

/// What keeps a guest from being stopped that has to wait for its memory.
#[derive(Debug, thiserror::Error)]
pub enum StillRunning {
    /// A vCPU.
    #[error("vCPU {0} waits for memory that has not come yet")]
    Vcpu(u32),
    /// A device.
    #[error("a device waits for memory that has not come yet")]
    Device,
    /// Nothing: a vCPU's thread is gone.
    #[error(transparent)]
    Ended(#[from] VcpuEnded),
}

impl Machine {
    /// Stops the guest, and returns since when it stands still, on the clock of the migration
    /// engine. Nothing if it is stopped already.
    ///
    /// That is when the vCPUs were asked, and not when they left KVM: one that waits for a host
    /// CPU just then leaves late, without having executed anything meanwhile. One that runs is out
    /// some 100 µs later.
    pub fn pause(&self) -> Duration {
        let mut vcpus = self.vcpus();
        let (asked, ran) = self.request_pause(&vcpus);
        for vcpu in &vcpus.threads {
            vcpu.wait_paused();
        }
        // After the vCPUs, which may be waiting for a device that finishes its work.
        self.devices.pause();
        self.paused(&mut vcpus, asked, ran)
    }

    /// The same, for a guest whose memory is not all here: a vCPU or a device that waits for some
    /// of it may not stand still before that has come. If that takes longer than `patience`, the
    /// guest runs on as if nothing had been asked.
    pub fn try_pause(&self, patience: Duration) -> Result<Duration, StillRunning> {
        let mut vcpus = self.vcpus();
        let ran = vcpus.any_running();
        let stopped = self.pause_within(patience, &mut vcpus);
        if stopped.is_err() && ran {
            // Not `enter`: that is for a guest that stands still.
            self.interrupt.clear();
            self.devices.run();
            vcpus.run_unless_stopped(false)?;
        }
        stopped
    }

    /// The same, but what does not stand still by then stops as soon as its memory has come:
    /// for a guest that has no way on from here. Whether all stands still.
    pub fn stop_soon(&self, patience: Duration) -> Result<Duration, StillRunning> {
        self.pause_within(patience, &mut self.vcpus())
    }

    fn pause_within(
        &self,
        patience: Duration,
        vcpus: &mut Vcpus,
    ) -> Result<Duration, StillRunning> {
        let deadline = Instant::now() + patience;
        let (asked, ran) = self.request_pause(vcpus);
        let late = |vcpu: &&VcpuThread| !vcpu.wait_paused_until(deadline);
        if let Some(vcpu) = vcpus.threads.iter().find(late) {
            return Err(StillRunning::Vcpu(vcpu.index()));
        }
        if !self.devices.pause_until(deadline) {
            return Err(StillRunning::Device);
        }
        Ok(self.paused(vcpus, asked, ran))
    }

    /// Asks all vCPUs to stop. When that was, and whether any ran.
    fn request_pause(&self, vcpus: &Vcpus) -> (Duration, bool) {
        let ran = vcpus.any_running();
        let asked = MonotonicClock.now();
        for vcpu in &vcpus.threads {
            vcpu.request_pause();
        }
        // After the requests: a vCPU that waits for room in the console looks for one.
        self.interrupt.raise();
        (asked, ran)
    }

    /// All stands still: since when. The clocks are kept for when the guest runs on.
    fn paused(&self, vcpus: &mut Vcpus, asked: Duration, ran: bool) -> Duration {
        let last = vcpus.threads.iter().filter_map(VcpuThread::last_left).max();
        let last = match last {
            Some(left) if !ran => left,
            _ => asked,
        };
        if ran || vcpus.stopped.is_none() {
            match ClockState::take(&self.vm, &vcpus.clocks(), last) {
                Ok(clocks) => vcpus.stopped = Some(clocks),
                Err(err) => {
                    warn!(%err, "the guest's clocks can't be read: they go on while it is stopped")
                }
            }
        }
        last
    }
}
