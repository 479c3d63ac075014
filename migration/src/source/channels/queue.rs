//! What the migration thread and those of the connections share: the units that wait, and what has
//! been sent.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::{Totals, Unit};
use crate::outgoing::Wanted;
use crate::rounds::Pass;

/// So many units wait for each connection that takes work: the next one is there when it has sent
/// one, and what waits is soon sent when a pass ends.
const UNITS: usize = 2;

/// How a pass begins.
#[derive(Debug, Default)]
pub(super) struct PassStart {
    /// From 1.
    pub(super) number: u64,
    pub(super) pass: Pass,
    pub(super) wanted: Wanted,
    /// What was sent on each connection before, the first one included.
    pub(super) barrier: Vec<u64>,
}

/// A unit to send.
pub(super) struct Taken {
    pub(super) unit: Unit,
    pub(super) pass: Arc<PassStart>,
    /// How long the pace had held back the migration.
    pub(super) held_back: Duration,
}

pub(super) struct Queue {
    state: Mutex<State>,
    /// For those that take work.
    work: Condvar,
    /// For the others.
    resting: Condvar,
    /// For the migration thread.
    event: OwnedFd,
}

struct State {
    units: VecDeque<Unit>,
    pass: Arc<PassStart>,
    active: usize,
    /// How many are sending.
    busy: usize,
    /// Pages in `units`, and in those that are being sent.
    pages: u64,
    held_back: Duration,
    /// Of each connection.
    totals: Vec<Totals>,
    over: bool,
    failure: Option<(usize, String)>,
}

impl Queue {
    pub(super) fn new(count: usize, active: usize) -> io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                units: VecDeque::new(),
                pass: Arc::default(),
                active,
                busy: 0,
                pages: 0,
                held_back: Duration::ZERO,
                totals: vec![Totals::default(); count],
                over: false,
                failure: None,
            }),
            work: Condvar::new(),
            resting: Condvar::new(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    pub(super) fn begin_pass(&self, pass: PassStart) {
        self.lock().pass = Arc::new(pass);
    }

    pub(super) fn submit(&self, unit: &mut Option<Unit>, held_back: Duration) -> bool {
        let mut state = self.lock();
        if state.units.len() >= UNITS * state.active {
            return false;
        }
        if let Some(unit) = unit.take() {
            state.pages += unit.pages;
            state.held_back = held_back;
            state.units.push_back(unit);
            self.work.notify_one();
        }
        true
    }

    /// Waits for a unit; `None` if there are to be no more. `index` is of the connection.
    pub(super) fn take(&self, index: usize) -> Option<Taken> {
        let mut state = self.lock();
        loop {
            if state.over || state.failure.is_some() {
                return None;
            }
            let active = index < state.active;
            if active && let Some(unit) = state.units.pop_front() {
                state.busy += 1;
                let taken = Taken {
                    unit,
                    pass: Arc::clone(&state.pass),
                    held_back: state.held_back,
                };
                drop(state);
                self.ring();
                return Some(taken);
            }
            let wait = if active { &self.work } else { &self.resting };
            state = wait.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// That many pages were sent, and this is what it comes to.
    pub(super) fn done(&self, index: usize, pages: u64, totals: Totals) {
        let mut state = self.lock();
        state.busy -= 1;
        state.pages -= pages;
        if let Some(of) = state.totals.get_mut(index) {
            *of = totals;
        }
        drop(state);
        self.ring();
    }

    /// A connection is there.
    pub(super) fn connected(&self, index: usize, totals: Totals) {
        if let Some(of) = self.lock().totals.get_mut(index) {
            *of = totals;
        }
    }

    /// A connection is gone. The first one to fail says why.
    pub(super) fn fail(&self, index: usize, why: String) {
        let mut state = self.lock();
        if !state.over {
            state.failure.get_or_insert((index, why));
        }
        drop(state);
        self.wake();
        self.ring();
    }

    /// There are to be no more units.
    pub(super) fn end(&self) {
        self.lock().over = true;
        self.wake();
    }

    pub(super) fn set_active(&self, active: usize) {
        self.lock().active = active;
        self.wake();
    }

    pub(super) fn is_idle(&self) -> bool {
        let state = self.lock();
        state.units.is_empty() && state.busy == 0
    }

    pub(super) fn failure(&self) -> Option<(usize, String)> {
        self.lock().failure.clone()
    }

    pub(super) fn sent(&self) -> (Vec<u64>, u64) {
        let state = self.lock();
        // Nobody has to wait for one that has carried nothing but its CHANNEL.
        let frames = |totals: &Totals| match totals.frames {
            1 => 0,
            frames => frames,
        };
        let frames = state.totals.iter().map(frames).collect();
        (frames, state.totals.iter().map(|totals| totals.sent).sum())
    }

    pub(super) fn under_way(&self) -> u64 {
        self.lock().pages
    }

    pub(super) fn totals(&self) -> Totals {
        let mut sum = Totals::default();
        for totals in &self.lock().totals {
            sum.add(totals);
        }
        sum
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    pub(super) fn quiet(&self) {
        // Nothing to read is an error, and what is wanted.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    fn ring(&self) {
        // Writing to an eventfd fails only when its count would overflow.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    fn wake(&self) {
        self.work.notify_all();
        self.resting.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
