//! How much the guest writes: measured in the background, on a thread of its own.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::bitmap::PageBitmap;
use migration::clock::{Clock, MonotonicClock};
use migration::guest_io::GuestPages;
use migration::layout::{Layout, PAGE_SIZE};
use migration::vm::VmError;
use tracing::{debug, warn};

use super::Instance;
use super::outgoing::{ARM_PAGES, Outgoing};
use crate::control::command::{
    CommandError, CommandResult, DirtyRateInfo, DirtyRateMode, DirtyRateRequest, DirtyRateStatus,
    DirtyRateVcpu,
};
use crate::kvm::DirtyLog;
use crate::machine::{Machine, WriteRates};

/// A measurement, under way or over. Dropping it ends it.
pub(super) struct DirtyRate {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    info: DirtyRateInfo,
    measured: Option<Measured>,
    ended: bool,
}

/// What is known of the guest once it has been measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// Bytes that it writes to in a second.
    pub(super) rate: f64,
    /// Bytes of its memory that hold something.
    pub(super) touched: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until then; false if it is to end.
    fn wait(&self, until: Instant) -> bool {
        let mut state = self.state();
        while !state.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        false
    }
}

impl DirtyRate {
    fn start(guest: Arc<Machine>, request: DirtyRateRequest) -> io::Result<Self> {
        let sampling = request.mode == DirtyRateMode::PageSampling;
        let info = DirtyRateInfo {
            dirty_rate: None,
            status: DirtyRateStatus::Measuring,
            start_time: MonotonicClock.now().as_secs(),
            calc_time: request.calc_time,
            sample_pages: if sampling { request.sample_pages } else { 0 },
            mode: request.mode,
            vcpu_dirty_rate: None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                info,
                measured: None,
                ended: false,
            }),
            changed: Condvar::new(),
        });
        let thread = thread::Builder::new()
            .name("dirty-rate".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    let mut vcpus = WriteRates::default();
                    let rate = match request.mode {
                        DirtyRateMode::PageSampling => sample(&guest, request, &shared),
                        DirtyRateMode::DirtyBitmap => log(&guest, request, &shared, &mut vcpus),
                    };
                    // Here, as it takes too long for a command on a large guest.
                    let measured = rate.and_then(|rate| {
                        let memory = GuestPages::new(guest.ram().clone())?;
                        Ok(rate.map(|rate| Measured {
                            rate,
                            touched: memory.touched_bytes(),
                        }))
                    });
                    let mut state = shared.state();
                    let (status, dirty_rate) = match measured {
                        Ok(Some(measured)) => {
                            debug!(?measured, "dirty rate measured");
                            state.measured = Some(measured);
                            (DirtyRateStatus::Measured, Some(measured.rate as u64 >> 20))
                        }
                        Ok(None) => (DirtyRateStatus::Unstarted, None),
                        Err(error) => {
                            warn!("the dirty rate can't be measured: {error}");
                            (DirtyRateStatus::Unstarted, None)
                        }
                    };
                    (state.info.status, state.info.dirty_rate) = (status, dirty_rate);
                    if dirty_rate.is_some() && request.mode == DirtyRateMode::DirtyBitmap {
                        state.info.vcpu_dirty_rate = by_vcpu(&vcpus);
                    }
                }
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn info(&self) -> DirtyRateInfo {
        self.shared.state().info.clone()
    }

    /// What was measured, once it is.
    pub(super) fn measured(&self) -> Option<Measured> {
        self.shared.state().measured
    }

    /// Ends it if it is not over. What it uses of the guest is free then.
    pub(super) fn end(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that measures the dirty rate panicked");
        }
    }
}

impl Drop for DirtyRate {
    fn drop(&mut self) {
        self.end();
    }
}

/// Bytes a second, by the contents of pages; `None` if it was ended.
fn sample(
    guest: &Machine,
    request: DirtyRateRequest,
    shared: &Shared,
) -> Result<Option<f64>, VmError> {
    let memory = GuestPages::new(guest.ram().clone())?;
    let pages = memory.layout().pages();
    let count = (pages * request.sample_pages * PAGE_SIZE)
        .div_ceil(1 << 30)
        .min(pages);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let sampled: Vec<u64> = (0..count)
        .map(|_| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % pages.max(1)
        })
        .collect();
    let sums = || {
        sampled
            .iter()
            .map(|page| memory.crc(*page))
            .collect::<Vec<_>>()
    };
    let began = Instant::now();
    let before = sums();
    if !shared.wait(began + Duration::from_secs(request.calc_time)) {
        return Ok(None);
    }
    let changed = before.iter().zip(sums()).filter(|(a, b)| **a != *b).count();
    let bytes = changed as f64 / count.max(1) as f64 * (pages * PAGE_SIZE) as f64;
    Ok(Some(bytes / began.elapsed().as_secs_f64()))
}

