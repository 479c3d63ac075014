//! The thread of one connection: connects, and sends what it takes from the queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::queue::{Queue, Taken};
use super::{Setup, Totals};
use crate::bitmap::PageRun;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::connect::{ConnectError, connect};
use crate::frame::{Kind, MAX_PAGES};
use crate::guest_io::GuestPages;
use crate::link::Link;
use crate::message::{Preamble, Return, encode_barrier};
use crate::page_sender::{FrameSink, PageSender};

pub(super) struct Worker {
    pub(super) index: usize,
    pub(super) setup: Arc<Setup>,
    pub(super) queue: Arc<Queue>,
    pub(super) connecting: Cancel,
    pub(super) sending: Cancel,
}

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// The connection.
struct Lane {
    channel: Channel,
    /// How long the pace has kept it without work.
    held_back: Duration,
}

impl Worker {
    pub(super) fn run(self) {
        match self.work() {
            Ok(()) => tracing::debug!(index = self.index, "a data connection ends"),
            Err(error) => {
                tracing::debug!(index = self.index, "a data connection ends: {error}");
                self.queue.fail(self.index, error.to_string());
            }
        }
    }

    fn work(&self) -> Result<(), WorkerError> {
        let mut lane = Lane {
            channel: self.connect()?,
            held_back: Duration::ZERO,
        };
        let mut sender = PageSender::new(Arc::clone(&self.setup.memory));
        self.queue.connected(self.index, totals(&lane, &sender));
        let (mut pass, mut held_back) = (0, Duration::ZERO);
        let mut since = Instant::now();
        while let Some(taken) = self.queue.take(self.index) {
            let idle = since.elapsed();
            let held = taken.held_back.saturating_sub(held_back).min(idle);
            held_back = taken.held_back;
            lane.held_back += held;
            sender.idled(idle - held);
            if taken.pass.number != pass {
                pass = taken.pass.number;
                self.begin_pass(&taken, &mut lane, &mut sender)?;
            }
            for run in &taken.unit.runs {
                sender.send(*run, 0, &mut lane)?;
            }
            sender.flush(0, &mut lane)?;
            let totals = totals(&lane, &sender);
            self.queue.done(self.index, taken.unit.pages, totals);
            since = Instant::now();
        }
        // The destination reads what was sent, then the end.
        lane.channel.link().finish();
        Ok(())
    }

    fn connect(&self) -> Result<Channel, WorkerError> {
        let Setup {
            uri,
            id,
            deadlines,
            clock,
            round_trip,
            zero_copy,
            ..
        } = &*self.setup;
        let stream = connect(uri, &self.connecting, deadlines)?;
        let link =
            Link::new(stream, self.sending.clone(), deadlines).map_err(ChannelError::from)?;
        let mut channel = Channel::new(link, Arc::clone(clock), false);
        let mut body = Vec::new();
        Return {
            id: *id,
            attempt: self.index as u32,
        }
        .encode(&mut body);
        channel.send_raw(&Preamble::OURS.encode())?;
        channel.send(Kind::Channel, &body)?;
        channel.link().watch_send_buffer(*round_trip);
        if *zero_copy {
            channel.enable_zero_copy();
        }
        Ok(channel)
    }

    /// Nothing of a pass may be placed before what was sent in the ones before it, on whatever
    /// connection.
    fn begin_pass(
        &self,
        taken: &Taken,
        lane: &mut Lane,
        sender: &mut PageSender,
    ) -> Result<(), ChannelError> {
        let start = &taken.pass;
        if start.number > 1 {
            let mut body = Vec::new();
            encode_barrier(&start.barrier, &mut body);
            lane.channel.send(Kind::Barrier, &body)?;
        }
        sender.begin(start.pass, start.wanted, lane);
        Ok(())
    }
}

fn totals(lane: &Lane, sender: &PageSender) -> Totals {
    Totals {
        frames: lane.channel.sent_frames(),
        sent: lane.channel.sent_bytes(),
        by_kind: lane.channel.sent(),
        counts: sender.counts(),
        compression: sender.compression(),
        zero_copy: lane.channel.zero_copy(),
    }
}

/// What it sends is not paced here: the migration thread gives it no more than it may send.
impl FrameSink for Lane {
    fn send_pages(
        &mut self,
        body: &[u8],
        memory: &GuestPages,
        runs: &[PageRun],
        _: u64,
    ) -> Result<(), ChannelError> {
        self.channel.send_pages(body, memory, runs)
    }

    fn send_data(
        &mut self,
        kind: Kind,
        body: &[u8],
        data: &[&[u8]],
        _: u64,
    ) -> Result<(), ChannelError> {
        self.channel.send_data(kind, body, data)
    }

    fn send(&mut self, kind: Kind, body: &[u8], _: u64) -> Result<(), ChannelError> {
        self.channel.send(kind, body)
    }

    fn own_bytes(&self) -> u64 {
        self.channel.sent_bytes()
    }

    fn waited(&self) -> Duration {
        self.held_back + self.channel.waited()
    }

    fn has_room(&self) -> bool {
        self.channel.has_room()
    }

    fn frame_pages(&self) -> u64 {
        // A unit has no more than the migration thread finds right for a frame.
        MAX_PAGES
    }
}
