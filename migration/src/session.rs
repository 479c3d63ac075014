//! The source's side of a connection: frames, marks in the stream and their acknowledgements,
//! pacing, and what all of that says about the link.

mod multifd;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bitmap::PageRun;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::compression::{Method, Setting};
use crate::convergence::{Convergence, STRONG};
use crate::frame::{Kind, MAX_PAGES};
use crate::guest_io::GuestPages;
use crate::link::Deadlines;
use crate::message::{Flush, Flushed, LZ4, Sync, SyncAck, UNCHECKED, XBZRLE, ZSTD};
use crate::outgoing::Wanted;
use crate::pacing::{Pacing, pages_per_frame};
use crate::page_sender::FrameSink;
use crate::parameters::Parameters;
use crate::progress::Snapshot;
use crate::protocol::{OutOfOrder, Phase};
use crate::zero_copy::Sends;

use self::multifd::Others;

/// A mark is set at least each so many bytes or so often, to learn how fast data arrives, and so
/// that both sides know that the other lives.
const MARK_BYTES: u64 = 32 << 20;
const FIRST_MARK_BYTES: u64 = 1 << 20;
const MARK_TIME: Duration = Duration::from_millis(200);

/// How soon a changed bandwidth limit is noticed while waiting for the pace.
const PACE_STEP: Duration = Duration::from_millis(50);

/// Frames stay this small until the link's speed is known.
const FIRST_FRAMES: u64 = 64;

/// A round trip on a short link takes less.
const SHORT: Duration = Duration::from_millis(2);

/// How many marks may be without an answer.
const MAX_MARKS: usize = 256;

struct Mark {
    number: u64,
    /// When the first byte since the mark before was sent.
    began: Duration,
    /// How many bytes had been sent with it.
    bytes: u64,
    /// How long there was nothing to send, because a disk was slow.
    starved: Duration,
}

/// Says whether the pass that is under way is to end as soon as possible; that may become so at
/// any time.
pub(crate) type Hurry = Arc<dyn Fn() -> bool + Send + std::marker::Sync>;

pub(crate) struct Session {
    pub(crate) channel: Channel,
    pub(crate) convergence: Convergence,
    deadlines: Deadlines,
    clock: Arc<dyn Clock>,
    parameters: Arc<Parameters>,
    pacing: Pacing,
    paced: bool,
    /// Says when not to wait for the pace any longer.
    hurry: Option<Hurry>,
    marks: VecDeque<Mark>,
    last_mark: u64,
    marked_at: Duration,
    marked_bytes: u64,
    acked_bytes: u64,
    began: Option<Duration>,
    starved: Duration,
    /// How long the pace has held it back.
    held_back: Duration,
    /// Capabilities that the destination has picked.
    picked: u32,
    others: Others,
    body: Vec<u8>,
}

impl Session {
    pub(crate) fn new(
        channel: Channel,
        deadlines: &Deadlines,
        clock: Arc<dyn Clock>,
        parameters: Arc<Parameters>,
    ) -> Self {
        Self {
            channel,
            deadlines: deadlines.clone(),
            convergence: Convergence::default(),
            clock,
            parameters,
            pacing: Pacing::default(),
            paced: true,
            hurry: None,
            marks: VecDeque::new(),
            last_mark: 0,
            marked_at: Duration::ZERO,
            marked_bytes: 0,
            acked_bytes: 0,
            began: None,
            starved: Duration::ZERO,
            held_back: Duration::ZERO,
            picked: 0,
            others: Others::default(),
            body: Vec::new(),
        }
    }

    /// From here on the guest is stopped: nothing is held back.
    pub(crate) fn stop_pacing(&mut self) {
        self.paced = false;
    }

    /// Once that says so, what is sent does not wait for its pace: the pass is to end soon, and
    /// with a low bandwidth a single frame may wait for long.
    pub(crate) fn hurry_if(&mut self, hurry: &Hurry) {
        self.hurry = Some(Arc::clone(hurry));
    }

