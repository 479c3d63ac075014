//! What a verifier does next.

use guests::bare::serial;
use guests::dirtier::Rate;
use guests::disk::{Mode, Op, Report};

use super::{Phase, Verifier, ZERO};

/// Places that are tried for a request that must not touch those of others.
const TRIES: u32 = 8;
/// Sectors of the largest discard or write of zeroes.
const LARGEST: u32 = 2048;

impl Verifier {
    /// Starts the next request, if there is one.
    pub(super) fn start(&mut self, now: u64) -> bool {
        match self.phase {
            Phase::Work => self.start_any(now),
            Phase::Fill(next) => {
                let count = self.sectors.saturating_sub(next).min(self.max.into()) as u32;
                if count == 0 {
                    self.phase = Phase::Drain;
                    return false;
                }
                let started = self.submit(Op::Write, next, count, 1);
                if started {
                    self.phase = Phase::Fill(next + u64::from(count));
                }
                started
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
                    let started = self.submit(Op::Read, next, count, 0);
                    if started {
                        self.phase = Phase::Sweep(next + u64::from(count));
                    }
                    return started;
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
            Op::Discard => (limits.discard_unit, limits.max_discard.min(LARGEST)),
            Op::WriteZeroes => (limits.unit, limits.max_zeroes.min(LARGEST)),
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
}
