//! A disk, and what should be on it.

mod judge;
mod plan;

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use guests::bare::random::Random;
use guests::bare::timer::Timer;
use guests::bare::waiter::Watchdog;
use guests::bare::{give_up, serial, tsc};
use guests::block::{self, Mark};
use guests::dirtier::Rate;
use guests::disk::{Holds, Mode, Op, Options, Place, Report};

use crate::device::{Disk, Done, Request};

// What is known of a sector, in the table.
const UNKNOWN: u32 = 0;
const ZERO: u32 = u32::MAX;

/// What the disk is being used for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// As the mode says.
    Work,
    /// Write everything once, from this sector on.
    Fill(u64),
    /// Nothing new, until all is done; then flush.
    Drain,
    /// The last flush is under way.
    Flush,
    /// Read everything, from this sector on.
    Sweep(u64),
}

/// Counts of what succeeded and what did not.
#[derive(Default)]
struct Counts {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    zeroes: u64,
    verified: u64,
    unchecked: u64,
    kept: u64,
    errors: u64,
    io_errors: u64,
    lengths: u64,
}

/// A disk, what is known of it, and what is being done with it.
pub(crate) struct Verifier {
    index: u64,
    options: Options,
    khz: u64,
    disk: Disk,
    /// The area.
    first: u64,
    sectors: u64,
    max: u32,
    /// What each sector of the area holds.
    table: Vec<u32>,
    generation: u32,
    random: Random,
    phase: Phase,
    begun: u64,
    rate: Timer,
    /// What a request may still be started for, at a set rate.
    credit: u64,
    unflushed: u64,
    /// Requests that the device does not have, longest unused first. With what they hold that was
    /// right.
    spare: VecDeque<(Request, Vec<u32>)>,
    counts: Counts,
    longest: u64,
    /// Requests with wrong sectors.
    reported: u64,
    watchdog: Watchdog,
    corrupt: Option<u64>,
}

impl Verifier {
    pub(crate) fn new(index: u64, disk: Disk, options: Options, khz: u64) -> Self {
        let limits = disk.limits;
        let unit = u64::from(limits.unit);
        let first = (options.from.0 / block::BYTES as u64).next_multiple_of(unit);
        let sectors = limits.capacity.saturating_sub(first);
        let sectors = sectors.min(options.area.0 / block::BYTES as u64) / unit * unit;
        if sectors == 0 {
            give_up(&format_args!("disk {index} has nothing of the area"));
        }
        if limits.readonly && options.mode != Mode::Read {
            give_up(&format_args!("disk {index} is read-only: use mode=read"));
        }
        let max = (options.max.0 / block::BYTES as u64).min(block::MAX_SECTORS.into());
        let max = (max.min(sectors) / unit * unit).max(unit) as u32;
        let depth = options.depth.clamp(1, 64);
        let held = match (options.mode, options.holds) {
            (Mode::Read, _) | (_, Holds::Fill) => 1,
            (_, Holds::Zero) => ZERO,
            _ => UNKNOWN,
        };
        let requests = depth + options.keep.min(256);
        Self {
            index,
            options: Options { depth, ..options },
            khz,
            first,
            sectors,
            max,
            table: vec![held; sectors as usize],
            generation: 1,
            random: Random::new(options.seed ^ index << 32),
            phase: if options.mode == Mode::Fill {
                Phase::Fill(0)
            } else {
                Phase::Work
            },
            begun: tsc::now(),
            rate: match options.rate {
                Rate::PerSecond(rate) => Timer::new((khz * 1000).checked_div(rate).unwrap_or(0)),
                Rate::Max => Timer::new(0),
            },
            credit: 0,
            unflushed: 0,
            spare: (0..requests)
                .map(|_| (Request::new(max), Vec::new()))
                .collect(),
            counts: Counts::default(),
            longest: 0,
            reported: 0,
            watchdog: Watchdog::default(),
            corrupt: options.corrupt.0,
            disk,
        }
    }

    pub(crate) fn area(&self) -> (u64, u64) {
        (self.first, self.sectors)
    }

    pub(crate) fn disk(&mut self) -> &mut Disk {
        &mut self.disk
    }

    /// Asks for everything to be verified.
    pub(crate) fn verify(&mut self) {
        if self.phase == Phase::Work {
            self.phase = Phase::Drain;
            self.begun = tsc::now();
        }
    }

