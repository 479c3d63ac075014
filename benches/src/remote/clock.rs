//! Relating the clocks of two hosts, as NTP does: from a question's round trip.

use std::time::Duration;

/// One question for the time. All count from any moment of the host's own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// When it was asked, here.
    pub(super) sent: Duration,
    /// The answer.
    pub(super) there: Duration,
    /// When that was read, here.
    pub(super) received: Duration,
}

/// How the clocks relate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Relation {
    /// The other clock's time when this one's was `here`.
    there: Duration,
    here: Duration,
    /// By how much that may be wrong: half of the round trip, if all of it was spent on one way.
    pub(super) uncertainty: Duration,
}

/// From the sample with the least round trip; `None` of none.
pub(super) fn relate(samples: &[Sample]) -> Option<Relation> {
    let trip = |sample: &&Sample| sample.received.saturating_sub(sample.sent);
    let best = samples.iter().min_by_key(trip)?;
    let half = trip(&best) / 2;
    Some(Relation {
        there: best.there,
        here: best.sent + half,
        uncertainty: half,
    })
}

impl Relation {
    /// When something was that happened at `there` by the other clock; 0 if that was before this
    /// host's times begin.
    pub(super) fn here(&self, there: Duration) -> Duration {
        match there.checked_sub(self.there) {
            Some(after) => self.here.saturating_add(after),
            None => self.here.saturating_sub(self.there.saturating_sub(there)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quickest_answer_tells_the_time() {
        let ms = Duration::from_millis;
        let sample = |sent, there, received| Sample {
            sent: ms(sent),
            there: ms(there),
            received: ms(received),
        };
        assert_eq!(relate(&[]), None);
        // The second answer was quick; the others were held up on one way or the other.
        let samples = [
            sample(0, 1018, 20),
            sample(30, 1031, 32),
            sample(40, 1041, 60),
        ];
        let relation = relate(&samples).unwrap();
        assert_eq!(relation.uncertainty, ms(1));
        assert_eq!(relation.here(ms(1031)), ms(31));
        assert_eq!(relation.here(ms(1500)), ms(500));
        assert_eq!(relation.here(ms(1010)), ms(10));
        assert_eq!(relation.here(ms(5)), ms(0));
    }
}
