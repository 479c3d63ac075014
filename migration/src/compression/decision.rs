//! Whether compressing pages pays now, and how thoroughly, from what has been measured. Arithmetic
//! only; the measuring is done by the source.
//!
//! Sending and compressing take turns on one thread, while the link empties the socket's buffer at
//! its own pace. So pages move either as fast as they are compressed, or as fast as the link
//! takes what they are compressed to, whichever is less; and it pays if that is clearly
//! faster than sending them as they are.
//!
//! There are two ways to compress: a quick one, and a thorough one that gains more. As long as the
//! link has enough to do the sender has time to be thorough; if the link is about to run dry
//! it hurries. So it comes to a mix of both that keeps the link and the processor busy, whatever their
//! speeds and whoever else wants them.
//!
//! It begins with compressing. As long as the link is kept busy, what it takes is known, and so is
//! what it would take of pages as they are. If it never has enough to do, it
//! may be faster than anything that is compressed: then pages go as they are for a *window*,
//! and the two speeds are compared. While pages go as they are, a few are compressed now and
//! then, to notice that they have become worth it.

use std::time::Duration;

/// Compressed pages must move so many times faster than others: it also costs a processor at
/// either side.
const PAYS: f64 = 1.2;

/// How much is sent before it is judged.
const WINDOW_BYTES: u64 = 8 << 20;

/// Or how long, if the link is slow; for pages as they are, and for compressed ones.
const PLAIN_TIME: Duration = Duration::from_millis(25);
const WINDOW_TIME: Duration = Duration::from_millis(250);

/// What a window says counts so much, and what was known before the rest: in one of them the sender
/// may have been without a processor, or buffers may have filled.
const NEWEST: f64 = 0.25;

/// Pages that go as they are fill the buffers of both sockets first, which says nothing about the
/// link behind them: without a wait it is not judged before so much was sent.
const BUFFERS: u64 = 32 << 20;

/// If the sender waits for less than this part of the time, it was not held up by the link.
const WAITS: f64 = 0.1;

/// If the link has enough to do less often than this, it may be much faster than what it is given: a buffer
/// that is still small is full at times on any link.
const BUSY: f64 = 0.25;

/// While pages go as they are, a few are compressed so often; each time in vain, it is twice as
/// long to the next time, up to the limit.
const TRY_AFTER: Duration = Duration::from_millis(20);
const MAX_TRY_AFTER: Duration = Duration::from_millis(500);

/// Compressing pays though the link never has enough to do: it may have become faster, so
/// pages go as they are for a window each time that so much was compressed, then twice as much.
const PROBE_BYTES: u64 = 256 << 20;
const MAX_PROBE_BYTES: u64 = 4 << 30;

/// What was measured of some pages on their way out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Bytes of pages.
    pub input: u64,
    /// Bytes that were sent for them.
    pub output: u64,
    /// The time from the sample before, or from the beginning of the round, to this one's end.
    pub total: Duration,
    /// The processor's time for compressing: what others had of it meanwhile is not in it.
    pub compressing: Duration,
    /// Of `total`, waiting for the link, or for the limit of its bandwidth.
    pub waiting: Duration,
}

impl Sample {
    fn add(&mut self, other: &Self) {
        self.input += other.input;
        self.output += other.output;
        self.total += other.total;
        self.compressing += other.compressing;
        self.waiting += other.waiting;
    }

    fn is_window(&self, time: Duration) -> bool {
        self.input >= WINDOW_BYTES || self.total >= time
    }

    fn ratio(&self) -> f64 {
        self.input as f64 / self.output.max(1) as f64
    }

    fn rate(&self, bytes: u64) -> f64 {
        bytes as f64 / self.total.as_secs_f64().max(1e-9)
    }

    fn waited(&self) -> bool {
        !self.waiting.is_zero() && self.waiting.as_secs_f64() >= WAITS * self.total.as_secs_f64()
    }

    /// Seconds for each byte of pages, but for waiting and compressing.
    fn handling(&self) -> f64 {
        let busy = self.total.saturating_sub(self.waiting + self.compressing);
        busy.as_secs_f64() / self.input.max(1) as f64
    }

    fn squeezing(&self) -> f64 {
        self.compressing.as_secs_f64() / self.input.max(1) as f64
    }
}

/// How to compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effort {
    /// Little time for a page.
    #[default]
    Quick,
    /// As few bytes for a page as the user has asked for.
    Thorough,
}

/// How the next pages are to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// As they are.
    Plain,
    /// Compressed.
    Compressed(Effort),
    /// Compressed, but only a few: to see whether it would pay.
    Try(Effort),
}

impl Plan {
    /// How they are compressed; `None` if they go as they are.
    pub fn effort(self) -> Option<Effort> {
        match self {
            Self::Plain => None,
            Self::Compressed(effort) | Self::Try(effort) => Some(effort),
        }
    }
}

/// What is known, and what follows from it.
#[derive(Clone, Debug)]
pub struct Decision {
    compressing: bool,
    /// What has been sent since the last judgement, in the present way.
    window: Sample,
    /// How often in the window the link had enough to do, and how often it was looked at.
    busy: (u32, u32),
    /// How many bytes of pages a second move compressed; `None` until that is known.
    speed: Option<f64>,
    /// How many bytes a second the link takes; `None` until that is known.
    link: Option<f64>,
    /// Whether the sender had to wait with the last pages.
    waited: bool,
    /// How long pages go as they are before a few are compressed.
    until_try: Duration,
    try_after: Duration,
    /// Tries take turns between the two.
    try_effort: Effort,
    /// How much is compressed before the other way is looked at.
    until_probe: u64,
    probe_after: u64,
    /// Present while pages go as they are only to see how fast that is.
    probe: Option<Probe>,
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    /// Bytes of pages a second that moved compressed.
    speed: f64,
    /// Whether the sender has had to wait: the buffers are full.
    filled: bool,
}

