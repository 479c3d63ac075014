//! What a migration tells about itself, under QEMU's names: readable at any time by any thread.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::disk::BLOCK_SIZE;
use crate::frame::Kind;
use crate::layout::PAGE_SIZE;
use crate::message::BlobChunk;
use crate::throttle::Throttle;
use crate::xbzrle;
use crate::zero_copy::Sends;

/// How many rounds are kept for [`Snapshot::rounds`].
pub const KEPT_ROUNDS: usize = 256;

/// The state of a migration, as in QEMU's `MigrationStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// There has been none.
    #[default]
    None,
    /// Connecting, checking, building the guest.
    Setup,
    /// Memory moves; the guest runs at the source.
    Active,
    /// The guest is stopped; the rest moves.
    Device,
    /// The guest is at the destination.
    Completed,
    /// It failed; the guest is at the source.
    Failed,
    /// Being cancelled.
    Cancelling,
    /// Cancelled; the guest is at the source.
    Cancelled,
    /// The hand-over was begun and never confirmed: the guest may run at the destination. Ours.
    HandoverUnknown,
    /// The guest runs at the destination, and not all of its memory is there yet.
    PostcopyActive,
    /// The same, and the connection is broken: it waits to be recovered.
    PostcopyPaused,
    /// Another connection is there, and both sides agree on what is left.
    PostcopyRecover,
}

impl Status {
    /// QEMU's name for it; `handover-unknown` for what QEMU doesn't have.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::HandoverUnknown => "handover-unknown",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
        }
    }

    /// Whether a migration with this status has ended.
    pub fn is_over(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::HandoverUnknown
        )
    }

    /// Whether the guest's memory is at one side and the guest at the other.
    pub fn is_postcopy(self) -> bool {
        matches!(
            self,
            Self::PostcopyActive | Self::PostcopyPaused | Self::PostcopyRecover
        )
    }
}

/// Memory in numbers, as in QEMU's `MigrationRAMStats`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ram {
    /// Bytes sent (at the destination: received), of every kind but those of the disks.
    pub transferred: u64,
    /// Bytes of RAM that are still to be sent.
    pub remaining: u64,
    /// Bytes of RAM that the guest has.
    pub total: u64,
    /// Pages told as zero, among them those never touched.
    pub duplicate: u64,
    /// Pages sent with their data.
    pub normal: u64,
    /// The bytes of their data.
    pub normal_bytes: u64,
    /// Megabits a second.
    pub mbps: f64,
    /// How often the dirty log was harvested for a round.
    pub dirty_sync_count: u64,
    /// Pages a second that the guest dirtied in the last round.
    pub dirty_pages_rate: u64,
    /// Pages a second that were sent in the last round.
    pub pages_per_second: u64,
    /// Bytes sent while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes sent while the guest was stopped.
    pub downtime_bytes: u64,
}

impl Ram {
    /// The page size in bytes.
    pub const PAGE_SIZE: u64 = PAGE_SIZE;
}

/// The disks that travel in numbers, in bytes unless said otherwise: what QEMU shows as `disk`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Disk {
    /// Sent (at the destination: received) for the disks.
    pub transferred: u64,
    /// Still to be sent; at the destination, of the first pass only.
    pub remaining: u64,
    /// The capacity of all disks.
    pub total: u64,
    /// Pieces of up to 64 KiB sent with their data.
    pub normal: u64,
    /// Their data.
    pub normal_bytes: u64,
    /// Told as zeroes.
    pub zero_bytes: u64,
    /// Told as absent: what the destination has already.
    pub absent_bytes: u64,
    /// Megabits a second, in the first pass and then in the last round.
    pub mbps: f64,
    /// How often the log of writes was harvested for a round.
    pub dirty_sync_count: u64,
    /// Written by the guest a second, in whole blocks, in the last round.
    pub dirty_bytes_rate: u64,
    /// How long the destination took for its last flush while the guest ran.
    pub flush: Duration,
    /// Sent while the guest was stopped.
    pub downtime_bytes: u64,
}

impl Disk {
    /// The size of a block in bytes.
    pub const BLOCK_SIZE: u64 = BLOCK_SIZE;
}

