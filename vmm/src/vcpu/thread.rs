//! A vCPU's thread, and the handle by which the machine commands it.
//!
//! ```text
//!            run()                     pause asked for, or the guest stops itself
//!  Paused ──────────► Running ───────────────────────────────────────────────────► Paused
//!    │  ▲                │
//!    │  └─ call(f)       └ a panic in the thread (a bug) ends it
//!    │
//!    └─ handle dropped ─► Ended
//! ```
//!
//! All vCPUs are first asked to pause, then awaited, so that the pauses overlap. Neither asking
//! nor awaiting may be done under a lock that a device takes: a vCPU may be in that device.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::clock::{Clock, MonotonicClock};
use rustix::thread::gettid;

use super::io::{EventSink, IoBus, VcpuEvent};
use super::kick::{self, Kickable};
use super::throttle::{Throttle, Turns};
use super::{Left, Vcpu};
use crate::kvm::VcpuStats;
use crate::kvm::ioctl::VcpuClockFd;

/// What a vCPU's thread is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuStatus {
    /// Out of the guest; its state can be read and written.
    Paused {
        /// Why, if it wasn't because of a pause asked for.
        event: Option<VcpuEvent>,
    },
    /// In the guest, about to enter it, or in a device on its behalf.
    Running,
    /// The thread is gone.
    Ended,
}

/// The vCPU's thread is gone, so nothing can be done with the vCPU any more.
#[derive(Debug, thiserror::Error)]
#[error("the thread of vCPU {0} has ended")]
pub struct VcpuEnded(pub u32);

/// Something to be done with a paused vCPU, by its thread or by who waits for it: whoever comes
/// first takes it. Waking the thread up takes tens of microseconds, and where the host's CPUs are
/// virtual now and then milliseconds: long amid a migration's stop.
#[derive(Clone)]
struct Call(Arc<Mutex<Option<Work>>>);

type Work = Box<dyn FnOnce(&mut Vcpu) + Send>;

