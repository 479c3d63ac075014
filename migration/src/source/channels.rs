//! More connections for pages (`multifd`). Each has a thread, which takes runs of pages from one
//! queue when it has room for them, so that a slow connection takes fewer and holds up nobody. What
//! has to keep its order, and all that is not pages, goes on the first connection.
//! See docs/design.md.

mod active;
mod queue;
mod worker;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use self::active::Active;
use self::queue::{PassStart, Queue};
use self::worker::Worker;
use crate::bitmap::PageRun;
use crate::cancel::Cancel;
use crate::channel::ChannelError;
use crate::clock::Clock;
use crate::guest_io::GuestPages;
use crate::link::Deadlines;
use crate::message::Id;
use crate::outgoing::Wanted;
use crate::page_sender::Counts;
use crate::progress::{Bytes, Compression, Multifd};
use crate::rounds::Pass;
use crate::uri::Uri;
use crate::zero_copy::Sends;

/// Runs of pages for one connection.
#[derive(Debug, Default)]
pub(crate) struct Unit {
    runs: Vec<PageRun>,
    /// How many pages they have.
    pub(crate) pages: u64,
}

impl Unit {
    /// Adds a run within one region.
    pub(crate) fn add(&mut self, run: PageRun) {
        self.runs.push(run);
        self.pages += run.count;
    }
}

/// What went over other connections than the first.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    /// Frames, CHANNEL included.
    frames: u64,
    /// All bytes.
    pub(crate) sent: u64,
    /// The same by kind.
    pub(crate) by_kind: Bytes,
    pub(crate) counts: Counts,
    pub(crate) compression: Option<Compression>,
    pub(crate) zero_copy: Option<Sends>,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.frames += other.frames;
        self.sent += other.sent;
        self.by_kind = self.by_kind.and(other.by_kind);
        self.counts.add(other.counts);
        if let Some(other) = other.compression {
            let compression = self.compression.get_or_insert_default();
            compression.active |= other.active;
            compression.pages += other.pages;
            compression.bytes += other.bytes;
        }
        let zero_copy = [self.zero_copy, other.zero_copy];
        self.zero_copy = zero_copy.into_iter().flatten().reduce(Sends::and);
    }
}

/// What is needed to make the connections and to send pages on them.
pub(crate) struct Setup {
    pub(crate) uri: Uri,
    pub(crate) id: Id,
    pub(crate) deadlines: Deadlines,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) memory: Arc<GuestPages>,
    /// The shortest that is known.
    pub(crate) round_trip: Duration,
    /// Whether pages are to be sent without a copy.
    pub(crate) zero_copy: bool,
}

/// The connections beside the first one. Dropped, they are broken off.
pub(crate) struct Channels {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
    /// Ends the attempts to connect.
    connecting: Cancel,
    /// Breaks the connections.
    sending: Cancel,
    active: Active,
    passes: u64,
    clock: Arc<dyn Clock>,
}

impl Channels {
    /// Starts to connect `count` times, without waiting for it. `all`: each of them is to take
    /// work, even if fewer would do.
    pub(crate) fn start(setup: Setup, count: usize, all: bool) -> io::Result<Self> {
        let setup = Arc::new(setup);
        let active = Active::new(count, all);
        let mut channels = Self {
            queue: Arc::new(Queue::new(count, active.get())?),
            threads: Vec::with_capacity(count),
            connecting: Cancel::new()?,
            sending: Cancel::new()?,
            active,
            passes: 0,
            clock: Arc::clone(&setup.clock),
        };
        for index in 0..count {
            let worker = Worker {
                index,
                setup: Arc::clone(&setup),
                queue: Arc::clone(&channels.queue),
                connecting: channels.connecting.clone(),
                sending: channels.sending.clone(),
            };
            let thread = thread::Builder::new()
                .name(format!("multifd-send-{index}"))
                .spawn(move || worker.run())?;
            channels.threads.push(thread);
        }
        Ok(channels)
    }

    /// A pass begins; nothing of the one before is under way. So many frames were sent on the first
    /// connection.
    pub(crate) fn begin_pass(&mut self, pass: Pass, wanted: Wanted, first: u64) {
        self.passes += 1;
        let (mut barrier, _) = self.sent();
        barrier.insert(0, first);
        self.queue.begin_pass(PassStart {
            number: self.passes,
            pass,
            wanted,
            barrier,
        });
        self.active.begin(self.clock.now(), self.pages());
    }

    /// Takes the unit if there is room for it. `held_back` is how long the pace has held back the
    /// migration so far.
    pub(crate) fn submit(&self, unit: &mut Option<Unit>, held_back: Duration) -> bool {
        self.queue.submit(unit, held_back)
    }

    /// Whether all that was submitted has been sent.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_idle()
    }

    /// Why it can't go on.
    pub(crate) fn failure(&self) -> Option<ChannelError> {
        let (index, why) = self.queue.failure()?;
        Some(ChannelError::Data { index, why })
    }

    /// Readable when something has happened since [`quiet`](Self::quiet).
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.queue.event()
    }

    pub(crate) fn quiet(&self) {
        self.queue.quiet();
    }

    /// How many frames were sent on each, 0 if CHANNEL is all, and how many bytes together: at one
    /// moment.
    pub(crate) fn sent(&self) -> (Vec<u64>, u64) {
        self.queue.sent()
    }

    /// Pages that were submitted and have not been sent.
    pub(crate) fn under_way(&self) -> u64 {
        self.queue.under_way()
    }

    pub(crate) fn totals(&self) -> Totals {
        self.queue.totals()
    }

    fn pages(&self) -> u64 {
        let counts = self.queue.totals().counts;
        counts.pages + counts.zero
    }

    /// Finds out how many are to take work.
    pub(crate) fn adapt(&mut self) {
        let before = self.active.get();
        let active = self.active.sent(self.clock.now(), self.pages());
        if active != before {
            self.queue.set_active(active);
        }
    }

    /// What users are told.
    pub(crate) fn tell(&self) -> Multifd {
        Multifd {
            channels: self.threads.len() as u64,
            in_use: self.active.get() as u64,
            bytes: self.totals().sent,
            why_one: self.active.why_one(),
        }
    }

    /// Ends the connections, on which nothing is under way.
    pub(crate) fn finish(mut self) -> (Totals, Multifd) {
        let told = self.tell();
        if let Some(why) = &told.why_one {
            tracing::info!(
                "multifd: 1 of {} connections was enough: {why}",
                told.channels
            );
        }
        self.queue.end();
        // Those that are not there yet are of no use any more.
        let _ = self.connecting.cancel("all pages were sent");
        self.join();
        let totals = self.totals();
        let bytes = totals.sent;
        (totals, Multifd { bytes, ..told })
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        let reason = "the migration is over";
        let _ = self.connecting.cancel(reason);
        let _ = self.sending.cancel(reason);
        self.queue.end();
        self.join();
    }
}