/// What went over the connection beside the disks, in bytes by what they were; together [`Ram::transferred`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// The contents of pages.
    pub pages: u64,
    /// Runs of zero pages.
    pub zero: u64,
    /// The state of everything but RAM.
    pub state: u64,
    /// The blobs: what a later reset needs.
    pub files: u64,
    /// All else: headers, checksums, agreement, padding.
    pub control: u64,
}

impl Bytes {
    /// Counts a frame; its header, and what is no content, is counted by [`of`](Self::of).
    pub(crate) fn count(&mut self, kind: Kind, body_len: u32, payload_len: u32) {
        let body = u64::from(body_len);
        match kind {
            Kind::Pages | Kind::Compressed | Kind::Xbzrle => self.pages += u64::from(payload_len),
            Kind::Zero => self.zero += body,
            Kind::State => self.state += body,
            Kind::Blob => self.files += body.saturating_sub(BlobChunk::LEN as u64),
            _ => {}
        }
    }

    /// The same, with all of `transferred` bytes that is not counted yet as control.
    pub(crate) fn of(self, transferred: u64) -> Self {
        let counted = self.pages + self.zero + self.state + self.files;
        Self {
            control: transferred.saturating_sub(counted),
            ..self
        }
    }

    /// Of this connection and of another one.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            zero: self.zero + other.zero,
            state: self.state + other.state,
            files: self.files + other.files,
            control: self.control + other.control,
        }
    }
}

/// What went compressed; only at the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compression {
    /// Whether pages are compressed at present, because it pays.
    pub active: bool,
    /// Pages that went compressed.
    pub pages: u64,
    /// The bytes that they took.
    pub bytes: u64,
}

/// More connections for pages; only at the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Multifd {
    /// How many there are beside the first one; 0 if there can't be any.
    pub channels: u64,
    /// How many of them take work: as many as make a difference.
    pub in_use: u64,
    /// Bytes sent on them.
    pub bytes: u64,
    /// Why only one is used, or none.
    pub why_one: Option<String>,
}

/// How long the guest stood still, and what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downtime {
    /// From the last instruction at the source to the first at the destination; the sum of the
    /// others, save for rounding.
    pub total: Duration,
    /// Stopping the vCPUs.
    pub stop: Duration,
    /// Reading the dirty logs, and sending the last blocks and pages.
    pub last_pages: Duration,
    /// Saving the state.
    pub save: Duration,
    /// Sending the state and what was on its way, and the answer.
    pub send: Duration,
    /// Checking, flushing the disks, and loading at the destination.
    pub load: Duration,
    /// Giving up what only one side may hold, GO, and starting the vCPUs.
    pub start: Duration,
    /// What `total` was estimated to be when it was decided to stop the guest; `None` in
    /// post-copy, in which nothing is decided by it.
    pub expected: Option<Duration>,
}

/// What happened after the guest had moved ahead of its memory.
///
/// The *downtime* is not in it. What the guest still waits for, it waits for page by page: the
/// source knows how many were asked for, the destination how long each took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Postcopy {
    /// How long the guest has run without all of its memory, or did.
    pub phase_time: Duration,
    /// Bytes sent (at the destination: received) in that time.
    pub bytes: u64,
    /// Requests by the destination.
    pub requests: u64,
    /// Pages that they were for.
    pub requested_pages: u64,
    /// Pages that are still to come.
    pub missing_pages: u64,
    /// The guest is known to be at the destination; the source knows it when that has said so.
    /// Until then it may never have begun.
    pub confirmed: bool,
    /// How long all vCPUs waited for pages at the same time; only at the destination.
    pub blocktime: Option<Duration>,
    /// How long each vCPU waited; only at the destination.
    pub vcpu_blocktime: Vec<Duration>,
    /// From a fault to its page, on average; `None` without a fault, and at the source.
    pub latency_average: Option<Duration>,
    /// The longest of them.
    pub latency_max: Option<Duration>,
    /// How many faults took how long: the one of index N is of those from 2^N to 2^(N+1) µs, the
    /// first and the last also of all below and above.
    pub latency_distribution: Vec<u64>,
}