    /// Whether the guest may still run.
    pub(crate) fn is_paced(&self) -> bool {
        self.paced
    }

    /// The destination picked these capabilities.
    pub(crate) fn set_picked(&mut self, capabilities: u32) {
        self.picked = capabilities;
    }

    /// Whether it picked this one.
    pub(crate) fn picked(&self, capability: u32) -> bool {
        self.picked & capability != 0
    }

    /// How the user wants pages to go, as far as the destination can take it.
    pub(crate) fn wanted(&self) -> Wanted {
        let wanted = self.parameters.compression();
        let compression = match wanted.method() {
            Some(Method::Lz4) if self.picked(LZ4) => wanted,
            Some(Method::Zstd) if self.picked(ZSTD) => wanted,
            _ => Setting::Off,
        };
        let quick = match compression {
            Setting::Zstd(_) if self.picked(LZ4) => Setting::Lz4,
            _ => Setting::Off,
        };
        let xbzrle = self.parameters.xbzrle();
        Wanted {
            compression,
            quick,
            xbzrle: xbzrle.filter(|_| self.picked(XBZRLE)),
            unchecked: self.picked(UNCHECKED),
        }
    }

    /// Bytes sent so far, on all connections.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.channel.sent_bytes() + self.elsewhere().sent
    }

    /// How many pages to put in a frame.
    pub(crate) fn frame_pages(&self) -> u64 {
        let bandwidth = &self.convergence.bandwidth;
        let limit = match bandwidth.estimate() {
            Some(rate) if bandwidth.is_measured() => pages_per_frame(rate, MAX_PAGES),
            _ => FIRST_FRAMES,
        };
        match self.parameters.max_bandwidth() {
            rate if rate > 0 && self.paced => pages_per_frame(rate as f64, limit),
            _ => limit,
        }
    }

    /// Sends a frame with its data, in time.
    pub(crate) fn send_data(
        &mut self,
        kind: Kind,
        body: &[u8],
        data: &[&[u8]],
        round: u64,
    ) -> Result<(), ChannelError> {
        self.send_in_time(round, |channel| channel.send_data(kind, body, data))
    }

    /// Sends any other frame of a round, in time.
    pub(crate) fn send(&mut self, kind: Kind, body: &[u8], round: u64) -> Result<(), ChannelError> {
        self.send_in_time(round, |channel| channel.send(kind, body))
    }

    /// The same, of a frame that others follow at once.
    pub(crate) fn send_followed(
        &mut self,
        kind: Kind,
        body: &[u8],
        round: u64,
    ) -> Result<(), ChannelError> {
        self.send_in_time(round, |channel| channel.send_followed(kind, body))
    }

    fn send_in_time(
        &mut self,
        round: u64,
        send: impl FnOnce(&mut Channel) -> Result<(), ChannelError>,
    ) -> Result<(), ChannelError> {
        self.pace(round)?;
        self.begin();
        let before = self.channel.sent_bytes();
        send(&mut self.channel)?;
        self.pacing.sent(self.channel.sent_bytes() - before);
        self.look_at_answers()?;
        self.mark_if_due(round)
    }

    fn begin(&mut self) {
        if self.began.is_none() {
            self.began = Some(self.clock.now());
        }
    }

    fn mark_if_due(&mut self, round: u64) -> Result<(), ChannelError> {
        let bytes = self.sent_bytes() - self.marked_bytes;
        let since = self.clock.now().saturating_sub(self.marked_at);
        let enough = if self.convergence.bandwidth.is_measured() {
            MARK_BYTES
        } else {
            FIRST_MARK_BYTES
        };
        if self.channel.phase() == Phase::Ram && (bytes >= enough || since >= MARK_TIME) {
            self.mark(round)?;
        }
        Ok(())
    }

    fn pace(&mut self, round: u64) -> Result<(), ChannelError> {
        while self.paced && !self.hurry.as_ref().is_some_and(|hurry| hurry()) {
            let wait = self
                .pacing
                .wait(self.clock.now(), self.parameters.max_bandwidth());
            if wait.is_zero() {
                return Ok(());
            }
            self.show_life(round)?;
            let began = self.clock.now();
            self.idle(wait.min(PACE_STEP))?;
            self.held_back += self.clock.now().saturating_sub(began);
        }
        Ok(())
    }

    /// Sends a mark if nothing was sent for long, so that the peer knows that this side lives.
    fn show_life(&mut self, round: u64) -> Result<(), ChannelError> {
        if self.clock.now().saturating_sub(self.marked_at) >= 5 * MARK_TIME
            && self.channel.phase() == Phase::Ram
        {
            self.mark(round)?;
        }
        Ok(())
    }

    /// For so long there was nothing to send, because a disk is slow: that says nothing about the
    /// link.
    pub(crate) fn starved(&mut self, time: Duration) {
        self.starved += time;
    }

    /// To be called often while that lasts.
    pub(crate) fn wait_for_disk(&mut self, round: u64) -> Result<(), ChannelError> {
        self.channel.check_cancel()?;
        self.show_life(round)?;
        self.look_at_answers()
    }

    /// Lets the destination flush its disks; returns how long that took there.
    pub(crate) fn flush(&mut self, round: u64) -> Result<Duration, ChannelError> {
        Flush { round }.encode(&mut self.body);
        self.channel.send(Kind::Flush, &self.body)?;
        let patience = self.channel.link().set_patience(self.deadlines.flush);
        self.receive(Kind::Flushed)?;
        self.channel.link().set_patience(patience);
        let flushed = self.channel.decode(Kind::Flushed, Flushed::decode)?;
        Ok(Duration::from_nanos(flushed.flush_ns))
    }

    /// Waits, looking at what the peer says.
    pub(crate) fn idle(&mut self, time: Duration) -> Result<(), ChannelError> {
        let end = Instant::now() + time;
        while let Some(arrived) = self.channel.receive_until(end)? {
            self.answer(arrived.kind)?;
        }
        Ok(())
    }

    /// Sets a mark in the stream: a SYNC, whose number is returned.
    pub(crate) fn mark(&mut self, round: u64) -> Result<u64, ChannelError> {
        self.padded_mark(round, 0)
    }

    fn padded_mark(&mut self, round: u64, padding: usize) -> Result<u64, ChannelError> {
        if self.marks.len() >= MAX_MARKS
            && let Some(oldest) = self.marks.front()
        {
            self.wait_for(oldest.number)?;
        }
        self.last_mark += 1;
        let number = self.last_mark;
        self.begin();
        let elsewhere = self.barrier()?;
        Sync {
            mark: number,
            round,
        }
        .encode(&mut self.body);
        self.body.resize(Sync::LEN + padding, 0);
        self.channel.send(Kind::Sync, &self.body)?;
        let now = self.clock.now();
        let bytes = self.channel.sent_bytes() + elsewhere;
        self.marks.push_back(Mark {
            number,
            began: self.began.take().unwrap_or(now),
            bytes,
            starved: std::mem::take(&mut self.starved),
        });
        self.marked_at = now;
        self.marked_bytes = bytes;
        Ok(number)
    }

    /// Waits until that mark is acknowledged: all before it has been placed.
    pub(crate) fn wait_for(&mut self, number: u64) -> Result<(), ChannelError> {
        while self.marks.front().is_some_and(|mark| mark.number <= number) {
            let arrived = self.channel.receive()?;
            self.answer(arrived.kind)?;
        }
        Ok(())
    }

    /// Waits for a frame that is no acknowledgement of a mark.
    pub(crate) fn receive(&mut self, expected: Kind) -> Result<(), ChannelError> {
        loop {
            let kind = self.channel.receive()?.kind;
            if kind == expected {
                return Ok(());
            }
            self.answer(kind)?;
        }
    }

    /// What this side of the connection knows, into a snapshot.
    pub(crate) fn tell(&self, snapshot: &mut Snapshot) {
        let elsewhere = self.elsewhere();
        let sent = self.channel.sent_bytes() + elsewhere.sent;
        snapshot.ram.transferred = sent - self.channel.sent_blocks();
        if let Some(disk) = &mut snapshot.disk {
            disk.transferred = self.channel.sent_blocks();
        }
        snapshot.bytes = self.channel.sent().and(elsewhere.by_kind);
        snapshot.multifd = self.multifd();
        snapshot.bandwidth = self.convergence.bandwidth.estimate();
        snapshot.round_trip = self.convergence.measured_round_trip();
        let zero_copy = [self.channel.zero_copy(), elsewhere.zero_copy];
        snapshot.zero_copy = zero_copy.into_iter().flatten().reduce(Sends::and);
    }

    /// Measures the round trip, on a short link more often, as there it is mostly a matter of when
    /// threads wake up; nothing else is on its way.
    pub(crate) fn measure_round_trip(&mut self) -> Result<(), ChannelError> {
        for measured in 1.. {
            let sent = self.clock.now();
            let number = self.mark(0)?;
            self.wait_for(number)?;
            let time = self.channel.arrived_at().saturating_sub(sent);
            self.convergence.round_trip_took(time);
            if measured >= if time < SHORT { 5 } else { 2 } {
                break;
            }
        }
        let round_trip = self.convergence.round_trip();
        self.channel.link().watch_send_buffer(round_trip);
        Ok(())
    }

    /// Measures the bandwidth if too little was sent to tell: with padding, nothing else being on
    /// its way.
    pub(crate) fn measure_bandwidth(&mut self, round: u64) -> Result<(), ChannelError> {
        if !self.convergence.bandwidth.is_measured() {
            let number = self.padded_mark(round, STRONG as usize)?;
            self.wait_for(number)?;
        }
        Ok(())
    }

    /// Takes the acknowledgements that are there. What else is there is left for who waits for it.
    pub(crate) fn look_at_answers(&mut self) -> Result<(), ChannelError> {
        while self.channel.next_kind()? == Some(Kind::SyncAck) {
            if let Some(arrived) = self.channel.receive_now()? {
                self.answer(arrived.kind)?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, kind: Kind) -> Result<(), ChannelError> {
        let unexpected = OutOfOrder {
            kind,
            phase: self.channel.phase(),
        };
        if kind != Kind::SyncAck {
            return Err(unexpected.into());
        }
        let ack = self.channel.decode(kind, SyncAck::decode)?;
        let mark = self
            .marks
            .pop_front()
            .filter(|mark| mark.number == ack.mark)
            .ok_or(unexpected)?;
        let bytes = mark.bytes - self.acked_bytes;
        self.acked_bytes = mark.bytes;
        let round_trip = self.convergence.round_trip();
        let arrived_at = self.channel.arrived_at();
        if mark.starved < arrived_at.saturating_sub(mark.began) / 4 || mark.starved.is_zero() {
            self.convergence
                .bandwidth
                .delivered(bytes, mark.began, arrived_at, round_trip);
        }
        Ok(())
    }
}

impl FrameSink for Session {
    fn send_pages(
        &mut self,
        body: &[u8],
        memory: &GuestPages,
        runs: &[PageRun],
        round: u64,
    ) -> Result<(), ChannelError> {
        self.send_in_time(round, |channel| channel.send_pages(body, memory, runs))
    }

    fn send_data(
        &mut self,
        kind: Kind,
        body: &[u8],
        data: &[&[u8]],
        round: u64,
    ) -> Result<(), ChannelError> {
        Self::send_data(self, kind, body, data, round)
    }

    fn send(&mut self, kind: Kind, body: &[u8], round: u64) -> Result<(), ChannelError> {
        Self::send(self, kind, body, round)
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
        Self::frame_pages(self)
    }
}
