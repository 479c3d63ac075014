//! Fills memory, goes on rewriting a part of it at a set rate, and checks each page against what
//! it last wrote there. See `guests::dirtier` for its options and reports.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "works on all of the machine's memory")]

use core::fmt::Display;
use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering};

use guests::bare::boot::Boot;
use guests::bare::cpu::Cpu;
use guests::bare::random::Random;
use guests::bare::timer::Timer;
use guests::bare::{give_up, memory, power, privileged, serial, smp, tsc};
use guests::dirtier::{HEARTBEAT, Options, Pattern, Rate, Report, command};
use guests::page::{self, Page};
use guests::{Hex, Maybe};

guests::guest!(pvh, main);

/// Heartbeats between two looks for a command: a look takes as long as a heartbeat.
const HEARTBEATS_PER_POLL: u32 = 5;
/// µs between two looks without heartbeats.
const POLL_US: u64 = 1_000;
/// µs of work that may be caught up with after a stop.
const BACKLOG_US: u64 = 1_000;
/// Errors that are reported; all are counted.
const REPORTED_ERRORS: u64 = 100;
/// Earlier generations that a wrong page is compared with.
const OLDER: u32 = 64;
/// Steps of a piece that is computed: so many that counting it is nothing.
const PIECE: u64 = 1 << 20;

/// Pieces computed by the further vCPUs.
static COMPUTED: AtomicU64 = AtomicU64::new(0);

fn main(boot: &Boot) -> ! {
    let options = match Options::parse(boot.command_line()) {
        Ok(options) => options,
        Err(reason) => give_up(&reason),
    };
    let Some(khz) = tsc::frequency(options.tsc_khz) else {
        give_up(&"no source for the TSC's frequency: give tsc_khz=");
    };
    let Some(memory) = Memory::find(boot, &options) else {
        give_up(&"not enough free memory for fill=");
    };
    if options.computers > 0 {
        let running = smp::start(khz, 1 + options.computers, compute);
        if running != 1 + options.computers {
            give_up(&format_args!(
                "{} vCPUs came for computers={}",
                running - 1,
                options.computers
            ));
        }
    }
    Dirtier::new(options, khz, memory).run()
}

/// What the further vCPUs do.
fn compute(_: Cpu) -> ! {
    let mut number = 1u64;
    loop {
        for step in 0..PIECE {
            number = black_box(
                number
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(step),
            );
        }
        COMPUTED.fetch_add(1, Ordering::Relaxed);
    }
}

/// The pages, in up to eight pieces, and the table of their generations before the first.
struct Memory {
    pieces: [(u64, u64); 8],
    pages: u64,
    generations: *mut u32,
}

impl Memory {
    fn find(boot: &Boot, options: &Options) -> Option<Self> {
        let pages = options.fill.0 / page::BYTES;
        let table = (pages * 4).next_multiple_of(page::BYTES);
        let (mut pieces, mut used, mut found) = ([(0, 0); 8], 0, 0);
        let mut generations: *mut u32 = core::ptr::null_mut();
        memory::free(boot, options.from.0, |mut base, end| {
            if generations.is_null() {
                if end - base < table {
                    return;
                }
                generations = base as *mut u32;
                base += table;
            }
            let count = ((end - base) / page::BYTES).min(pages - found);
            if let Some(piece) = pieces.get_mut(used).filter(|_| count > 0) {
                *piece = (base, count);
                used += 1;
                found += count;
            }
        });
        (pages > 0 && found == pages).then_some(Self {
            pieces,
            pages,
            generations,
        })
    }

    fn address(&self, page: u64) -> u64 {
        let mut index = page;
        for (base, count) in self.pieces {
            if index < count {
                return base + index * page::BYTES;
            }
            index -= count;
        }
        give_up(&"a page beyond the end")
    }