/// One pass over the dirty blocks and pages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Round {
    /// From 1; the first is over all pages.
    pub number: u64,
    /// Pages sent with their data.
    pub pages: u64,
    /// Pages told as zero.
    pub zero: u64,
    /// Bytes of blocks sent with their data, or told as zeroes.
    pub block_bytes: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// How long it took.
    pub time: Duration,
    /// Pages that were dirty at its end.
    pub dirty: u64,
    /// Bytes of blocks that were dirty at its end.
    pub dirty_block_bytes: u64,
    /// Pages a second that the guest dirtied in it.
    pub dirty_rate: f64,
    /// The bandwidth estimated at its end, in bytes a second; 0 if not known.
    pub bandwidth: f64,
}

/// All there is to know at a moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The status.
    pub status: Status,
    /// Why it failed or was cancelled.
    pub error: Option<String>,
    /// Memory.
    pub ram: Ram,
    /// The disks; `None` if none travel.
    pub disk: Option<Disk>,
    /// What `ram.transferred` consists of.
    pub bytes: Bytes,
    /// The link's bandwidth as measured, in bytes a second; only at the source.
    pub bandwidth: Option<f64>,
    /// The shortest round trip measured; only at the source.
    pub round_trip: Option<Duration>,
    /// Since the beginning, up to the end.
    pub total_time: Duration,
    /// From the beginning to the first page.
    pub setup_time: Duration,
    /// What a stop would have cost at the end of the last round.
    pub expected_downtime: Option<Duration>,
    /// What it did cost.
    pub downtime: Option<Downtime>,
    /// Post-copy, from the moment that pages may be missing at the destination.
    pub postcopy: Option<Postcopy>,
    /// XBZRLE; `None` if it is off.
    pub xbzrle: Option<xbzrle::Figures>,
    /// Compression; `None` if it is off and never was on.
    pub compression: Option<Compression>,
    /// Sends without a copy; `None` if they are off, or no connection can do it.
    pub zero_copy: Option<Sends>,
    /// More connections; `None` if they were not asked for.
    pub multifd: Option<Multifd>,
    /// How the guest is slowed down, because it writes faster than its memory moves.
    pub throttle: Throttle,
    /// Pages that were never touched, and so never read.
    pub skipped: u64,
    /// Rounds begun so far, the last one with the guest stopped included.
    pub round: u64,
    /// The last [`KEPT_ROUNDS`] rounds that ended.
    pub rounds: VecDeque<Round>,
}

/// Told of what happens, on the engine's thread: must return soon.
pub trait Observer: Send + Sync {
    /// The status has changed.
    fn status_changed(&self, status: Status) {
        let _ = status;
    }

    /// A pass over the dirty pages begins: QEMU's MIGRATION_PASS, from 1.
    fn pass_begun(&self, pass: u64) {
        let _ = pass;
    }

    /// A pass has ended.
    fn round_ended(&self, round: &Round) {
        let _ = round;
    }
}

/// The progress of one migration, shared by the engine, which writes, and whoever asks.
pub struct Progress {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    observer: Option<Box<dyn Observer>>,
}

#[derive(Default)]
struct State {
    snapshot: Snapshot,
    began: Option<Duration>,
    /// The status that the observer was told, or will be.
    told: Status,
    /// What it will be told later.
    held: Option<Vec<Event>>,
}

/// What an observer is told.
#[derive(Clone, Copy, Debug)]
enum Event {
    Status(Status),
    Pass(u64),
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Progress").field(&self.snapshot()).finish()
    }
}

impl Progress {
    /// Of a migration that has not begun.
    pub fn new(clock: Arc<dyn Clock>, observer: Option<Box<dyn Observer>>) -> Self {
        Self {
            state: Mutex::default(),
            clock,
            observer,
        }
    }

