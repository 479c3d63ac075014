//! How a migration converges, round by round.

use std::time::Instant;

use serde::Serialize;
use serde_json::Value;

/// One round over the guest's memory. The last one is sent while the guest stands still.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Round {
    /// From 1.
    pub number: u64,
    /// When it began, in ms from the command on.
    pub begin: f64,
    /// How long it took, in ms.
    pub time: f64,
    /// Bytes of memory that were left to send when it began, zero pages included.
    pub to_send: u64,
    /// Bytes that were sent in it.
    pub sent: u64,
    /// Bytes of memory that were left when it had ended, because the guest had written them
    /// meanwhile; `None` of the last one.
    pub dirtied: Option<u64>,
}

/// Rounds as they can be seen from outside, for a VMM that does not tell them: `query-migrate` is
/// asked when a pass begins.
#[derive(Debug)]
pub(super) struct Passes {
    start: Instant,
    /// Bytes of the guest's memory, as soon as they are told.
    total: u64,
    seen: Vec<Pass>,
}

#[derive(Clone, Copy, Debug)]
struct Pass {
    at: f64,
    remaining: u64,
    transferred: u64,
}

impl Passes {
    pub(super) fn new(start: Instant) -> Self {
        Self {
            start,
            total: 0,
            seen: Vec::new(),
        }
    }

    /// A pass began at that time; `info` is what `query-migrate` said right then.
    pub(super) fn begin(&mut self, at: Instant, info: &Value) {
        let number = |name: &str| info["ram"][name].as_u64().unwrap_or_default();
        self.total = self.total.max(number("total"));
        self.seen.push(Pass {
            at: super::ms(at.saturating_duration_since(self.start)),
            remaining: number("remaining"),
            transferred: number("transferred"),
        });
    }

    /// The rounds of a migration that ended then, after so many bytes.
    pub(super) fn rounds(&self, end: Instant, transferred: u64) -> Vec<Round> {
        let end = Pass {
            at: super::ms(end.saturating_duration_since(self.start)),
            remaining: 0,
            transferred,
        };
        let next = self.seen.iter().skip(1).map(|next| (next, true));
        let next = next.chain([(&end, false)]);
        (1..)
            .zip(self.seen.iter().zip(next))
            .map(|(number, (this, (next, again)))| Round {
                number,
                begin: this.at,
                time: next.at - this.at,
                // When the first one begins it may not have been counted: that is all of it.
                to_send: match (number, this.remaining) {
                    (1, 0) => self.total,
                    (_, remaining) => remaining,
                },
                sent: next.transferred.saturating_sub(this.transferred),
                dirtied: again.then_some(next.remaining),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn all_is_left_when_the_first_pass_begins() {
        let start = Instant::now();
        let mut passes = Passes::new(start);
        passes.begin(start, &json!({ "status": "setup" }));
        passes.begin(start, &json!({ "ram": { "remaining": 0, "total": 1000 } }));
        let rounds = passes.rounds(start, 0);
        assert_eq!([rounds[0].to_send, rounds[1].to_send], [1000, 0]);
    }

    #[test]
    fn a_pass_lasts_until_the_next_one() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut passes = Passes::new(start);
        assert_eq!(passes.rounds(after(1), 0), []);
        let info = |remaining, transferred| json!({ "ram": { "remaining": remaining, "transferred": transferred } });
        passes.begin(after(10), &info(1000, 0));
        passes.begin(after(70), &info(50, 900));
        assert_eq!(
            passes.rounds(after(75), 960),
            [
                Round {
                    number: 1,
                    begin: 10.0,
                    time: 60.0,
                    to_send: 1000,
                    sent: 900,
                    dirtied: Some(50)
                },
                Round {
                    number: 2,
                    begin: 70.0,
                    time: 5.0,
                    to_send: 50,
                    sent: 60,
                    dirtied: None
                }
            ]
        );
    }
}
