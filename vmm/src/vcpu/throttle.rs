//! Keeping a vCPU out of the guest for a share of its time.
//!
//! Its time is cut into periods, each a turn in the guest and a rest. A turn ends with a [kick] by
//! a timer of the thread's own, a rest with its time, with a pause that is asked for, or when the
//! vCPU is not throttled any more. So a pause takes no longer for a vCPU that rests, and one that
//! is not throttled pays with a look at a byte for each exit.
//!
//! [kick]: super::kick

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::kick::KickTimer;

/// A turn and the rest after it: short, so that the guest's timers and network wait for little.
const PERIOD: Duration = Duration::from_millis(10);

/// The most that a vCPU may be kept out of the guest: it must get anywhere at all.
pub const MAX_SHARE: u8 = 99;

/// How a vCPU is throttled, as whoever throttles or pauses it sees it.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    /// In percent; 0 for not at all.
    share: AtomicU8,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Throttle {
    /// Sets the share of time in percent, at most [`MAX_SHARE`]. Whether the thread must be kicked
    /// to learn of it.
    pub(super) fn set(&self, share: u8) -> bool {
        let share = share.min(MAX_SHARE);
        let before = self.share.swap(share, Ordering::Relaxed);
        if share == 0 && before > 0 {
            self.wake();
        }
        // Otherwise it learns of it at the end of its turn.
        before == 0 && share > 0
    }

    pub(super) fn share(&self) -> u8 {
        self.share.load(Ordering::Relaxed)
    }

    /// Ends a rest if a pause was asked for before.
    pub(super) fn pause_requested(&self) {
        if self.share() > 0 {
            self.wake();
        }
    }

    fn wake(&self) {
        // The lock, so that the thread is either not yet waiting or is woken.
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn rest(&self, until: Instant, pause: &AtomicBool) {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.share() > 0 && !pause.load(Ordering::SeqCst) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(lock, left);
            (lock, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The turns of a vCPU, as its thread sees them.
pub(super) struct Turns<'a> {
    throttle: &'a Throttle,
    timer: Option<KickTimer>,
    /// When the present turn ends; `None` before the first.
    end: Option<Instant>,
}

impl<'a> Turns<'a> {
    /// Of the current thread, which can be kicked.
    pub(super) fn new(throttle: &'a Throttle) -> Self {
        Self {
            throttle,
            timer: None,
            end: None,
        }
    }

    /// Whether the vCPU may enter the guest now. If it may not, it has rested when this returns, and
    /// its thread looks around again.
    pub(super) fn may_enter(&mut self, pause: &AtomicBool) -> bool {
        match self.throttle.share() {
            0 => true,
            share => self.take(share, pause),
        }
    }

    fn take(&mut self, share: u8, pause: &AtomicBool) -> bool {
        let now = Instant::now();
        match self.end.take() {
            Some(end) if now < end => {
                self.end = Some(end);
                true
            }
            Some(_) => {
                let rest = PERIOD * u32::from(share) / 100;
                self.throttle.rest(now + rest, pause);
                false
            }
            None => {
                let turn = PERIOD * u32::from(100 - share) / 100;
                if let Err(error) = self.start_timer(turn) {
                    tracing::error!(%error, "no timer: the vCPU is throttled only when it leaves the guest");
                }
                self.end = Some(now + turn);
                true
            }
        }
    }

    fn start_timer(&mut self, turn: Duration) -> io::Result<()> {
        let timer = match self.timer.take() {
            Some(timer) => timer,
            None => KickTimer::new()?,
        };
        let started = timer.start(turn);
        self.timer = Some(timer);
        started
    }
}
