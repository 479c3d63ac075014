//! More connections (`multifd`): each has a thread that places what it brings, and one more takes
//! them in as they come, at any time while memory comes.
//!
//! One [`Cancel`], the breaker, ends all waits of these threads, and of the first connection
//! meanwhile: when one of them fails, when the user cancels, and when it is over. So who finds its
//! wait ended that way asks [`Channels::explain`] for what was the reason.

mod positions;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Scope};
use std::time::Instant;

pub use self::positions::PositionError;

use self::positions::{FIRST, Positions};
use super::memory::Memory;
use super::{DestinationError, Job};
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::frame::{Kind, MAX_CHANNELS};
use crate::link::{Deadlines, Link, LinkError};
use crate::listener::{Awaited, ListenError, Listener, Returned};
use crate::message::{Id, decode_barrier};
use crate::placement::Placement;
use crate::progress::Bytes;

/// The connections beside the first one, as long as memory comes.
pub(super) struct Channels {
    shared: Arc<Shared>,
    /// Takes them in, and ends when all their threads have.
    acceptor: Option<JoinHandle<()>>,
    /// The last BARRIER of the first connection.
    sent: Vec<u64>,
}

struct Shared {
    id: Id,
    picked: u32,
    placement: Arc<Placement>,
    positions: Positions,
    breaker: Cancel,
    /// The first failure of a thread.
    failure: Mutex<Option<DestinationError>>,
    /// What has come on each.
    received: Mutex<BTreeMap<usize, (u64, Bytes)>>,
    clock: Arc<dyn Clock>,
    cancel: Cancel,
    deadlines: Deadlines,
}

impl Channels {
    /// Takes the data connections of a migration in, which was told that these capabilities are
    /// picked. `main` is its first connection, on which HELLO was the only frame so far.
    pub(super) fn start(
        (id, picked): (Id, u32),
        placement: Arc<Placement>,
        listener: Listener,
        main: &mut Channel,
        (job, clock): (&Job, &Arc<dyn Clock>),
    ) -> Result<Self, DestinationError> {
        let breaker = Cancel::new().map_err(DestinationError::Threads)?;
        let shared = Arc::new(Shared {
            id,
            picked,
            placement,
            positions: Positions::new(breaker.clone(), job.deadlines.progress),
            breaker: breaker.clone(),
            failure: Mutex::default(),
            received: Mutex::default(),
            clock: Arc::clone(clock),
            cancel: job.cancel.clone(),
            deadlines: job.deadlines.clone(),
        });
        let there = Arc::clone(&shared);
        let acceptor = thread::Builder::new()
            .name("multifd-accept".to_owned())
            .spawn(move || there.accept(listener))
            .map_err(DestinationError::Threads)?;
        main.link().set_cancel(breaker);
        Ok(Self {
            shared,
            acceptor: Some(acceptor),
            sent: Vec::new(),
        })
    }

    /// A frame of the first connection has been dealt with.
    pub(super) fn placed(&self) {
        self.shared.positions.placed(FIRST);
    }

    /// BARRIER, on the first connection.
    pub(super) fn barrier(&mut self, main: &Channel) -> Result<(), DestinationError> {
        self.shared.barrier(FIRST, main, &mut self.sent)
    }

    /// What has come on the data connections so far: how many bytes, and of what kind.
    pub(super) fn received(&self) -> (u64, Bytes) {
        let each = lock(&self.shared.received);
        each.values()
            .fold(Default::default(), |(total, sum), (more, bytes)| {
                (total + more, sum.and(*bytes))
            })
    }

    /// The source has sent all of the memory: waits until each connection has ended, and lets
    /// nobody in any more. From here on only this thread has the memory.
    /// Returns what has come on them.
    pub(super) fn finish(mut self, main: &mut Channel) -> Result<(u64, Bytes), DestinationError> {
        if let Err(error) = self.shared.positions.wait_ended() {
            return Err(self.explain(error.into(), main));
        }
        self.close();
        main.link().set_cancel(self.shared.cancel.clone());
        match lock(&self.shared.failure).take() {
            Some(error) => Err(error),
            None => Ok(self.received()),
        }
    }

    /// The reason for an `error` on the first connection, which may be a failure of another one;
    /// ends them all. If that is that they ended, the source may have said why on the first one.
    pub(super) fn explain(
        mut self,
        error: DestinationError,
        main: &mut Channel,
    ) -> DestinationError {
        let failure = match error.cancelled() {
            Some(_) => lock(&self.shared.failure).take(),
            None => None,
        };
        self.close();
        main.link().set_cancel(self.shared.cancel.clone());
        let error = failure.unwrap_or(error);
        if !error.is_break() {
            return error;
        }
        let until = Instant::now() + self.shared.deadlines.linger;
        match main.last_words(until) {
            Some(words) => words.into(),
            None => error,
        }
    }

