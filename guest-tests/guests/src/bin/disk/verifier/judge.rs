//! Whether a disk, or memory, holds what it should; and telling what a verifier found.

use alloc::vec;
use alloc::vec::Vec;

use guests::bare::{power, serial};
use guests::block::{self, Contents, Mark};
use guests::disk::{Held, Kind, OnError, Place, Report};
use guests::{Hex, Maybe};

use super::{UNKNOWN, Verifier, ZERO};
use crate::device::Request;

/// Errors that are reported, of each sort; all are counted.
const REPORTED: u64 = 100;

impl Verifier {
    /// Compares what a request holds with what it should; gives what was right, the rest unknown.
    pub(super) fn check(
        &mut self,
        request: &mut Request,
        place: Place,
        expected: &[u32],
    ) -> Vec<u32> {
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
    pub(super) fn check_kept(&mut self, request: &mut Request, held: &[u32]) {
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

    pub(super) fn report_io_error(&mut self, request: &Request, status: u8) {
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

    pub(super) fn report_length(&mut self, request: &Request, found: u64) {
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

    pub(super) fn microseconds(&self, cycles: u64) -> u64 {
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

    pub(super) fn report_verified(&self, now: u64) {
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
