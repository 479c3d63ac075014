//! vCPUs that read their clocks all the time, and report steps back. See `guests::clock`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "reads the TSC in order")]

use core::arch::x86_64::_mm_lfence;
use core::sync::atomic::{AtomicU64, Ordering};

use guests::Maybe;
use guests::bare::boot::Boot;
use guests::bare::cpu::Cpu;
use guests::bare::{give_up, power, privileged, pvclock, serial, smp, tsc};
use guests::clock::{Clock, Options, Report, command};

guests::guest!(pvh, main);

/// Steps back that are reported; all are counted.
const REPORTED: u64 = 100;

/// As many as `Clock` has.
const CLOCKS: usize = 3;
const TSC: usize = Clock::Tsc as usize;
const TSC0: usize = Clock::Tsc0 as usize;
const KVMCLOCK: usize = Clock::Kvmclock as usize;

/// For the second vCPUs: the TSC's frequency in kHz.
static KHZ: AtomicU64 = AtomicU64::new(0);
/// The latest time that any vCPU has read, by clock.
static LATEST: [AtomicU64; CLOCKS] = [const { AtomicU64::new(0) }; CLOCKS];
/// The longest step on a vCPU since the last report, by clock, in cycles and ns.
static LONGEST_STEP: [AtomicU64; CLOCKS] = [const { AtomicU64::new(0) }; CLOCKS];
static READINGS: AtomicU64 = AtomicU64::new(0);
static STEPS_BACK: AtomicU64 = AtomicU64::new(0);

fn main(boot: &Boot) -> ! {
    let options = match Options::parse(boot.command_line()) {
        Ok(options) => options,
        Err(reason) => give_up(&reason),
    };
    let Some(khz) = tsc::frequency(options.tsc_khz) else {
        give_up(&"no source for the TSC's frequency: give tsc_khz=");
    };
    KHZ.store(khz, Ordering::SeqCst);
    let mut page = pvclock::Page::default();
    let mut clocks = Clocks::start(Cpu::nth(0), &mut page);
    let stable = clocks
        .kvmclock
        .as_ref()
        .is_some_and(pvclock::Clock::is_stable);
    let running = smp::start(khz, options.cpus, second);
    if running < options.cpus {
        give_up(&format_args!(
            "only {running} of cpus={} came",
            options.cpus
        ));
    }
    serial::line(&Report::Ready {
        cpus: running,
        tsc_khz: khz,
        kvmclock: clocks.kvmclock.is_some(),
        stable,
    });
    clocks.forget_steps();

    let mut next_poll = 0;
    let mut next_report = tsc::now().saturating_add(options.interval * khz);
    loop {
        clocks.read();
        let now = clocks.last[TSC];
        // A TSC that goes back must not silence the guest: what is due far ahead is due now.
        if now < next_poll && next_poll - now < 2 * khz {
            continue;
        }
        next_poll = now + khz;
        let mut wanted = options.interval > 0
            && (now >= next_report || next_report - now > 2 * options.interval * khz);
        match serial::receive() {
            Some(command::CLOCKS) => wanted = true,
            Some(command::QUIT) => power::off(),
            _ => {}
        }
        if wanted {
            next_report = now + options.interval * khz;
            let longest =
                [TSC, KVMCLOCK].map(|clock| LONGEST_STEP[clock].swap(0, Ordering::Relaxed));
            clocks.next_privileged = 0;
            clocks.read();
            serial::line(&Report::Clocks {
                tsc: clocks.last[TSC],
                tsc0: clocks.last[TSC0],
                kvmclock: Maybe(clocks.kvmclock.is_some().then_some(clocks.last[KVMCLOCK])),
                longest_step_us: longest[0] * 1000 / khz,
                longest_kvmclock_step_us: longest[1] / 1000,
                readings: READINGS.load(Ordering::Relaxed),
                steps_back: STEPS_BACK.load(Ordering::Relaxed),
            });
            clocks.forget_steps();
        }
    }
}

fn second(cpu: Cpu) -> ! {
    let mut page = pvclock::Page::default();
    let mut clocks = Clocks::start(cpu, &mut page);
    loop {
        clocks.read();
    }
}

/// The clocks of a vCPU.
struct Clocks<'a> {
    cpu: u64,
    kvmclock: Option<pvclock::Clock<'a>>,
    /// The last readings; 0: none to compare with.
    last: [u64; CLOCKS],
    fresh: bool,
    /// When to read the TSC at CPL 0 again.
    next_privileged: u64,
    khz: u64,
}

impl<'a> Clocks<'a> {
    fn start(cpu: Cpu, page: &'a mut pvclock::Page) -> Self {
        let kvmclock = pvclock::offered().then(|| pvclock::Clock::start(page));
        Self {
            cpu: cpu.index() as u64,
            kvmclock,
            last: [0; CLOCKS],
            fresh: true,
            next_privileged: 0,
            khz: KHZ.load(Ordering::SeqCst),
        }
    }

    /// Lets the next step not count: a report took its time.
    fn forget_steps(&mut self) {
        self.fresh = true;
    }

    fn read(&mut self) {
        self.compare(Clock::Tsc, true, |_| tsc::now());
        let stable = self.kvmclock.as_ref().map(pvclock::Clock::is_stable);
        if let Some(stable) = stable {
            self.compare(Clock::Kvmclock, stable, |clocks| {
                clocks.kvmclock.as_ref().map_or(0, pvclock::Clock::now)
            });
        }
        let now = self.last[TSC];
        if now >= self.next_privileged || self.next_privileged - now > 2 * self.khz {
            self.next_privileged = now + self.khz;
            self.compare(Clock::Tsc0, true, |_| privileged::rdtsc());
        }
        self.fresh = false;
        READINGS.fetch_add(1, Ordering::Relaxed);
    }

    fn compare(&mut self, clock: Clock, among_all: bool, read: impl Fn(&Self) -> u64) {
        let index = clock as usize;
        // What another vCPU had read must be known before this one reads, and reading must not
        // begin before that: an interrupt in between only makes this reading later.
        let latest = LATEST[index].load(Ordering::SeqCst);
        // SAFETY: LFENCE is part of SSE2. It orders RDTSC after the load, and before what follows.
        unsafe { _mm_lfence() };
        let now = read(self);
        // SAFETY: as above.
        unsafe { _mm_lfence() };
        let last = core::mem::replace(&mut self.last[index], now);
        let before = if among_all { latest.max(last) } else { last };
        if now < before {
            // The others are not to report the same again and again: they go on from here.
            LATEST[index].store(now, Ordering::SeqCst);
            if STEPS_BACK.fetch_add(1, Ordering::Relaxed) < REPORTED {
                let same_cpu = now < last;
                serial::line(&Report::Back {
                    clock,
                    cpu: self.cpu,
                    same_cpu,
                    before,
                    after: now,
                });
                self.fresh = true;
            }
            return;
        }
        if !self.fresh {
            LONGEST_STEP[index].fetch_max(now - last, Ordering::Relaxed);
        }
        LATEST[index].fetch_max(now, Ordering::SeqCst);
    }
}
