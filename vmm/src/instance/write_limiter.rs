//! Holding vCPUs to what their user lets them write: a thread that looks once in a while at what
//! each has written.
//!
//! It keeps the dirty log on for that, as faults tell who writes only then. There is one log: a
//! migration, or the saving of a snapshot, borrows it, and puts it on itself. Then there are faults
//! as well, and the limits hold on.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::bitmap::PageBitmap;
use migration::layout::{Layout, PAGE_SIZE};
use migration::vm::VmError;
use tracing::{error, warn};

use super::outgoing::ARM_PAGES;
use crate::kvm::DirtyLog;
use crate::machine::Machine;

/// From one look to the next, as in QEMU.
const PERIOD: Duration = Duration::from_secs(1);

/// The thread, and the log while it has that. Dropping it ends it, and with it the log.
pub(super) struct WriteLimiter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Borrows the limiter's log.
#[derive(Clone)]
pub(super) struct LogLender(Arc<Shared>);

struct Shared {
    guest: Arc<Machine>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    log: Log,
    ended: bool,
}

/// Where the log is.
enum Log {
    /// It is on.
    On(Watched),
    /// It is on, and being read.
    Busy,
    /// It is off: somebody else uses it, or it can't be switched on.
    Off,
    /// It is to be switched on again.
    Back,
}

/// A log that is on.
struct Watched {
    log: DirtyLog,
    /// Since when its bits are set only for what was written; `None` before it was read first.
    since: Option<Instant>,
}

impl WriteLimiter {
    /// Begins to hold the guest to its limits. `lent`: somebody else uses the log at present.
    pub(super) fn start(guest: Arc<Machine>, lent: bool) -> Result<Self, VmError> {
        let log = match lent {
            true => Log::Off,
            false => Log::On(Watched::start(&guest)?),
        };
        let shared = Arc::new(Shared {
            guest,
            state: Mutex::new(State { log, ended: false }),
            changed: Condvar::new(),
        });
        let mut limiter = Self {
            shared: Arc::clone(&shared),
            thread: None,
        };
        let thread = thread::Builder::new().name("vcpu-dirty-limit".to_owned());
        let thread = thread.spawn(move || shared.work());
        limiter.thread = Some(thread.map_err(|err: io::Error| {
            format!("cannot start the thread that limits what vCPUs write: {err}")
        })?);
        Ok(limiter)
    }

    /// For who needs the log.
    pub(super) fn lender(&self) -> LogLender {
        LogLender(Arc::clone(&self.shared))
    }
}

impl Drop for WriteLimiter {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the thread that limits what vCPUs write panicked");
        }
        self.shared.state().switch_off(&self.shared.guest);
    }
}

impl LogLender {
    /// The log is off when this returns, until [`give_back`](Self::give_back).
    pub(super) fn lend(&self) {
        let mut state = self.0.state();
        while matches!(state.log, Log::Busy) {
            let waited = self.0.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.switch_off(&self.0.guest);
    }

    /// Whoever borrowed it has switched it off again.
    pub(super) fn give_back(&self) {
        let mut state = self.0.state();
        if matches!(state.log, Log::Off) {
            state.log = Log::Back;
        }
    }
}

impl State {
    /// Under the lock: a log that is switched off late would be somebody else's.
    fn switch_off(&mut self, guest: &Machine) {
        if let Log::On(mut watched) = std::mem::replace(&mut self.log, Log::Off) {
            watched.log.stop(guest.vm());
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut next = Instant::now();
        while self.wait(next) {
            next = Instant::now() + PERIOD;
            let measured = self.measure();
            self.guest.look_at_writes(measured);
        }
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

    /// Reads the log and arms it again. What all vCPUs write to, in bytes a second, if that is known.
    fn measure(&self) -> Option<u64> {
        let mut watched = {
            let mut state = self.state();
            match std::mem::replace(&mut state.log, Log::Busy) {
                Log::On(watched) => watched,
                // The guest may have moved: then there is nothing to look at until it runs here.
                Log::Back if self.guest.is_running() => match Watched::start(&self.guest) {
                    Ok(watched) => watched,
                    Err(err) => {
                        warn!("what vCPUs write is not limited any more: {err}");
                        state.log = Log::Off;
                        return None;
                    }
                },
                other => {
                    state.log = other;
                    return None;
                }
            }
        };
        // Not under the lock, as it takes a while for a large guest.
        let measured = watched.read(&self.guest, &|| !self.state().ended);
        self.state().log = Log::On(watched);
        self.changed.notify_all();
        measured.unwrap_or_else(|err| {
            warn!("what vCPUs write can't be read: {err}");
            None
        })
    }
}

impl Watched {
    fn start(guest: &Machine) -> Result<Self, VmError> {
        let mut log = guest.vm().dirty_log()?;
        log.start(guest.vm())?;
        Ok(Self { log, since: None })
    }

    /// Bytes a second that were written to since it was read last. `None` the first time, and if
    /// it need not go on.
    fn read(
        &mut self,
        guest: &Machine,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Option<u64>, VmError> {
        let vm = guest.vm();
        let pages = Layout::of(guest.ram())?.pages();
        let mut written = PageBitmap::new(pages);
        let now = Instant::now();
        self.log.harvest_vcpus(vm, &mut written)?;
        for first in (0..pages).step_by(ARM_PAGES as usize) {
            if !goes_on() {
                return Ok(None);
            }
            self.log
                .protect(vm, &written, first, ARM_PAGES.min(pages - first))?;
        }
        let bytes = written.count() * PAGE_SIZE;
        let rate = |since: Instant| bytes as f64 / (now - since).as_secs_f64().max(1e-3);
        Ok(self.since.replace(now).map(|since| rate(since) as u64))
    }
}
