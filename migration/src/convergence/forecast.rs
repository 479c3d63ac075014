//! What a migration will be like, before it begins: rounds are played with the arithmetic that
//! decides in a real one.

use std::time::Duration;

use super::refinement::Refinement;
use super::{Convergence, Costs, Decision, PAGE_ON_WIRE, Rest, STRONG, seconds};
use crate::layout::PAGE_SIZE;

/// A migration that takes more rounds is taken not to converge.
const MOST_ROUNDS: u32 = 200;

/// The most that a guest is slowed down, in percent of its time.
const MOST_THROTTLE: u8 = 99;

/// A link that would have to be so many times faster is none that anybody has.
const MOST_SPEEDUP: f64 = 1e6;

/// A guest and the link that it is to take.
#[derive(Clone, Copy, Debug)]
pub struct Forecast {
    /// Bytes of memory that hold something: the first round.
    pub touched: u64,
    /// Bytes that it writes to in a second.
    pub dirty_rate: f64,
    /// Bytes of memory that it writes to at all; `None` if that is not known.
    pub written: Option<u64>,
    /// The link's bytes a second, more than 0.
    pub bandwidth: f64,
    /// How long the guest may be stopped.
    pub downtime_limit: Duration,
    /// What a stop costs beside moving memory.
    pub costs: Costs,
}

/// A migration as it will be if all stays as it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Course {
    /// Rounds with the guest running.
    pub rounds: u32,
    /// From the first page to the guest's first instruction at the destination.
    pub total: Duration,
    /// How long the guest is stopped.
    pub downtime: Duration,
}

/// What would make a migration converge, each by itself; `None` if it could not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remedy {
    /// The share of time in percent, 1 to 99, that the vCPUs are kept from running; as if a guest
    /// wrote less in proportion.
    pub throttle: Option<u8>,
    /// Bytes a second of the link.
    pub bandwidth: Option<f64>,
}

impl Forecast {
    /// How the migration goes; `None` if it doesn't converge.
    pub fn course(&self) -> Option<Course> {
        let state = self.state();
        let mut refinement = Refinement::default();
        let mut rest = self.touched.div_ceil(PAGE_SIZE);
        let mut total = Duration::ZERO;
        for rounds in 1..=MOST_ROUNDS {
            let time = seconds((rest * PAGE_ON_WIRE) as f64 / self.bandwidth);
            total = total.saturating_add(time);
            let dirtied = (self.dirty_rate * time.as_secs_f64()) as u64;
            let dirtied = dirtied.min(self.written.unwrap_or(u64::MAX));
            rest = dirtied.div_ceil(PAGE_SIZE).min(u64::MAX / PAGE_ON_WIRE);
            let left = Rest {
                pages: rest,
                block_bytes: 0,
            };
            match state.decide(left, self.downtime_limit, 0) {
                Decision::SwitchOver => {
                    let prospect = state.prospect(left, 0, total)?;
                    if !refinement.is_worth_a_round(prospect) {
                        let downtime = prospect.expected;
                        return Some(Course {
                            rounds,
                            total: total.saturating_add(downtime),
                            downtime,
                        });
                    }
                }
                Decision::AnotherRound => refinement.does_not_fit(),
                Decision::NeverFits => return None,
            }
        }
        None
    }

    /// How long the guest is stopped at least, with nothing left to send.
    pub fn least_downtime(&self) -> Duration {
        let least = self.state().expected_downtime(Rest::default(), 0);
        least.unwrap_or(Duration::MAX)
    }

    /// What would help, of a migration that doesn't converge.
    pub fn remedy(&self) -> Remedy {
        Remedy {
            throttle: (1..=MOST_THROTTLE).find(|percent| {
                let runs = 1.0 - f64::from(*percent) / 100.0;
                let slower = Self {
                    dirty_rate: self.dirty_rate * runs,
                    ..*self
                };
                slower.course().is_some()
            }),
            bandwidth: self.least_bandwidth(),
        }
    }

    /// The least bandwidth with which it converges, to a hundredth.
    fn least_bandwidth(&self) -> Option<f64> {
        let converges = |bandwidth| Self { bandwidth, ..*self }.course().is_some();
        let (mut low, mut high) = (self.bandwidth, self.bandwidth * 2.0);
        while !converges(high) {
            if high > self.bandwidth * MOST_SPEEDUP {
                return None;
            }
            (low, high) = (high, high * 2.0);
        }
        while high - low > low / 100.0 {
            let middle = (low + high) / 2.0;
            if converges(middle) {
                high = middle;
            } else {
                low = middle;
            }
        }
        Some(high)
    }