/// The same, by the dirty log. It is off again when this returns.
fn log(
    guest: &Machine,
    request: DirtyRateRequest,
    shared: &Shared,
    vcpus: &mut WriteRates,
) -> Result<Option<f64>, VmError> {
    let vm = guest.vm();
    let mut log = vm.dirty_log()?;
    log.start(vm)?;
    let measured = measure(guest, &mut log, request, shared, vcpus);
    log.stop(vm);
    measured
}

fn measure(
    guest: &Machine,
    log: &mut DirtyLog,
    request: DirtyRateRequest,
    shared: &Shared,
    vcpus: &mut WriteRates,
) -> Result<Option<f64>, VmError> {
    let vm = guest.vm();
    let pages = Layout::of(guest.ram())?.pages();
    let mut dirty = PageBitmap::new(pages);
    log.harvest(vm, &mut dirty)?;
    for first in (0..pages).step_by(ARM_PAGES as usize) {
        log.protect(vm, &dirty, first, ARM_PAGES.min(pages - first))?;
    }
    let began = Instant::now();
    vcpus.look(began, &guest.write_faults(), None);
    if !shared.wait(began + Duration::from_secs(request.calc_time)) {
        return Ok(None);
    }
    let mut dirty = PageBitmap::new(pages);
    log.harvest_vcpus(vm, &mut dirty)?;
    let now = Instant::now();
    let rate = |dirty: &PageBitmap| {
        (dirty.count() * PAGE_SIZE) as f64 / (now - began).as_secs_f64().max(1e-3)
    };
    vcpus.look(now, &guest.write_faults(), Some(rate(&dirty) as u64));
    log.harvest(vm, &mut dirty)?;
    Ok(Some(rate(&dirty)))
}

/// What each vCPU writes; `None` if only the average is known.
fn by_vcpu(writes: &WriteRates) -> Option<Vec<DirtyRateVcpu>> {
    let vcpu = |(id, rate): (u32, &f64)| DirtyRateVcpu {
        id,
        dirty_rate: *rate as u64 >> 20,
    };
    (!writes.are_averages()).then(|| (0..).zip(writes.rates()).map(vcpu).collect())
}

impl Instance {
    /// Begins to measure, in the background.
    pub(super) fn measure_dirty_rate(&self, request: DirtyRateRequest) -> CommandResult<()> {
        let mut state = self.0.state();
        let guest = Arc::clone(state.guest()?);
        state.check_no_snapshot_work()?;
        state.refuse_while_missing()?;
        if state.outgoing.as_ref().is_some_and(Outgoing::is_running) {
            return Err(CommandError::generic(
                "a migration is under way, which tells the dirty rate itself: see query-migrate",
            ));
        }
        if request.mode == DirtyRateMode::DirtyBitmap && state.write_limiter.is_some() {
            return Err(CommandError::generic(
                "limiting vCPUs needs the dirty log: query-vcpu-dirty-limit tells what those write; \
                 measure by page-sampling, or cancel the limits first (cancel-vcpu-dirty-limit)",
            ));
        }
        let measuring = |rate: &DirtyRate| rate.info().status == DirtyRateStatus::Measuring;
        if state.dirty_rate.as_ref().is_some_and(measuring) {
            return Err(CommandError::generic(
                "the dirty rate is already being measured",
            ));
        }
        let started = DirtyRate::start(guest, request);
        let started = started.map_err(|err| CommandError::generic(err.to_string()))?;
        state.dirty_rate = Some(started);
        Ok(())
    }

    /// What has been measured.
    pub(super) fn show_dirty_rate(&self) -> DirtyRateInfo {
        let state = self.0.state();
        state
            .dirty_rate
            .as_ref()
            .map(DirtyRate::info)
            .unwrap_or_default()
    }
}