    /// Ends all threads; each has ended then.
    fn close(&mut self) {
        self.shared.break_off("no more memory comes");
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// Ends all waits.
    fn break_off(&self, reason: &str) {
        let _ = self.breaker.cancel(reason);
        self.positions.wake();
    }

    /// A thread has failed. If it is over already, that is why.
    fn fail(&self, error: DestinationError) {
        let reason = error.to_string();
        {
            let mut failure = lock(&self.failure);
            if self.breaker.cancelled().is_none() && failure.is_none() {
                *failure = Some(error);
            }
        }
        self.break_off(&reason);
    }

    /// Takes connections in until it is over.
    fn accept(&self, mut listener: Listener) {
        thread::scope(|scope| {
            loop {
                let awaited = Awaited {
                    kind: Kind::Channel,
                    id: self.id,
                    attempts: 0..=MAX_CHANNELS as u32 - 1,
                    until: None,
                    beside: None,
                    over: Some(&self.breaker),
                    later: None,
                };
                let error = match listener.accept_returning(awaited, &self.cancel, &self.deadlines)
                {
                    Ok(returned) => match self.begin(scope, returned) {
                        Ok(()) => continue,
                        Err(error) => error,
                    },
                    Err(ListenError::Nobody) => return,
                    Err(ListenError::Cancelled(reason)) => return self.break_off(&reason),
                    Err(error) => error.into(),
                };
                return self.fail(error);
            }
        });
    }

    fn begin<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        returned: Returned,
    ) -> Result<(), DestinationError> {
        let index = returned.attempt;
        let connection = 1 + index as usize;
        let peer = returned.stream.peer().to_owned();
        if !self.positions.join(connection) {
            tracing::warn!(
                peer,
                "data connection {index} came twice; the other one is dropped"
            );
            return Ok(());
        }
        let clock = Arc::clone(&self.clock);
        let link = Link::new(returned.stream, self.breaker.clone(), &self.deadlines);
        let channel = Channel::returned(link.map_err(ChannelError::from)?, clock, Kind::Channel)
            .map_err(ChannelError::from)?;
        tracing::debug!(peer, index, "a data connection came");
        thread::Builder::new()
            .name(format!("multifd-{index}"))
            .spawn_scoped(scope, move || self.run(connection, channel))
            .map_err(DestinationError::Threads)?;
        Ok(())
    }

    fn run(&self, connection: usize, mut channel: Channel) {
        let end = End {
            positions: &self.positions,
            connection,
        };
        let index = connection - 1;
        match self.place_all(connection, &mut channel) {
            Ok(()) => tracing::debug!(index, bytes = channel.received_bytes(), "it has ended"),
            // Before it is told that the connection has ended, which says less.
            Err(error) => self.fail(DestinationError::Connection {
                index,
                error: Box::new(error),
            }),
        }
        drop(end);
    }

    /// Places all that comes, until the stream ends.
    fn place_all(&self, connection: usize, channel: &mut Channel) -> Result<(), DestinationError> {
        let mut memory = Memory::new(Arc::clone(&self.placement), self.picked);
        let mut sent = Vec::new();
        while channel.wait_begin()? {
            self.positions.begin(connection);
            let arrived = channel.receive()?;
            match arrived.kind {
                Kind::Barrier => self.barrier(connection, channel, &mut sent)?,
                _ => memory.receive(arrived, channel)?,
            }
            let received = (channel.received_bytes(), channel.received());
            lock(&self.received).insert(connection, received);
            self.positions.placed(connection);
        }
        Ok(())
    }

    fn barrier(
        &self,
        connection: usize,
        channel: &Channel,
        sent: &mut Vec<u64>,
    ) -> Result<(), DestinationError> {
        channel.decode(Kind::Barrier, |body| decode_barrier(body, sent))?;
        Ok(self.positions.wait(connection, sent)?)
    }
}

/// Tells that a connection has ended, in whatever way its thread does.
struct End<'a> {
    positions: &'a Positions,
    connection: usize,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.positions.end(self.connection);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DestinationError {
    /// Whether it says no more than that a connection ended.
    fn is_break(&self) -> bool {
        match self {
            Self::Connection { error, .. } => error.is_break(),
            Self::Channel(ChannelError::Link { error, .. }) => {
                matches!(error, LinkError::Closed | LinkError::Dead)
            }
            Self::Position(error) => matches!(error, PositionError::Ended { .. }),
            _ => false,
        }
    }
}