    /// How it is now.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let mut snapshot = state.snapshot.clone();
        if let (Some(began), false) = (state.began, snapshot.status.is_over()) {
            snapshot.total_time = self.clock.now().saturating_sub(began);
        }
        snapshot
    }

    /// The status now.
    pub fn status(&self) -> Status {
        self.lock().snapshot.status
    }

    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        change(&mut self.lock().snapshot);
    }

    pub(crate) fn set_status(&self, status: Status) {
        self.change_status(status);
        self.tell_status();
    }

    /// Changes the status without telling the observer.
    pub(crate) fn change_status(&self, status: Status) {
        let mut state = self.lock();
        if state.snapshot.status == status {
            return;
        }
        let now = self.clock.now();
        let began = *state.began.get_or_insert(now);
        state.snapshot.status = status;
        state.snapshot.total_time = now.saturating_sub(began);
        if status == Status::Active {
            state.snapshot.setup_time = now.saturating_sub(began);
        }
    }

    /// Tells the observer of the status, unless it knows it.
    pub(crate) fn tell_status(&self) {
        let mut state = self.lock();
        let status = state.snapshot.status;
        if std::mem::replace(&mut state.told, status) == status {
            return;
        }
        drop(state);
        self.tell(Event::Status(status));
    }

    /// From here on the observer hears nothing: whoever it tells would take time from a stopped
    /// guest.
    pub(crate) fn hold(&self) {
        self.lock().held.get_or_insert_default();
    }

    /// Tells the observer what was [held](Self::hold) back.
    pub(crate) fn tell_held(&self) {
        let held = self.lock().held.take();
        for event in held.into_iter().flatten() {
            self.tell(event);
        }
    }

    fn tell(&self, event: Event) {
        if let Some(held) = &mut self.lock().held {
            held.push(event);
            return;
        }
        let Some(observer) = &self.observer else {
            return;
        };
        match event {
            Event::Status(status) => observer.status_changed(status),
            Event::Pass(number) => observer.pass_begun(number),
        }
    }

    /// Sets the last status of a source, and the throughput of the whole.
    pub(crate) fn complete(&self) {
        let seconds = self.snapshot().total_time.as_secs_f64();
        self.update(|snapshot| {
            if seconds > 0.0 {
                let disk = snapshot.disk.map_or(0, |disk| disk.transferred);
                let bytes = snapshot.ram.transferred + disk;
                snapshot.ram.mbps = bytes as f64 * 8.0 / 1e6 / seconds;
            }
        });
        self.set_status(Status::Completed);
    }

    pub(crate) fn begin_round(&self, number: u64) {
        self.update(|snapshot| snapshot.round = number);
        self.tell(Event::Pass(number));
    }

    pub(crate) fn end_round(&self, round: Round) {
        self.update(|snapshot| {
            if snapshot.rounds.len() == KEPT_ROUNDS {
                snapshot.rounds.pop_front();
            }
            snapshot.rounds.push_back(round);
        });
        if let Some(observer) = &self.observer {
            observer.round_ended(&round);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::MonotonicClock;

    #[test]
    fn rounds_are_kept_within_bounds_and_observers_are_told() {
        #[derive(Default)]
        struct Log(Arc<Mutex<Vec<String>>>);
        impl Observer for Log {
            fn status_changed(&self, status: Status) {
                self.0.lock().unwrap().push(status.name().to_owned());
            }
            fn pass_begun(&self, pass: u64) {
                self.0.lock().unwrap().push(format!("pass {pass}"));
            }
        }
        let log = Arc::default();
        let progress = Progress::new(
            Arc::new(MonotonicClock),
            Some(Box::new(Log(Arc::clone(&log)))),
        );
        assert_eq!(progress.status(), Status::None);
        progress.set_status(Status::Setup);
        progress.set_status(Status::Setup);
        progress.set_status(Status::Active);
        progress.begin_round(1);
        assert_eq!(*log.lock().unwrap(), ["setup", "active", "pass 1"]);
        log.lock().unwrap().clear();
        progress.hold();
        progress.set_status(Status::Device);
        progress.begin_round(2);
        assert_eq!(progress.status(), Status::Device);
        assert!(log.lock().unwrap().is_empty());
        progress.tell_held();
        progress.tell_held();
        progress.begin_round(3);
        assert_eq!(*log.lock().unwrap(), ["device", "pass 2", "pass 3"]);
        for number in 0..2 * KEPT_ROUNDS as u64 {
            progress.end_round(Round {
                number,
                ..Round::default()
            });
        }
        let rounds = progress.snapshot().rounds;
        assert_eq!(rounds.len(), KEPT_ROUNDS);
        assert_eq!(rounds.back().unwrap().number, 2 * KEPT_ROUNDS as u64 - 1);
        progress.set_status(Status::Failed);
        let total = progress.snapshot().total_time;
        assert_eq!(progress.snapshot().total_time, total);
    }
}