    /// The page and its generation. The contents may change at any time if the VMM errs, which is
    /// what the guest is there to find out.
    fn page(&mut self, page: u64) -> (&mut Page, &mut u32) {
        let address = self.address(page) as *mut Page;
        // SAFETY: RAM that is nobody else's, aligned, and borrowed as long as `self`; the table
        // has an entry for each page.
        unsafe { (&mut *address, &mut *self.generations.add(page as usize)) }
    }
}

struct Dirtier {
    options: Options,
    khz: u64,
    memory: Memory,
    working_set: u64,
    /// The next page in order, of the working set and of all.
    next: u64,
    next_sweep: u64,
    random: Random,
    written: u64,
    swept: u64,
    heartbeats: u64,
    turns: u64,
    errors: u64,
    longest_gap: u64,
    longest_back: u64,
    last_turn: u64,
    poll: Timer,
    beat: Timer,
    beats_to_poll: u32,
}

impl Dirtier {
    fn new(options: Options, khz: u64, memory: Memory) -> Self {
        let cycles = |microseconds: u64| microseconds * khz / 1000;
        Self {
            working_set: (options.ws.0 / page::BYTES).min(memory.pages),
            poll: Timer::new(if options.heartbeat == 0 {
                cycles(POLL_US)
            } else {
                0
            }),
            beat: Timer::new(cycles(options.heartbeat)),
            options,
            khz,
            memory,
            next: 0,
            next_sweep: 0,
            random: Random::new(0),
            written: 0,
            swept: 0,
            heartbeats: 0,
            turns: 0,
            errors: 0,
            longest_gap: 0,
            longest_back: 0,
            last_turn: 0,
            beats_to_poll: HEARTBEATS_PER_POLL,
        }
    }

    fn microseconds(&self, cycles: u64) -> u64 {
        (u128::from(cycles) * 1000 / u128::from(self.khz)) as u64
    }

    fn run(&mut self) -> ! {
        let begin = tsc::now();
        for number in 0..self.memory.pages {
            let data = self.options.data;
            let (page, generation) = self.memory.page(number);
            page::write(page, data, number, 1);
            *generation = 1;
        }
        let ready = Report::Ready {
            pages: self.memory.pages,
            working_set: self.working_set,
            address: Hex(self.memory.address(0)),
            fill_us: self.microseconds(tsc::now() - begin),
            tsc_khz: self.khz,
        };
        self.report(&ready);

        let per_second = |rate: u64| Timer::new((self.khz * 1000).checked_div(rate).unwrap_or(0));
        let mut write = match self.options.rate {
            Rate::PerSecond(rate) if self.working_set > 0 => per_second(rate),
            _ => Timer::new(0),
        };
        let always = self.options.rate == Rate::Max && self.working_set > 0;
        let mut sweep = per_second(self.options.sweep);
        let mut corrupt = self
            .options
            .corrupt
            .0
            .filter(|&page| page < self.memory.pages);
        let corrupt_at = self.last_turn + self.khz * 1000;
        let backlog = BACKLOG_US * self.khz / 1000;
        loop {
            let now = self.turn(&mut [&mut write, &mut sweep]);
            if always || write.fires(now, backlog) {
                self.rewrite_next();
            }
            if sweep.fires(now, backlog) {
                self.sweep_next();
            }
            if now >= corrupt_at
                && let Some(number) = corrupt.take()
            {
                self.memory.page(number).0[200] ^= 0x10;
            }
        }
    }

    /// What belongs into every turn: the gap, the heartbeat, commands. Gives the time.
    fn turn(&mut self, timers: &mut [&mut Timer]) -> u64 {
        let now = tsc::now();
        self.turns += 1;
        if now < self.last_turn {
            self.longest_back = self.longest_back.max(self.last_turn - now);
            for timer in timers
                .iter_mut()
                .map(|timer| &mut **timer)
                .chain([&mut self.beat, &mut self.poll])
            {
                timer.due = now;
            }
        } else {
            self.longest_gap = self.longest_gap.max(now - self.last_turn);
        }
        self.last_turn = now;
        if self.beat.fires(now, self.beat.interval / 2) {
            self.heartbeats += u64::from(serial::send_now(HEARTBEAT));
            self.beats_to_poll -= 1;
            if self.beats_to_poll == 0 {
                self.beats_to_poll = HEARTBEATS_PER_POLL;
                self.obey();
            }
        } else if self.poll.fires(now, 0) {
            self.obey();
        }
        now
    }