impl Call {
    fn do_with(&self, vcpu: &Mutex<Vcpu>) {
        let work = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            work(&mut vcpu.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

enum Command {
    Run,
    Call(Call),
}

struct Shared {
    /// Whether the vCPU is wanted out of the guest.
    pause: AtomicBool,
    throttle: Throttle,
    status: Mutex<VcpuStatus>,
    changed: Condvar,
    /// When the guest was last about to be entered, and last left, in nanoseconds of
    /// [`MonotonicClock`]; 0 for never.
    entered_at: AtomicU64,
    left_at: AtomicU64,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, VcpuStatus> {
        // Only assignments happen under the lock.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pauses if that is still asked for, and says whether it is: [`VcpuThread::run`] may have
    /// taken it back.
    fn pauses(&self) -> bool {
        let mut status = self.status();
        let pauses = self.pause.load(Ordering::SeqCst);
        if pauses {
            *status = VcpuStatus::Paused { event: None };
            self.changed.notify_all();
        }
        pauses
    }

    fn set_status(&self, status: VcpuStatus) {
        *self.status() = status;
        self.changed.notify_all();
    }
}

/// A vCPU's thread. Dropping it ends the thread, after a pause if it is running.
pub struct VcpuThread {
    /// Locked by the thread while the guest runs.
    vcpu: Arc<Mutex<Vcpu>>,
    index: u32,
    thread_id: i32,
    shared: Arc<Shared>,
    /// `None` only while being dropped.
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    clock: VcpuClockFd,
    /// `None` where KVM has none.
    stats: Option<VcpuStats>,
}

/// The result of a call on a vCPU's thread, to be waited for.
#[must_use]
pub struct Pending<T> {
    index: u32,
    vcpu: Arc<Mutex<Vcpu>>,
    /// `None` if it is only for the thread to do.
    call: Option<Call>,
    result: Receiver<T>,
}

impl<T> Pending<T> {
    /// Waits for the call to be done, or does it, if the vCPU's thread has not begun to.
    pub fn wait(self) -> Result<T, VcpuEnded> {
        if let Some(call) = &self.call {
            call.do_with(&self.vcpu);
        }
        self.result.recv().map_err(|_| VcpuEnded(self.index))
    }
}

impl VcpuThread {
    /// Starts the thread, paused.
    pub fn spawn(
        vcpu: Vcpu,
        bus: Arc<dyn IoBus>,
        events: Arc<dyn EventSink>,
    ) -> Result<Self, io::Error> {
        kick::install()?;
        let index = vcpu.index;
        let clock = VcpuClockFd::of(&vcpu.fd, vcpu.host_tsc_khz)?;
        let stats = VcpuStats::of(&vcpu.fd).unwrap_or_else(|error| {
            tracing::debug!(vcpu = index, %error, "no statistics");
            None
        });
        let shared = Arc::new(Shared {
            pause: AtomicBool::new(false),
            throttle: Throttle::default(),
            status: Mutex::new(VcpuStatus::Paused { event: None }),
            changed: Condvar::new(),
            entered_at: AtomicU64::new(0),
            left_at: AtomicU64::new(0),
        });
        let (commands, receiver) = mpsc::channel();
        let vcpu = Arc::new(Mutex::new(vcpu));
        let body = Body {
            index,
            vcpu: Arc::clone(&vcpu),
            bus,
            events,
            commands: receiver,
            shared: Arc::clone(&shared),
        };
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || body.run(&ready))?;
        let mut this = Self {
            vcpu,
            index,
            thread_id: 0,
            shared,
            commands: Some(commands),
            thread: Some(thread),
            clock,
            stats,
        };
        this.thread_id = is_ready
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the vCPU's thread did not start")))?;
        Ok(this)
    }

    /// The vCPU's index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The host's number of the thread (gettid(2)).
    pub fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// What the thread is doing now.
    pub fn status(&self) -> VcpuStatus {
        self.shared.status().clone()
    }

    /// Lets the guest run; nothing if it does already. Takes back a pause that was asked for and
    /// is not done yet. Returns before the guest is entered: see [`Self::wait_entered`].
    pub fn run(&mut self) -> Result<(), VcpuEnded> {
        {
            let mut status = self.shared.status();
            match *status {
                // The thread looks at the request once more before it changes the status.
                VcpuStatus::Running => {
                    self.shared.pause.store(false, Ordering::SeqCst);
                    return Ok(());
                }
                VcpuStatus::Paused { .. } => {}
                VcpuStatus::Ended => return Err(VcpuEnded(self.index)),
            }
            // From here on a pause that is awaited waits for this run to end.
            *status = VcpuStatus::Running;
            self.shared.pause.store(false, Ordering::SeqCst);
            self.shared.entered_at.store(0, Ordering::SeqCst);
        }
        self.send(Command::Run)
    }

    /// Asks the vCPU to leave the guest, and returns at once.
    pub fn request_pause(&self) {
        self.shared.pause.store(true, Ordering::SeqCst);
        self.shared.throttle.pause_requested();
        if let Some(thread) = &self.thread {
            kick::kick(thread);
        }
    }

    /// From here on keeps the vCPU out of the guest for this share of its time, in percent, at most
    /// [`MAX_SHARE`](super::MAX_SHARE); 0 lets it run as it likes. A pause takes no longer for that.
    pub fn throttle(&self, share: u8) {
        if self.shared.throttle.set(share)
            && let Some(thread) = &self.thread
        {
            kick::kick(thread);
        }
    }

    /// The share of its time in percent that the vCPU is kept out of the guest.
    pub fn throttled(&self) -> u8 {
        self.shared.throttle.share()
    }

    /// Waits until the vCPU is out of the guest and its state can be read. Returns why it is:
    /// [`VcpuStatus::Paused`] or [`VcpuStatus::Ended`].
    pub fn wait_paused(&self) -> VcpuStatus {
        let mut status = self.shared.status();
        while *status == VcpuStatus::Running {
            status = self
                .shared
                .changed
                .wait(status)
                .unwrap_or_else(PoisonError::into_inner);
        }
        status.clone()
    }

    /// The same, but not longer than until `deadline`; whether the vCPU is out. It may have to
    /// wait for guest memory that is not there yet. [`Self::run`] takes the request back.
    pub fn wait_paused_until(&self, deadline: Instant) -> bool {
        let mut status = self.shared.status();
        while *status == VcpuStatus::Running {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(status, left);
            (status, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Waits until the vCPU is about to enter the guest after [`Self::run`], or has already left
    /// it again. Returns the time of that entry on [`MonotonicClock`]; `None` if a pause came
    /// first.
    pub fn wait_entered(&self) -> Option<Duration> {
        let mut status = self.shared.status();
        while *status == VcpuStatus::Running && self.shared.entered_at.load(Ordering::SeqCst) == 0 {
            status = self
                .shared
                .changed
                .wait(status)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(status);
        nanos(&self.shared.entered_at)
    }

    /// When the vCPU last left the guest, on [`MonotonicClock`]: the moment that KVM_RUN returned.
    /// `None` if it never ran. Only meaningful while it is paused.
    pub fn last_left(&self) -> Option<Duration> {
        nanos(&self.shared.left_at)
    }

    /// Runs `f` on the vCPU's thread as soon as it is paused, or on the one that waits for it; call
    /// it on several vCPUs, then wait for each, and they work in parallel. Calls that are waited
    /// for in their order are made in it, and before a [`Self::run`] that comes after them.
    pub fn call<T: Send + 'static>(
        &mut self,
        f: impl FnOnce(&mut Vcpu) -> T + Send + 'static,
    ) -> Pending<T> {
        let (sender, result) = mpsc::sync_channel(1);
        let call = Call(Arc::new(Mutex::new(Some(Box::new(move |vcpu| {
            let _ = sender.send(f(vcpu));
        })))));
        // If the thread has ended, the sender is dropped with the call: `wait` says so.
        let sent = self.send(Command::Call(call.clone()));
        // One that runs does it itself when it has stopped.
        let paused = matches!(self.status(), VcpuStatus::Paused { .. });
        Pending {
            index: self.index,
            vcpu: Arc::clone(&self.vcpu),
            call: (sent.is_ok() && paused).then_some(call),
            result,
        }
    }

    /// The vCPU's clocks, for use while it is paused.
    pub fn clock(&self) -> &VcpuClockFd {
        &self.clock
    }

    /// KVM's statistics of the vCPU, to be read at any time; `None` where it has none.
    pub fn stats(&self) -> Option<&VcpuStats> {
        self.stats.as_ref()
    }

    fn send(&self, command: Command) -> Result<(), VcpuEnded> {
        self.commands
            .as_ref()
            .and_then(|commands| commands.send(command).ok())
            .ok_or(VcpuEnded(self.index))
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.commands = None;
        self.request_pause();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.index, "the vCPU's thread panicked");
        }
    }
}

fn nanos(time: &AtomicU64) -> Option<Duration> {
    match time.load(Ordering::SeqCst) {
        0 => None,
        nanos => Some(Duration::from_nanos(nanos)),
    }
}

fn store(time: &AtomicU64, value: Duration) {
    time.store((value.as_nanos() as u64).max(1), Ordering::SeqCst);
}

/// The thread's side.
struct Body {
    index: u32,
    vcpu: Arc<Mutex<Vcpu>>,
    bus: Arc<dyn IoBus>,
    events: Arc<dyn EventSink>,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
}

/// Says that the thread is gone, however it went: nobody waits for it forever.
struct EndGuard(Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.set_status(VcpuStatus::Ended);
    }
}

impl Body {
    fn run(self, ready: &Sender<Result<i32, io::Error>>) {
        let _guard = EndGuard(Arc::clone(&self.shared));
        let kickable = Kickable::new(&mut self.vcpu().fd);
        let kickable = match kickable {
            Ok(kickable) => {
                let _ = ready.send(Ok(gettid().as_raw_nonzero().get()));
                kickable
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let shared = Arc::clone(&self.shared);
        let mut turns = Turns::new(&shared.throttle);
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Call(call) => call.do_with(&self.vcpu),
                Command::Run => self.run_guest(&kickable, &mut turns),
            }
        }
    }

    fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_guest(&self, kickable: &Kickable, turns: &mut Turns<'_>) {
        let shared = &self.shared;
        let mut vcpu = self.vcpu();
        while !shared.pauses() {
            store(&shared.entered_at, MonotonicClock.now());
            // The lock, so that a waiter is either not yet waiting or is woken.
            drop(shared.status());
            shared.changed.notify_all();
            let Left { at, event } = vcpu.run(kickable, &*self.bus, &shared.pause, turns);
            store(&shared.left_at, at);
            // Before the status: whoever has waited for the pause must find the event, or a
            // migration could take the guest away and forget the reset that it asked for. Whoever
            // is told of it may have to wait a moment for the pause.
            if let Some(event) = event {
                self.events.vcpu_stopped(self.index, event.clone());
                shared.set_status(VcpuStatus::Paused { event: Some(event) });
                return;
            }
        }
    }
}