    /// What a migration would know that has measured all this.
    fn state(&self) -> Convergence {
        let mut state = Convergence {
            costs: self.costs,
            ..Convergence::default()
        };
        let pages = (self.dirty_rate / PAGE_SIZE as f64) as u64;
        let block_bytes = 0;
        state.dirtied(Rest { pages, block_bytes }, Duration::from_secs(1));
        let bytes = (self.bandwidth as u64).max(STRONG);
        let time = seconds(bytes as f64 / self.bandwidth);
        let bandwidth = &mut state.bandwidth;
        bandwidth.delivered(bytes, Duration::ZERO, time, Duration::ZERO);
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GBIT: f64 = 125e6;

    fn forecast(dirty_rate: f64, written: Option<u64>) -> Forecast {
        Forecast {
            touched: 512 * MIB,
            dirty_rate,
            written,
            bandwidth: GBIT,
            downtime_limit: Duration::from_millis(30),
            costs: Costs::default(),
        }
    }

    #[test]
    fn an_idle_guest_takes_one_round_and_the_fixed_costs() {
        let forecast = forecast(0.0, None);
        let course = forecast.course().unwrap();
        assert_eq!(course.rounds, 1);
        assert_eq!(course.downtime, forecast.least_downtime());
        // 512 MiB and 17 bytes for each of its pages, at 125 MB/s.
        let sending = (course.total - course.downtime).as_secs_f64();
        assert!((sending - 4.313).abs() < 0.001, "{sending}");
        let nothing = Forecast {
            touched: 0,
            ..forecast
        };
        assert!(nothing.course().unwrap().total < Duration::from_millis(10));
    }

    #[test]
    fn rounds_shrink_as_the_guest_writes_less_than_the_link_takes() {
        let half = forecast(GBIT / 2.0, None).course().unwrap();
        // 4.3 s, 2.2 s, …: a geometric series, down to 3 MB and, as it is cheap, some more.
        assert!((7..=14).contains(&half.rounds), "{half:?}");
        let total = half.total.as_secs_f64();
        assert!((8.4..8.7).contains(&total), "{half:?}");
        assert!(half.downtime <= Duration::from_millis(30));
        let fifth = forecast(GBIT / 5.0, None).course().unwrap();
        assert!(fifth.rounds < half.rounds && fifth.total < half.total);
    }

    #[test]
    fn a_guest_that_writes_faster_never_converges_unless_it_writes_to_little() {
        let all_over = forecast(2.0 * GBIT, None);
        assert_eq!(all_over.course(), None);
        assert_eq!(forecast(2.0 * GBIT, Some(64 * MIB)).course(), None);
        // 2 MiB fit in 30 ms.
        let few = forecast(2.0 * GBIT, Some(2 * MIB)).course().unwrap();
        assert!(few.downtime > Duration::from_millis(15), "{few:?}");
    }

    #[test]
    fn what_is_proposed_makes_it_converge_and_a_little_less_does_not() {
        let all_over = forecast(2.0 * GBIT, None);
        let Remedy {
            throttle: Some(throttle),
            bandwidth: Some(bandwidth),
        } = all_over.remedy()
        else {
            panic!("{:?}", all_over.remedy());
        };
        assert!((50..56).contains(&throttle), "{throttle}");
        assert!((2.0..2.2).contains(&(bandwidth / GBIT)), "{bandwidth}");
        let at = |percent: u8, bandwidth: f64| {
            let dirty_rate = 2.0 * GBIT * (1.0 - f64::from(percent) / 100.0);
            let course = Forecast {
                bandwidth,
                ..forecast(dirty_rate, None)
            }
            .course();
            course.is_some()
        };
        assert!(at(throttle, GBIT) && !at(throttle - 1, GBIT));
        assert!(at(0, bandwidth) && !at(0, bandwidth * 0.98));
    }

    #[test]
    fn a_limit_below_the_fixed_costs_is_met_by_nothing() {
        let strict = Forecast {
            downtime_limit: Duration::from_millis(1),
            ..forecast(0.0, None)
        };
        assert_eq!(strict.course(), None);
        assert!(strict.least_downtime() > Duration::from_millis(1));
        let none = Remedy {
            throttle: None,
            bandwidth: None,
        };
        assert_eq!(strict.remedy(), none);
    }

    #[test]
    fn odd_figures_do_no_harm() {
        for (touched, dirty_rate, bandwidth) in [
            (u64::MAX / 8192, 1e300, 1.0),
            (u64::MAX / 8192, 1.0, 1e18),
            (1, 0.0, 1e-3),
        ] {
            let odd = Forecast {
                touched,
                bandwidth,
                ..forecast(dirty_rate, None)
            };
            let _ = (odd.course(), odd.least_downtime());
        }
    }
}