    fn obey(&mut self) {
        match serial::receive() {
            Some(command::VERIFY) => self.verify(),
            Some(command::STATUS) => {
                let status = Report::Status {
                    written: self.written,
                    swept: self.swept,
                    heartbeats: self.heartbeats,
                    turns: self.turns,
                    computed: COMPUTED.load(Ordering::Relaxed),
                    longest_gap_us: self.microseconds(self.longest_gap),
                    longest_back_us: self.microseconds(self.longest_back),
                    errors: self.errors,
                };
                (self.longest_gap, self.longest_back) = (0, 0);
                self.report(&status);
            }
            Some(command::QUIT) => power::off(),
            Some(command::RESET) => power::reset(),
            Some(command::TRIPLE_FAULT) => privileged::triple_fault(),
            _ => {}
        }
    }

    /// Sends a report; the time that it takes is no gap.
    fn report(&mut self, report: &dyn Display) {
        serial::line(report);
        self.last_turn = tsc::now();
    }

    fn rewrite_next(&mut self) {
        let number = match self.options.pattern {
            Pattern::Sequential => {
                let number = self.next;
                self.next = (number + 1) % self.working_set;
                number
            }
            Pattern::Random => self.random.below(self.working_set),
            Pattern::Hot => {
                let hot = self.random.below(10) != 0;
                self.random.below(if hot {
                    self.working_set.div_ceil(10)
                } else {
                    self.working_set
                })
            }
        };
        self.check(number);
        let data = self.options.data;
        let (page, generation) = self.memory.page(number);
        *generation = generation.wrapping_add(1);
        page::write(page, data, number, *generation);
        self.written += 1;
    }

    fn sweep_next(&mut self) {
        self.check(self.next_sweep);
        self.next_sweep = (self.next_sweep + 1) % self.memory.pages;
        self.swept += 1;
    }

    fn verify(&mut self) {
        let begin = tsc::now();
        let mut generations_sum = 0;
        // Commands are not looked for meanwhile, heartbeats go on.
        let beats_to_poll = core::mem::replace(&mut self.beats_to_poll, u32::MAX);
        let poll = core::mem::replace(&mut self.poll, Timer::new(0));
        self.last_turn = begin;
        for number in 0..self.memory.pages {
            self.turn(&mut []);
            self.check(number);
            generations_sum += u64::from(*self.memory.page(number).1);
        }
        (self.beats_to_poll, self.poll) = (beats_to_poll, poll);
        let verified = Report::Verified {
            pages: self.memory.pages,
            generations_sum,
            took_us: self.microseconds(tsc::now().saturating_sub(begin)),
            errors: self.errors,
        };
        self.report(&verified);
    }

    /// Compares a page with what was last written to it, reports and mends it if it differs.
    fn check(&mut self, number: u64) {
        let data = self.options.data;
        let (page, generation) = self.memory.page(number);
        let generation = *generation;
        if page::matches(page, data, number, generation) {
            return;
        }
        let difference = page::first_difference(page, data, number, generation);
        let older = (generation.saturating_sub(OLDER)..generation).rev();
        let found_generation = older.map(|older| (older, page::matches(page, data, number, older)));
        let found_generation = found_generation
            .filter(|(_, matches)| *matches)
            .map(|(older, _)| older.into())
            .next();
        let (index, expected) = difference.unwrap_or((0, 0));
        let found = page[index];
        page::write(page, data, number, generation);
        self.errors += 1;
        if self.errors <= REPORTED_ERRORS {
            let address = self.memory.address(number) + index as u64 * 8;
            self.report(&Report::Error {
                page: number,
                address: Hex(address),
                expected: Hex(expected),
                found: Hex(found),
                generation: generation.into(),
                found_generation: Maybe(found_generation),
            });
        }
    }
}