impl Default for Decision {
    fn default() -> Self {
        Self {
            compressing: true,
            window: Sample::default(),
            busy: (0, 0),
            speed: None,
            link: None,
            waited: false,
            until_try: TRY_AFTER,
            try_after: TRY_AFTER,
            try_effort: Effort::default(),
            until_probe: 0,
            probe_after: PROBE_BYTES,
            probe: None,
        }
    }
}

impl Decision {
    /// How to send what comes next. `room` is whether the socket would take more now: if not, the link
    /// has enough to do for a while.
    pub fn plan(&mut self, room: bool) -> Plan {
        let busy = !room || self.waited;
        if self.compressing {
            self.busy.0 += u32::from(busy);
            self.busy.1 += 1;
            Plan::Compressed(if busy {
                Effort::Thorough
            } else {
                Effort::Quick
            })
        } else if self.tries() {
            Plan::Try(self.try_effort)
        } else {
            Plan::Plain
        }
    }

    fn tries(&self) -> bool {
        self.until_try.is_zero() && self.probe.is_none()
    }

    /// Whether pages are compressed, tries left aside.
    pub fn compresses(&self) -> bool {
        self.compressing
    }

    /// Pages were sent as [`plan`](Self::plan) said.
    pub fn sent(&mut self, sample: &Sample) {
        self.waited = sample.waited();
        if self.compressing {
            self.until_probe = self.until_probe.saturating_sub(sample.input);
            self.window.add(sample);
            if self.window.is_window(WINDOW_TIME) {
                self.judge_compressed();
            }
        } else if self.tries() {
            self.tried(sample);
        } else {
            self.until_try = self.until_try.saturating_sub(sample.total);
            self.window.add(sample);
            match &mut self.probe {
                Some(probe) if !probe.filled && !sample.waiting.is_zero() => {
                    probe.filled = true;
                    self.window = Sample::default();
                }
                Some(probe) if !probe.filled && self.window.input < BUFFERS => {}
                _ if self.window.is_window(PLAIN_TIME) => self.judge_plain(),
                _ => {}
            }
        }
    }

    fn judge_compressed(&mut self) {
        let window = std::mem::take(&mut self.window);
        let (times, looks) = std::mem::take(&mut self.busy);
        let busy = f64::from(times) >= BUSY * f64::from(looks) || window.waited();
        let speed = mixed(self.speed, window.rate(window.input));
        self.speed = Some(speed);
        let output = window.rate(window.output);
        if busy {
            self.link = Some(mixed(self.link, output));
            self.probe_after = PROBE_BYTES;
            self.until_probe = PROBE_BYTES;
        } else {
            // It takes at least that, unless a buffer does.
            self.link = self.link.map(|link| mixed(Some(link), output.max(link)));
        }
        if self.link.is_some_and(|link| speed < PAYS * link) || window.ratio() < PAYS {
            self.stop();
        } else if busy {
            self.try_after = TRY_AFTER;
        } else if self.until_probe == 0 {
            let filled = false;
            self.probe = Some(Probe { speed, filled });
            self.compressing = false;
        }
    }

    fn judge_plain(&mut self) {
        let window = std::mem::take(&mut self.window);
        let link = window.rate(window.input);
        self.link = Some(link);
        let Some(Probe { speed, .. }) = self.probe.take() else {
            return;
        };
        if speed >= PAYS * link {
            self.begin(speed);
            self.try_after = TRY_AFTER;
            self.probe_after = (2 * self.probe_after).min(MAX_PROBE_BYTES);
        } else {
            self.stop();
        }
    }

    /// A few pages were compressed while the others are not.
    fn tried(&mut self, sample: &Sample) {
        self.until_try = self.try_after;
        let Some(link) = self.link else {
            return;
        };
        self.try_effort = match self.try_effort {
            Effort::Quick => Effort::Thorough,
            Effort::Thorough => Effort::Quick,
        };
        // What it costs to handle a page besides is known from the window that is under way; the
        // sample is too short to say what the link takes.
        let handling = if self.window.input > 0 {
            self.window.handling()
        } else {
            sample.handling()
        };
        let computed = 1.0 / (sample.squeezing() + handling).max(1e-12);
        let speed = computed.min(link * sample.ratio());
        if speed >= PAYS * link {
            self.begin(speed);
        } else {
            self.wait_longer();
        }
    }

    fn begin(&mut self, speed: f64) {
        self.compressing = true;
        self.speed = Some(speed);
        self.window = Sample::default();
        self.until_probe = self.probe_after;
    }

    fn stop(&mut self) {
        self.compressing = false;
        self.wait_longer();
    }

    fn wait_longer(&mut self) {
        self.until_try = self.try_after;
        self.try_after = (2 * self.try_after).min(MAX_TRY_AFTER);
    }
}

/// What is known, with what a new window says.
fn mixed(known: Option<f64>, new: f64) -> f64 {
    known.map_or(new, |known| known + NEWEST * (new - known))
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
