//! Whether a rest that fits the downtime limit is worth another round: a few short rounds more
//! often make a stop of 25 ms one of 5.

use std::time::Duration;

/// The most rounds that are added.
const MOST: u32 = 12;

/// A round is added only if it is expected to take that share of the stop's variable part away.
const LEAST_GAIN: f64 = 0.2;

/// And if that is at least so much.
const LEAST_TIME: Duration = Duration::from_micros(500);

/// All of them together may take that share of the migration's time so far.
const SHARE: f64 = 0.1;

/// What is known at the end of a round whose rest fits.
#[derive(Clone, Copy, Debug)]
pub struct Prospect {
    /// The downtime if the guest were stopped now.
    pub expected: Duration,
    /// The same with nothing left to send: no round gets below that.
    pub least: Duration,
    /// How fast the guest dirties memory, as a share of how fast it is sent.
    pub pressure: f64,
    /// How long the migration has taken so far.
    pub elapsed: Duration,
}

/// The rounds that were added to a migration.
#[derive(Clone, Copy, Debug, Default)]
pub struct Refinement {
    rounds: u32,
    spent: Duration,
    /// The rest fitted and then did not: the next time that it does is taken.
    regretted: bool,
}

impl Refinement {
    /// The rest fits: whether to do another round all the same.
    pub fn is_worth_a_round(&mut self, prospect: Prospect) -> bool {
        let Prospect {
            expected,
            least,
            pressure,
            elapsed,
        } = prospect;
        let variable = expected.saturating_sub(least);
        let gain = 1.0 - pressure.clamp(0.0, 1.0);
        // A round takes as long as what it sends would have taken in the stop, and at least as long
        // as its answers: that is in what a stop costs at least, too.
        let spent = self.spent + expected;
        let worth = !self.regretted
            && self.rounds < MOST
            && gain >= LEAST_GAIN
            && variable.mul_f64(gain) >= LEAST_TIME
            && spent <= elapsed.mul_f64(SHARE);
        if worth {
            self.rounds += 1;
            self.spent = spent;
        }
        worth
    }

    /// The rest does not fit.
    pub fn does_not_fit(&mut self) {
        self.regretted |= self.rounds > 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn prospect(expected: u32, pressure: f64) -> Prospect {
        Prospect {
            expected: expected * MS,
            least: 2 * MS,
            pressure,
            elapsed: 2000 * MS,
        }
    }

    /// How long the stop is in the end, in ms, and how many rounds that took.
    fn refined(first: f64, pressure: f64) -> (f64, u32) {
        let mut refinement = Refinement::default();
        let mut variable = first;
        loop {
            let expected = 2 * MS + MS.mul_f64(variable);
            let prospect = Prospect {
                expected,
                ..prospect(0, pressure)
            };
            if !refinement.is_worth_a_round(prospect) {
                return (2.0 + variable, refinement.rounds);
            }
            variable *= pressure;
        }
    }

    #[test]
    fn a_few_short_rounds_make_the_stop_much_shorter() {
        let (stop, rounds) = refined(25.0, 0.6);
        assert!(stop < 8.0 && (2..=6).contains(&rounds), "{stop} {rounds}");
        let (stop, rounds) = refined(25.0, 0.1);
        assert!(stop < 3.0 && rounds <= 2, "{stop} {rounds}");
    }

    #[test]
    fn none_is_added_where_it_gains_little() {
        // The guest writes nearly as fast as the link sends.
        assert_eq!(refined(25.0, 0.95).1, 0);
        // There is hardly anything left.
        assert_eq!(refined(0.4, 0.1).1, 0);
        // A short migration is not made much longer.
        let mut refinement = Refinement::default();
        let short = Prospect {
            elapsed: 100 * MS,
            ..prospect(25, 0.5)
        };
        assert!(!refinement.is_worth_a_round(short));
    }

    #[test]
    fn who_has_passed_one_chance_up_takes_the_next() {
        let mut refinement = Refinement::default();
        // It had none to pass up.
        refinement.does_not_fit();
        assert!(refinement.is_worth_a_round(prospect(25, 0.5)));
        refinement.does_not_fit();
        assert!(!refinement.is_worth_a_round(prospect(25, 0.5)));
    }
}
