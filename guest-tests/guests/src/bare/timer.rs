//! Things to do at an interval.

/// Something to do at an interval, in whatever unit the caller counts time in.
#[derive(Clone, Copy)]
pub struct Timer {
    /// 0: never.
    pub interval: u64,
    /// When it is due next.
    pub due: u64,
}

impl Timer {
    /// One that is due at once.
    #[must_use]
    pub fn new(interval: u64) -> Self {
        Self { interval, due: 0 }
    }

    /// Whether it is time. The next time stays on the grid of intervals, unless this one is more
    /// than `backlog` late.
    pub fn fires(&mut self, now: u64, backlog: u64) -> bool {
        if self.interval == 0 || now < self.due {
            return false;
        }
        self.due = self.due.max(now.saturating_sub(backlog)) + self.interval;
        true
    }
}
