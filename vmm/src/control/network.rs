//! The types of the commands about network cards, named as in QEMU's `qapi/net.json`.

use serde::Serialize;

use super::command::{CommandError, CommandResult};

/// A network card and the tap behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkInfo {
    /// The name in commands, such as `net0`.
    pub name: String,
    /// The card's MAC address.
    pub mac: String,
    /// The tap's name.
    pub ifname: String,
    /// Whether the cable is plugged in.
    pub link_up: bool,
    /// Packets that the guest received, and that it could not.
    pub received: (u64, u64),
    /// Packets that the guest sent, and that were lost on the way.
    pub sent: (u64, u64),
}

/// QAPI's `AnnounceParameters`, and the parameters of migrations of that name: how often the
/// network is told where a guest is now. Times are milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AnnounceParameters {
    /// Between the first time and the second.
    #[serde(rename = "announce-initial")]
    pub initial: u64,
    /// The most between two times.
    #[serde(rename = "announce-max")]
    pub max: u64,
    /// How many times.
    #[serde(rename = "announce-rounds")]
    pub rounds: u64,
    /// How much longer each time takes than the one before.
    #[serde(rename = "announce-step")]
    pub step: u64,
}

/// QEMU's.
impl Default for AnnounceParameters {
    fn default() -> Self {
        Self {
            initial: 50,
            max: 550,
            rounds: 5,
            step: 100,
        }
    }
}

impl AnnounceParameters {
    /// The time in milliseconds between the times numbered `round` and `round + 1`, from 0.
    pub fn delay(&self, round: u64) -> u64 {
        let step = self.step.saturating_mul(round);
        self.initial.saturating_add(step).min(self.max)
    }
}

/// Announce parameters to change: those that are given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AnnounceChange {
    /// See [`AnnounceParameters::initial`].
    pub initial: Option<u64>,
    /// See [`AnnounceParameters::max`].
    pub max: Option<u64>,
    /// See [`AnnounceParameters::rounds`].
    pub rounds: Option<u64>,
    /// See [`AnnounceParameters::step`].
    pub step: Option<u64>,
}

impl AnnounceChange {
    /// The names of the migration parameters, with QEMU's limits.
    const LIMITS: [(&str, u64); 4] = [
        ("announce-initial", 100_000),
        ("announce-max", 100_000),
        ("announce-rounds", 1_000),
        ("announce-step", 10_000),
    ];

    /// The value of the migration parameter of that name; `None` if it isn't one of these.
    pub fn value_mut(&mut self, parameter: &str) -> Option<&mut Option<u64>> {
        Some(match parameter {
            "announce-initial" => &mut self.initial,
            "announce-max" => &mut self.max,
            "announce-rounds" => &mut self.rounds,
            "announce-step" => &mut self.step,
            _ => return None,
        })
    }

    /// Refuses values out of range, in QEMU's words.
    pub fn check(&self) -> CommandResult<()> {
        let Self {
            initial,
            max,
            rounds,
            step,
        } = *self;
        for ((name, limit), value) in Self::LIMITS.into_iter().zip([initial, max, rounds, step]) {
            if value.is_some_and(|value| value > limit) {
                return Err(CommandError::generic(format!(
                    "Parameter '{name}' expects a value between 0 and {limit}"
                )));
            }
        }
        Ok(())
    }

    /// Makes the changes.
    pub fn apply(&self, parameters: &mut AnnounceParameters) {
        let Self {
            initial,
            max,
            rounds,
            step,
        } = *self;
        let AnnounceParameters {
            initial: old_initial,
            max: old_max,
            rounds: old_rounds,
            step: old_step,
        } = *parameters;
        *parameters = AnnounceParameters {
            initial: initial.unwrap_or(old_initial),
            max: max.unwrap_or(old_max),
            rounds: rounds.unwrap_or(old_rounds),
            step: step.unwrap_or(old_step),
        };
    }
}

/// What `announce-self` is asked for with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnnounceRequest {
    /// How often; what is not given is as in the parameters of migrations.
    pub how: AnnounceChange,
    /// The names of the cards; `None` is all.
    pub interfaces: Option<Vec<String>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_up_to_the_longest() {
        let parameters = AnnounceParameters::default();
        let delays = [0, 1, 4, 5, 6].map(|round| parameters.delay(round));
        assert_eq!(delays, [50, 150, 450, 550, 550]);
    }

    #[test]
    fn limits_are_qemus() {
        let mut change = AnnounceChange::default();
        *change.value_mut("announce-step").unwrap() = Some(10_001);
        assert_eq!(
            change.check().unwrap_err().desc,
            "Parameter 'announce-step' expects a value between 0 and 10000"
        );
        change.step = Some(10_000);
        change.check().unwrap();
        let mut parameters = AnnounceParameters::default();
        change.apply(&mut parameters);
        assert_eq!((parameters.step, parameters.initial), (10_000, 50));
        assert!(change.value_mut("announce").is_none());
    }
}
