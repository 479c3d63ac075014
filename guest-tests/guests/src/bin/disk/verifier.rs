//! What is written to a disk, what should be on it, and whether it is.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use guests::bare::random::Random;
use guests::bare::timer::Timer;
use guests::bare::waiter::Watchdog;
use guests::bare::{give_up, power, serial, tsc};
use guests::block::{self, Contents, Mark};
use guests::dirtier::Rate;
use guests::disk::{Held, Holds, Kind, Mode, OnError, Op, Options, Place, Report};
use guests::{Hex, Maybe};

use crate::device::{Disk, Done, Request};

/// Errors that are reported, of each sort; all are counted.
const REPORTED: u64 = 100;
/// Places that are tried for a request that must not touch those of others.
const TRIES: u32 = 8;

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

    /// Starts the next request, if there is one.
    fn start(&mut self, now: u64) -> bool {
        match self.phase {
            Phase::Work => self.start_any(now),
            Phase::Fill(next) => {
                let count = self.sectors.saturating_sub(next).min(self.max.into()) as u32;
                if count == 0 {
                    self.phase = Phase::Drain;
                    return false;
                }
                self.phase = Phase::Fill(next + u64::from(count));
                self.submit(Op::Write, next, count, 1)
            }
            Phase::Drain if self.disk.pending == 0 => {
                self.phase = Phase::Flush;
                if self.disk.limits.flush && !self.disk.limits.readonly {
                    self.submit(Op::Flush, 0, 0, 0)
                } else {
                    false
                }
            }
            Phase::Flush if self.disk.pending == 0 => {
                if self.options.mode == Mode::Fill && self.counts.reads == 0 {
                    self.phase = Phase::Work;
                    serial::line(&Report::Filled {
                        device: self.index,
                        sectors: self.sectors,
                        took_us: self.microseconds(now.saturating_sub(self.begun)),
                    });
                } else {
                    self.phase = Phase::Sweep(0);
                }
                true
            }
            Phase::Drain | Phase::Flush => false,
            Phase::Sweep(next) => {
                let count = self.sectors.saturating_sub(next).min(self.max.into()) as u32;
                if count > 0 {
                    self.phase = Phase::Sweep(next + u64::from(count));
                    return self.submit(Op::Read, next, count, 0);
                }
                if self.disk.pending == 0 {
                    self.phase = Phase::Work;
                    self.report_verified(now);
                }
                false
            }
        }
    }

    fn start_any(&mut self, now: u64) -> bool {
        if self.options.rate != Rate::Max {
            if self.rate.fires(now, self.khz) {
                self.credit = (self.credit + 1).min(self.options.depth);
            }
            if self.credit == 0 {
                return false;
            }
        }
        let op = self.choose();
        if op == Op::Flush {
            self.unflushed = 0;
            return self.submit(op, 0, 0, 0);
        }
        let limits = self.disk.limits;
        let (unit, largest) = match op {
            Op::Discard => (limits.discard_unit, limits.max_discard.min(2048)),
            Op::WriteZeroes => (limits.unit, limits.max_zeroes.min(2048)),
            _ => (limits.unit, self.max),
        };
        // As many small ones as large ones.
        let units = u64::from(largest / unit).min(self.sectors / u64::from(unit));
        let most = 1u64 << self.random.below(u64::from(units.max(1).ilog2()) + 1);
        let count = (1 + self.random.below(most * 2)).min(units);
        if count == 0 {
            return false;
        }
        let count = count as u32 * unit;
        for _ in 0..TRIES {
            let units = (self.sectors - u64::from(count)) / u64::from(unit) + 1;
            let place = self.random.below(units) * u64::from(unit);
            // Discards are aligned on the disk, not in the area.
            let place = if op == Op::Discard {
                (self.first + place).next_multiple_of(unit.into()) - self.first
            } else {
                place
            };
            if place + u64::from(count) <= self.sectors && self.is_free(op, place, count) {
                if op == Op::Write {
                    self.unflushed += 1;
                    self.generation = (self.generation + 1).min(ZERO - 1);
                }
                return self.submit(op, place, count, self.generation);
            }
        }
        false
    }

    fn choose(&mut self) -> Op {
        let (options, limits) = (&self.options, self.disk.limits);
        if options.mode != Mode::Mixed {
            return Op::Read;
        }
        if limits.flush && options.flush > 0 && self.unflushed >= options.flush {
            return Op::Flush;
        }
        let chance = self.random.below(100);
        let writes = options.writes;
        let discards = writes
            + if limits.max_discard > 0 {
                options.discards
            } else {
                0
            };
        let zeroes = discards
            + if limits.max_zeroes > 0 {
                options.zeroes
            } else {
                0
            };
        match chance {
            chance if chance < writes => Op::Write,
            chance if chance < discards => Op::Discard,
            chance if chance < zeroes => Op::WriteZeroes,
            _ => Op::Read,
        }
    }

    /// Whether no request in flight changes these sectors, nor touches those that this one changes.
    fn is_free(&self, op: Op, place: u64, count: u32) -> bool {
        let (from, to) = (self.first + place, self.first + place + u64::from(count));
        self.disk.in_flight().all(|other| {
            let apart = other.sector >= to || other.sector + u64::from(other.sectors) <= from;
            apart || (op == Op::Read && other.op == Op::Read)
        })
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

    /// Compares what a request holds with what it should; gives what was right, the rest unknown.
    fn check(&mut self, request: &mut Request, place: Place, expected: &[u32]) -> Vec<u32> {
        let mut held = vec![UNKNOWN; expected.len()];
        let mut wrong = None;
        let mut wrong_sectors = 0;
        for (position, &expected) in expected.iter().enumerate() {
            if expected == UNKNOWN {
                self.counts.unchecked += u64::from(place == Place::Disk);
                continue;
            }
            let number = request.sector + position as u64;
            let memory = request.buffer.sector(position);
            if self.corrupt == Some(0) {
                memory[9] ^= 0x10;
                self.corrupt = None;
            }
            let found = block::read(memory);
            let right = match found {
                Contents::Zero => expected == ZERO,
                Contents::Written(mark) => {
                    (mark.seed, mark.sector, mark.generation)
                        == (self.options.seed, number, expected)
                }
                _ => false,
            };
            if right {
                held[position] = expected;
                self.corrupt = self.corrupt.map(|left| left.saturating_sub(1));
                match place {
                    Place::Disk => self.counts.verified += 1,
                    Place::Memory => self.counts.kept += 1,
                }
            } else {
                wrong_sectors += 1;
                wrong.get_or_insert((number, expected, found, memory[0]));
                if place == Place::Disk {
                    self.table[(number - self.first) as usize] = UNKNOWN;
                }
            }
        }
        if let Some((sector, expected, found, first_word)) = wrong {
            self.counts.errors += wrong_sectors;
            self.reported += 1;
            if self.reported <= REPORTED {
                serial::line(&Report::Error {
                    device: self.index,
                    sector,
                    kind: self.kind(sector, found),
                    place,
                    expected: known(expected),
                    found: found_held(found),
                    found_sector: Maybe(mark_of(found).map(|mark| mark.sector)),
                    found_seed: Maybe(mark_of(found).map(|mark| mark.seed)),
                    found_position: Maybe(mark_of(found).map(|mark| mark.position.into())),
                    request: request.sector,
                    request_sectors: request.sectors.into(),
                    wrong_sectors,
                    bytes: Hex(first_word),
                });
            }
        }
        held
    }

    /// Compares a buffer with what was right in it when it was last used.
    fn check_kept(&mut self, request: &mut Request, held: &[u32]) {
        if !held.is_empty() {
            self.check(request, Place::Memory, held);
        }
    }

    fn kind(&self, sector: u64, found: Contents) -> Kind {
        match found {
            Contents::Zero => Kind::Zero,
            Contents::Foreign => Kind::Foreign,
            Contents::Damaged(_) => Kind::Damaged,
            Contents::Written(mark) if mark.sector == sector && mark.seed == self.options.seed => {
                Kind::Stale
            }
            Contents::Written(_) => Kind::Misplaced,
        }
    }

    fn report_io_error(&mut self, request: &Request, status: u8) {
        self.counts.io_errors += 1;
        if self.counts.io_errors <= REPORTED || self.options.on_error == OnError::Stop {
            serial::line(&Report::IoError {
                device: self.index,
                op: request.op,
                sector: request.sector,
                sectors: request.sectors.into(),
                status: status.into(),
            });
        }
        if self.options.on_error == OnError::Stop {
            power::off();
        }
    }

    fn report_length(&mut self, request: &Request, found: u64) {
        self.counts.lengths += 1;
        if self.counts.lengths <= REPORTED {
            serial::line(&Report::Length {
                device: self.index,
                op: request.op,
                sector: request.sector,
                expected: request.written_bytes(),
                found,
            });
        }
    }

    fn microseconds(&self, cycles: u64) -> u64 {
        (u128::from(cycles) * 1000 / u128::from(self.khz)) as u64
    }

    pub(crate) fn report_status(&mut self) {
        let counts = &self.counts;
        let status = Report::Status {
            device: self.index,
            reads: counts.reads,
            writes: counts.writes,
            flushes: counts.flushes,
            discards: counts.discards,
            zeroes: counts.zeroes,
            verified: counts.verified,
            unchecked: counts.unchecked,
            kept: counts.kept,
            in_flight: self.disk.pending as u64,
            longest_us: self.microseconds(self.longest),
            errors: counts.errors,
            io_errors: counts.io_errors,
            lost_interrupts: self.watchdog.lost,
        };
        self.longest = 0;
        serial::line(&status);
    }

    fn report_verified(&self, now: u64) {
        let (mut written, mut zero, mut digest) = (0, 0, 0u64);
        for (index, &held) in self.table.iter().enumerate() {
            match held {
                UNKNOWN => {}
                ZERO => zero += 1,
                generation => {
                    written += 1;
                    let part = block::digest(self.first + index as u64, generation);
                    digest = digest.wrapping_add(part);
                }
            }
        }
        serial::line(&Report::Verified {
            device: self.index,
            seed: self.options.seed,
            first: self.first,
            sectors: self.sectors,
            written,
            zero,
            unknown: self.sectors - written - zero,
            digest: Hex(digest),
            took_us: self.microseconds(now.saturating_sub(self.begun)),
            errors: self.counts.errors,
            io_errors: self.counts.io_errors,
        });
    }
}

fn known(entry: u32) -> Held {
    match entry {
        UNKNOWN => Held::Unknown,
        ZERO => Held::Zero,
        generation => Held::Generation(generation),
    }
}

fn mark_of(found: Contents) -> Option<Mark> {
    match found {
        Contents::Written(mark) | Contents::Damaged(mark) => Some(mark),
        Contents::Zero | Contents::Foreign => None,
    }
}

fn found_held(found: Contents) -> Held {
    match found {
        Contents::Zero => Held::Zero,
        _ => mark_of(found).map_or(Held::Unknown, |mark| Held::Generation(mark.generation)),
    }
}
