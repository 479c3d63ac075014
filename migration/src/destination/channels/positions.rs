//! How far each connection of a migration has come, and waiting for that.
//!
//! Who waits gives up when nothing that it waits for can come any more, or when nothing moves for
//! too long. A connection within a frame with memory, or the first one in whatever it does, is at
//! work: it has deadlines of its own. One that waits itself, or that nothing comes on, does not
//! count as such, so that no circle of BARRIERs holds for ever.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::frame::MAX_CHANNELS;

/// The first connection's place among all of them; the others' is one more than their index.
pub(super) const FIRST: usize = 0;

/// Why a connection is not waited for any longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PositionError {
    /// What was sent is lost.
    #[error(
        "{} ended after {placed} frames, but {sent} were sent on it", name(*.connection)
    )]
    Ended {
        /// 0 for the first connection, otherwise one more than its index.
        connection: usize,
        /// How many frames were placed.
        placed: u64,
        /// How many were sent, as the source says.
        sent: u64,
    },
    /// It does not come.
    #[error(
        "{} has brought {placed} of {sent} frames, and nothing more for {} s", name(*.connection), .patience.as_secs_f32()
    )]
    Silent {
        /// 0 for the first connection, otherwise one more than its index.
        connection: usize,
        /// How many frames were placed.
        placed: u64,
        /// How many were sent, as the source says.
        sent: u64,
        /// For how long nothing moved.
        patience: Duration,
    },
    /// It has to end, and doesn't.
    #[error(
        "{} has not ended, though the source has sent all of the memory, for {} s", name(*.connection), .patience.as_secs_f32()
    )]
    Open {
        /// One more than its index.
        connection: usize,
        /// For how long nothing moved.
        patience: Duration,
    },
    /// Woken by another thread.
    #[error("{0}")]
    Over(String),
}

fn name(connection: usize) -> String {
    match connection.checked_sub(1) {
        None => "the first connection".to_owned(),
        Some(index) => format!("data connection {index}"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// It has not come yet.
    Absent,
    /// Nothing comes.
    Idle,
    /// A frame is received or placed.
    Frame,
    /// A frame that has to wait.
    Waiting,
    Ended,
}

#[derive(Clone, Copy, Debug)]
struct Position {
    /// How many frames have been placed since the beginning.
    placed: u64,
    doing: Doing,
}

#[derive(Debug)]
struct State {
    connections: Vec<Position>,
    /// Counts whatever makes a difference to who waits.
    moves: u64,
}

/// The positions of all connections, shared by their threads.
#[derive(Debug)]
pub(super) struct Positions {
    state: Mutex<State>,
    moved: Condvar,
    over: Cancel,
    patience: Duration,
}

impl Positions {
    /// HELLO has come on the first connection. All waits end with `over`, if then
    /// [`wake`](Self::wake) is called, or when nothing moves for `patience`.
    pub(super) fn new(over: Cancel, patience: Duration) -> Self {
        let absent = Position {
            placed: 0,
            doing: Doing::Absent,
        };
        let mut connections = vec![absent; 1 + MAX_CHANNELS];
        if let Some(first) = connections.first_mut() {
            *first = Position {
                placed: 1,
                doing: Doing::Frame,
            };
        }
        Self {
            state: Mutex::new(State {
                connections,
                moves: 0,
            }),
            moved: Condvar::new(),
            over,
            patience,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, connection: usize, change: impl FnOnce(&mut Position)) {
        let mut state = self.lock();
        state.moves += 1;
        if let Some(position) = state.connections.get_mut(connection) {
            change(position);
        }
        self.moved.notify_all();
    }

    /// A connection has come, with its CHANNEL; false if it has before.
    pub(super) fn join(&self, connection: usize) -> bool {
        let mut new = false;
        self.change(connection, |position| {
            if position.doing == Doing::Absent {
                new = true;
                *position = Position {
                    placed: 1,
                    doing: Doing::Idle,
                };
            }
        });
        new
    }

    /// A frame has begun.
    pub(super) fn begin(&self, connection: usize) {
        let mut state = self.lock();
        if let Some(position) = state.connections.get_mut(connection) {
            position.doing = Doing::Frame;
        }
    }

    /// A frame has been placed, or otherwise dealt with.
    pub(super) fn placed(&self, connection: usize) {
        self.change(connection, |position| {
            position.placed += 1;
            if connection != FIRST {
                position.doing = Doing::Idle;
            }
        });
    }

    /// Nothing more comes.
    pub(super) fn end(&self, connection: usize) {
        self.change(connection, |position| position.doing = Doing::Ended);
    }

    /// Makes all who wait look whether it is over.
    pub(super) fn wake(&self) {
        drop(self.lock());
        self.moved.notify_all();
    }

    /// BARRIER, on `connection`: waits until so many frames have been placed on each other
    /// connection.
    pub(super) fn wait(&self, connection: usize, sent: &[u64]) -> Result<(), PositionError> {
        let lags = |other: usize, position: &Position| {
            let sent = sent.get(other).copied().unwrap_or(0);
            position.placed < sent && other != connection
        };
        self.wait_while(connection, lags, |other, position, patience| {
            let placed = position.placed;
            let sent = sent.get(other).copied().unwrap_or(0);
            match (position.doing, patience) {
                (Doing::Ended, _) => Some(PositionError::Ended {
                    connection: other,
                    placed,
                    sent,
                }),
                (_, Some(patience)) => Some(PositionError::Silent {
                    connection: other,
                    placed,
                    sent,
                    patience,
                }),
                (_, None) => None,
            }
        })
    }

    /// Waits until each data connection that has come has ended.
    pub(super) fn wait_ended(&self) -> Result<(), PositionError> {
        let open = |other: usize, position: &Position| {
            other != FIRST && !matches!(position.doing, Doing::Absent | Doing::Ended)
        };
        self.wait_while(FIRST, open, |connection, _, patience| {
            patience.map(|patience| PositionError::Open {
                connection,
                patience,
            })
        })
    }

    /// Waits while a connection `lags`. `why` says if one is not waited for any longer; it is given
    /// for how long nothing has moved when that is too long.
    fn wait_while(
        &self,
        own: usize,
        lags: impl Fn(usize, &Position) -> bool,
        why: impl Fn(usize, &Position, Option<Duration>) -> Option<PositionError>,
    ) -> Result<(), PositionError> {
        let mut state = self.lock();
        set_doing(&mut state, own, Doing::Waiting);
        let (mut moves, mut since) = (state.moves, Instant::now());
        loop {
            if let Some(reason) = self.over.cancelled() {
                return Err(PositionError::Over(reason.to_owned()));
            }
            let all = state.connections.iter().enumerate();
            let mut lagging = all.filter(|(other, position)| lags(*other, position));
            let late = since.elapsed() >= self.patience;
            let at_work = lagging
                .clone()
                .any(|(_, position)| position.doing == Doing::Frame);
            let silent = (late && !at_work && state.moves == moves).then_some(self.patience);
            if let Some(error) = lagging
                .clone()
                .find_map(|(other, position)| why(other, position, silent))
            {
                return Err(error);
            }
            if lagging.next().is_none() {
                set_doing(&mut state, own, Doing::Frame);
                return Ok(());
            }
            if state.moves != moves || late {
                (moves, since) = (state.moves, Instant::now());
            }
            let left = self.patience.saturating_sub(since.elapsed());
            state = self
                .moved
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn set_doing(state: &mut State, connection: usize, doing: Doing) {
    if let Some(position) = state.connections.get_mut(connection) {
        position.doing = doing;
    }
}

#[cfg(test)]
#[path = "positions_tests.rs"]
mod tests;
