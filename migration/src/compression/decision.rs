//! Whether compressing pages pays now, from what has been measured. Arithmetic only; the measuring
//! is done by the source.
//!
//! Sending and compressing take turns on one thread, while the link empties the socket's buffer at
//! its own pace. So pages move either as fast as they are compressed, or as fast as the link
//! takes what they are compressed to, whichever is less; and it pays if that is clearly
//! faster than sending them as they are.
//!
//! It begins with compressing. As long as the sender has to wait for the link, what the link takes
//! is known, and so is what it would take of pages as they are. If it never waits, the
//! link may be faster than anything that is compressed: then pages go as they are for a *window*,
//! and the two speeds are compared. While pages go as they are, a few are compressed now and
//! then, to notice that they have become worth it.

use std::time::Duration;

/// Compressed pages must move so many times faster than others: it also costs a processor at
/// either side.
const PAYS: f64 = 1.2;

/// How much is sent before it is judged.
const WINDOW_BYTES: u64 = 8 << 20;

/// Or how long, if the link is slow.
const WINDOW_TIME: Duration = Duration::from_millis(250);

/// Pages that go as they are fill the buffers of both sockets first, which says nothing about the
/// link behind them: without a wait it is not judged before so much was sent.
const BUFFERS: u64 = 32 << 20;

/// If the sender waits for less than this part of the time, it was not held up by the link.
const WAITS: f64 = 0.1;

/// While pages go as they are, a few are compressed each time that so much was sent; each time
/// in vain, it is twice as much the next time, up to the limit.
const TRY_BYTES: u64 = 32 << 20;
const MAX_TRY_BYTES: u64 = 128 << 20;

/// Compressing pays though the sender never waits for the link: the link may have become faster, so
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
    /// Of that, compressing.
    pub compressing: Duration,
    /// Of that, waiting for the link, or for the limit of its bandwidth.
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

    fn is_window(&self) -> bool {
        self.input >= WINDOW_BYTES || self.total >= WINDOW_TIME
    }

    fn ratio(&self) -> f64 {
        self.input as f64 / self.output.max(1) as f64
    }

    fn rate(&self, bytes: u64) -> f64 {
        bytes as f64 / self.total.as_secs_f64().max(1e-9)
    }

    fn waited(&self) -> bool {
        self.waiting.as_secs_f64() >= WAITS * self.total.as_secs_f64()
    }

    /// Seconds of the processor for each byte of pages, but for compressing.
    fn handling(&self) -> f64 {
        let busy = self.total.saturating_sub(self.waiting + self.compressing);
        busy.as_secs_f64() / self.input.max(1) as f64
    }

    fn squeezing(&self) -> f64 {
        self.compressing.as_secs_f64() / self.input.max(1) as f64
    }
}

/// How the next pages are to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// As they are.
    Plain,
    /// Compressed.
    Compressed,
    /// Compressed, but only a few: to see whether it would pay.
    Try,
}

/// What is known, and what follows from it.
#[derive(Clone, Debug)]
pub struct Decision {
    compressing: bool,
    /// What has been sent since the last judgement, in the present way.
    window: Sample,
    /// How many bytes of pages a second would move as they are; `None` until that is known.
    plain: Option<f64>,
    /// What is sent before the other way is looked at.
    until_try: u64,
    try_after: u64,
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
            plain: None,
            until_try: TRY_BYTES,
            try_after: TRY_BYTES,
            until_probe: 0,
            probe_after: PROBE_BYTES,
            probe: None,
        }
    }
}

impl Decision {
    /// How to send what comes next.
    pub fn plan(&self) -> Plan {
        if self.compressing {
            Plan::Compressed
        } else if self.until_try == 0 && self.probe.is_none() {
            Plan::Try
        } else {
            Plan::Plain
        }
    }

    /// Whether pages are compressed, tries left aside.
    pub fn compresses(&self) -> bool {
        self.compressing
    }

    /// Pages were sent as [`plan`](Self::plan) said.
    pub fn sent(&mut self, sample: &Sample) {
        match self.plan() {
            Plan::Try => self.tried(sample),
            Plan::Compressed => {
                self.until_probe = self.until_probe.saturating_sub(sample.input);
                self.window.add(sample);
                if self.window.is_window() {
                    self.judge_compressed();
                }
            }
            Plan::Plain => {
                self.until_try = self.until_try.saturating_sub(sample.input);
                self.window.add(sample);
                match &mut self.probe {
                    Some(probe) if !probe.filled && !sample.waiting.is_zero() => {
                        probe.filled = true;
                        self.window = Sample::default();
                    }
                    Some(probe) if !probe.filled && self.window.input < BUFFERS => {}
                    _ if self.window.is_window() => self.judge_plain(),
                    _ => {}
                }
            }
        }
    }

    fn judge_compressed(&mut self) {
        let window = std::mem::take(&mut self.window);
        let speed = window.rate(window.input);
        if window.waited() {
            let link = window.rate(window.output);
            self.plain = Some(link);
            self.probe_after = PROBE_BYTES;
            self.until_probe = PROBE_BYTES;
            if speed < PAYS * link {
                self.stop();
            } else {
                self.try_after = TRY_BYTES;
            }
            return;
        }
        // The link takes at least that.
        let least = window.rate(window.output);
        self.plain = self.plain.map(|plain| plain.max(least));
        if self.plain.is_some_and(|plain| speed < PAYS * plain) || window.ratio() < PAYS {
            self.stop();
        } else if self.until_probe == 0 {
            let filled = false;
            self.probe = Some(Probe { speed, filled });
            self.compressing = false;
        }
    }

    fn judge_plain(&mut self) {
        let window = std::mem::take(&mut self.window);
        let plain = window.rate(window.input);
        self.plain = Some(plain);
        let Some(Probe { speed, .. }) = self.probe.take() else {
            return;
        };
        if speed >= PAYS * plain {
            self.compressing = true;
            self.try_after = TRY_BYTES;
            self.until_probe = self.probe_after;
            self.probe_after = (2 * self.probe_after).min(MAX_PROBE_BYTES);
        } else {
            self.stop();
        }
    }

    /// A few pages were compressed while the others are not.
    fn tried(&mut self, sample: &Sample) {
        self.until_try = self.try_after;
        let Some(plain) = self.plain else {
            return;
        };
        // What it costs to handle a page besides is known from the window that is under way; the
        // sample is too short to say what the link takes.
        let handling = if self.window.input > 0 {
            self.window.handling()
        } else {
            sample.handling()
        };
        let computed = 1.0 / (sample.squeezing() + handling).max(1e-12);
        if computed.min(plain * sample.ratio()) >= PAYS * plain {
            self.compressing = true;
            self.window = Sample::default();
            self.until_probe = self.probe_after;
        } else {
            self.try_after = (2 * self.try_after).min(MAX_TRY_BYTES);
            self.until_try = self.try_after;
        }
    }

    fn stop(&mut self) {
        self.compressing = false;
        self.until_try = self.try_after;
        self.try_after = (2 * self.try_after).min(MAX_TRY_BYTES);
    }
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
