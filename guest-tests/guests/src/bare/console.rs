//! What belongs into every turn of a guest that works all along: heartbeats, regular reports and
//! commands.

use super::serial;
use super::timer::Timer;
use crate::dirtier::HEARTBEAT;

/// µs between two looks for a command: a look costs as much as a heartbeat.
const LOOK_US: u64 = 5_000;

/// How often.
#[derive(Clone, Copy)]
pub struct Timing {
    /// The TSC's frequency.
    pub khz: u64,
    /// From one heartbeat to the next, in µs; 0: never.
    pub heartbeat_us: u64,
    /// From one regular report to the next, in ms; 0: never.
    pub interval_ms: u64,
}

/// The serial port, in a loop.
pub struct Console {
    beat: Timer,
    report: Timer,
    look: Timer,
    last: u64,
    /// Whether a look has made room for bytes since they ran out.
    full: bool,
}

impl Console {
    /// Begins.
    #[must_use]
    pub fn new(timing: Timing) -> Self {
        let Timing {
            khz,
            heartbeat_us,
            interval_ms,
        } = timing;
        let mut report = Timer::new(interval_ms * khz);
        report.due = super::tsc::now() + report.interval;
        Self {
            beat: Timer::new(heartbeat_us * khz / 1000),
            report,
            look: Timer::new(LOOK_US * khz / 1000),
            last: 0,
            full: false,
        }
    }

    /// Does what is due by the TSC: whether it is time for a report, and what was received.
    pub fn turn(&mut self, now: u64) -> (bool, Option<u8>) {
        if now < self.last {
            for timer in [&mut self.beat, &mut self.report, &mut self.look] {
                timer.due = now;
            }
        }
        self.last = now;
        if self.beat.fires(now, self.beat.interval / 2) {
            self.full = !serial::send_now(HEARTBEAT);
        }
        let byte = if self.full || self.look.fires(now, 0) {
            self.full = false;
            serial::receive()
        } else {
            None
        };
        (self.report.fires(now, 0), byte)
    }
}