    /// Whether it is being verified or filled.
    pub(crate) fn is_busy(&self) -> bool {
        self.phase != Phase::Work
    }

    /// Takes what is done and starts new requests; whether there was anything to do. `news`: whether
    /// an interrupt came, or none is waited for.
    pub(crate) fn turn(&mut self, now: u64, news: bool, interrupts: u64) -> bool {
        let done = !news && self.disk.pending > 0 && self.disk.is_done();
        let missed = self.watchdog.misses(now, self.khz, news, done);
        if missed {
            serial::line(&Report::LostInterrupt {
                device: self.index,
                interrupts,
            });
            // The line may be high still: only a low one can rise.
            self.disk.acknowledge();
        }
        let mut active = false;
        if news || missed {
            self.disk_done(&mut active);
        }
        while (self.disk.pending as u64) < self.options.depth && self.start(now) {
            active = true;
        }
        self.disk.notify();
        active
    }

    fn disk_done(&mut self, active: &mut bool) {
        loop {
            match self.disk.done() {
                Ok(Some(done)) => {
                    *active = true;
                    self.finish(done);
                }
                Ok(None) => return,
                Err(token) => give_up(&format_args!(
                    "disk {} gives back descriptor {token}, which it doesn't have",
                    self.index
                )),
            }
        }
    }

    fn submit(&mut self, op: Op, place: u64, count: u32, generation: u32) -> bool {
        let Some((mut request, held)) = self.spare.pop_front() else {
            return false;
        };
        self.check_kept(&mut request, &held);
        (request.op, request.sector, request.sectors) = (op, self.first + place, count);
        request.generation = generation;
        request.unmap = self.disk.limits.may_unmap && self.random.below(2) == 0;
        let (least, most) = self.disk.segments(count);
        let wanted = 1 + self.random.below(self.options.segments.clamp(1, 64)) as u32;
        request.segments = wanted.clamp(least, most);
        for position in 0..count {
            match op {
                Op::Write => self
                    .mark(&request, position)
                    .write(request.buffer.sector(position as usize)),
                // What the device doesn't write must not look right.
                Op::Read => *request.buffer.sector(position as usize) = [u64::MAX; 64],
                _ => {}
            }
        }
        request.begun = tsc::now();
        match self.disk.submit(request) {
            Ok(()) => {
                self.credit = self.credit.saturating_sub(1);
                true
            }
            Err(request) => {
                self.spare.push_front((request, Vec::new()));
                false
            }
        }
    }

    fn mark(&self, request: &Request, position: u32) -> Mark {
        Mark {
            seed: self.options.seed,
            sector: request.sector + u64::from(position),
            generation: request.generation,
            position: position as u16,
            count: request.sectors as u16,
        }
    }

    fn finish(&mut self, done: Done) {
        let Done {
            mut request,
            status,
            length,
        } = done;
        let took = tsc::now().saturating_sub(request.begun);
        self.longest = self.longest.max(took);
        let ok = status == 0;
        let mut held = Vec::new();
        if !ok {
            self.report_io_error(&request, status);
        } else if length != request.written_bytes() {
            self.report_length(&request, length);
        }
        let (place, sectors) = (
            (request.sector.saturating_sub(self.first)) as usize,
            request.sectors,
        );
        let range = place..place + sectors as usize;
        match request.op {
            Op::Read if ok => {
                self.counts.reads += 1;
                let expected = self.table[range].to_vec();
                held = self.check(&mut request, Place::Disk, &expected);
            }
            Op::Write => {
                let now = if ok { request.generation } else { UNKNOWN };
                self.table[range].fill(now);
                self.counts.writes += u64::from(ok);
                held = vec![request.generation; sectors as usize];
            }
            Op::Discard => {
                let zero = ok && self.options.discarded == Holds::Zero;
                self.table[range].fill(if zero { ZERO } else { UNKNOWN });
                self.counts.discards += u64::from(ok);
            }
            Op::WriteZeroes => {
                self.table[range].fill(if ok { ZERO } else { UNKNOWN });
                self.counts.zeroes += u64::from(ok);
            }
            Op::Flush => self.counts.flushes += u64::from(ok),
            Op::Read => {}
        }
        self.spare.push_back((request, held));
    }
}
