//! vCPUs that keep known values in every register. See `guests::state`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the entry point has a fixed symbol")]

mod devices;
mod registers;
mod system;

use core::fmt::Arguments;
use core::sync::atomic::{AtomicU64, Ordering};

use devices::{Board, Lapic};
use guests::bare::boot::Boot;
use guests::bare::cpu::Cpu;
use guests::bare::{give_up, power, privileged, pvclock, serial, smp, tsc};
use guests::state::{Options, Report, Spoil, command};
use guests::{Hex, Name};
use registers::Registers;
use system::System;

guests::guest!(pvh, main);

/// Turns of the loop that keeps the registers: about half a millisecond.
const TURNS: u64 = 1_000_000;
/// Rounds between two looks at CPL 0 and the devices, which take about a millisecond.
const ROUNDS_PER_CHECK: u64 = 16;
/// A round that takes longer than this many ms was a stop; no ticks can be expected of it.
const STOP_MS: u64 = 100;

/// Changed values that are reported of a vCPU; there are fewer to compare.
const NAMES: usize = 256;

/// For the second vCPUs: the options that they need.
static KHZ: AtomicU64 = AtomicU64::new(0);
static INTERVAL: AtomicU64 = AtomicU64::new(0);
/// vCPUs that have set everything.
static SET: AtomicU64 = AtomicU64::new(0);

fn main(boot: &Boot) -> ! {
    let options = match Options::parse(boot.command_line()) {
        Ok(options) => options,
        Err(reason) => give_up(&reason),
    };
    let Some(khz) = tsc::frequency(options.tsc_khz) else {
        give_up(&"no source for the TSC's frequency: give tsc_khz=");
    };
    KHZ.store(khz, Ordering::SeqCst);
    INTERVAL.store(options.interval, Ordering::SeqCst);
    let running = smp::start(khz, options.cpus, |cpu| work(cpu, Spoil::Nothing));
    if running < options.cpus {
        give_up(&format_args!(
            "only {running} of cpus={} came",
            options.cpus
        ));
    }
    while SET.load(Ordering::SeqCst) + 1 < running {
        core::hint::spin_loop();
    }
    serial::line(&Report::Ready {
        cpus: running,
        vectors: system::vectors(),
        tsc_khz: khz,
    });
    work(Cpu::nth(0), options.spoil)
}

/// Reports what changes, each name once, as far as there is room to remember it.
pub(crate) struct Log {
    cpu: u64,
    changed: u64,
    names: [Name; NAMES],
}

impl Log {
    fn compare(&mut self, name: Arguments<'_>, expected: u64, found: u64) {
        if expected == found {
            return;
        }
        let name = Name::of(name);
        if self.names.contains(&name) {
            return;
        }
        if let Some(slot) = self.names.get_mut(self.changed as usize) {
            *slot = name;
            serial::line(&Report::Changed {
                cpu: self.cpu,
                name,
                expected: Hex(expected),
                found: Hex(found),
            });
            self.changed += 1;
        }
    }

    /// Compares the lanes of a vector register; the first that differs is reported.
    fn compare_lanes(&mut self, name: Arguments<'_>, expected: &[u64], found: &[u64]) {
        if let Some((expected, found)) = expected
            .iter()
            .zip(found)
            .find(|(expected, found)| expected != found)
        {
            self.compare(name, *expected, *found);
        }
    }

    fn skip(&self, name: Arguments<'_>) {
        serial::line(&Report::Skipped {
            cpu: self.cpu,
            name: Name::of(name),
        });
    }
}

fn work(cpu: Cpu, spoil: Spoil) -> ! {
    let (khz, interval) = (KHZ.load(Ordering::SeqCst), INTERVAL.load(Ordering::SeqCst));
    let number = cpu.index() as u64;
    let mut log = Log {
        cpu: number,
        changed: 0,
        names: [Name::default(); NAMES],
    };
    // FS and GS point to these.
    let words = [0xf5f5_0000 + number, 0x6565_0000 + number];
    let segments = [&raw const words[0] as u64, &raw const words[1] as u64];
    let mut clock = pvclock::Page::default();
    let system = System::set(number, segments, &raw mut clock as u64, &mut log);
    let mut board = (number == 0).then(|| Board::set(cpu, khz, &mut log));
    let mut lapic = Lapic::set(cpu, khz);
    // CR8 is the task priority, set by now.
    let system = system.with_current_priority();
    let vectors = system::vectors();
    privileged::interrupts(true);
    SET.fetch_add(1, Ordering::SeqCst);

    let (mut loaded, mut stored) = (Registers::zero(), Registers::zero());
    let (mut rounds, mut checks, mut longest) = (0, 0, 0);
    let begin = tsc::now();
    let mut next_report = begin + interval * khz;
    let mut spoil = Some(spoil).filter(|&spoil| spoil != Spoil::Nothing);
    let mut stopped = false;
    loop {
        let round_begin = tsc::now();
        loaded.fill(number, rounds, words);
        loaded.keep(vectors, TURNS, &mut stored);
        if tsc::now() > begin + 1000 * khz
            && let Some(what) = spoil.take()
        {
            ruin(what, &mut stored);
        }
        loaded.compare(&stored, vectors, &mut log);
        rounds += 1;
        let round = tsc::now().saturating_sub(round_begin);
        longest = longest.max(round);
        stopped |= round > STOP_MS * khz;
        if rounds % ROUNDS_PER_CHECK == 0 {
            system.compare(&mut log);
            lapic.compare(stopped, &mut log);
            if let Some(board) = &mut board {
                board.compare(stopped, &mut log);
                if serial::receive() == Some(command::QUIT) {
                    power::off();
                }
            }
            checks += 1;
            stopped = false;
        }
        let now = tsc::now();
        if now >= next_report || next_report - now > 2 * interval * khz {
            next_report = now + interval * khz;
            serial::line(&Report::Ok {
                cpu: number,
                rounds,
                checks,
                lapic_ticks: lapic.ticks(),
                pit_ticks: board.as_ref().map_or(0, Board::pit_ticks),
                longest_round_us: longest * 1000 / khz,
                changed: log.changed,
            });
            longest = 0;
        }
    }
}

fn ruin(what: Spoil, stored: &mut Registers) {
    match what {
        Spoil::Nothing => {}
        Spoil::General => stored.spoil_general(),
        Spoil::Vector => stored.spoil_vector(),
        Spoil::Msr => system::spoil_msr(),
        Spoil::Debug => system::spoil_debug(),
        Spoil::Lapic => devices::spoil_lapic(),
        Spoil::Pit => devices::spoil_pit(),
        Spoil::Pic => devices::spoil_pic(),
        Spoil::IoApic => devices::spoil_ioapic(),
        Spoil::Serial => devices::spoil_serial(),
    }
}
