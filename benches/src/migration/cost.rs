//! What a migration costs: CPU time of the host, and the guest's own work.

use serde::Serialize;

use crate::end::Work;
use crate::proc::Cpu;

/// CPU time of both processes, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CpuTime {
    /// All of it.
    pub all: f64,
    /// Without that of the vCPUs' threads, which is the guest's where it never sleeps.
    pub beside_vcpus: f64,
}

/// From what both ends had used before and after.
pub(super) fn cpu(before: [Cpu; 2], after: [Cpu; 2]) -> CpuTime {
    let used = |of: fn(&Cpu) -> f64| -> f64 {
        let each = before.iter().zip(&after);
        each.map(|(before, after)| of(after) - of(before)).sum()
    };
    let all = used(|cpu| cpu.all);
    CpuTime {
        all,
        beside_vcpus: all - used(|cpu| cpu.vcpus),
    }
}

/// What the guest did in a second of the migration, the stop included, by what it did in one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct GuestWork {
    /// Turns of its loop: what it got of its CPU.
    pub turns: Option<f64>,
    /// Pages rewritten, if it rewrites any: up to 1 at a set rate, even if little else is left.
    pub written: Option<f64>,
}

/// From what the guest had done a while before, when the migration began, and when it was over.
pub(super) fn of(quiet: Work, before: Work, after: Work) -> GuestWork {
    let ratio = |count: fn(&Work) -> u64| {
        let rate = |from: &Work, to: &Work| {
            let time = to.at.saturating_duration_since(from.at).as_secs_f64();
            count(to).saturating_sub(count(from)) as f64 / time
        };
        let ratio = rate(&before, &after) / rate(&quiet, &before);
        ratio.is_finite().then_some(ratio)
    };
    GuestWork {
        turns: ratio(|work| work.turns),
        written: ratio(|work| work.written),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn work_is_by_the_second() {
        let start = Instant::now();
        let work = |ms, turns, written| Work {
            at: start + Duration::from_millis(ms),
            turns,
            written,
        };
        let cost = of(work(0, 0, 7), work(500, 1000, 7), work(2500, 2000, 7));
        assert_eq!(
            cost,
            GuestWork {
                turns: Some(0.25),
                written: None
            }
        );
    }

    #[test]
    fn the_guests_time_is_taken_off_on_both_sides() {
        let cpu_of = |all, vcpus| Cpu { all, vcpus };
        let used = cpu(
            [cpu_of(10.0, 9.0), cpu_of(0.5, 0.0)],
            [cpu_of(13.0, 11.0), cpu_of(1.5, 0.25)],
        );
        assert_eq!(
            used,
            CpuTime {
                all: 4.0,
                beside_vcpus: 1.75
            }
        );
    }
}
