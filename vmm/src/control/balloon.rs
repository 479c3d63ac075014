//! The memory balloon, as commands show it.

use serde::{Serialize, Serializer};

/// QAPI's `BalloonInfo`, with what QEMU has elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BalloonInfo {
    /// The RAM that the guest has with the balloon as it is, in bytes.
    pub actual: u64,
    /// What the guest tells of its memory; `None` as long as it has told nothing.
    #[serde(rename = "x-ferry", skip_serializing_if = "Option::is_none")]
    pub ferry: Option<FerryBalloonInfo>,
}

/// What the guest tells of its memory: in QEMU a property of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryBalloonInfo {
    /// The figures by QEMU's names; memory in bytes.
    #[serde(serialize_with = "as_map")]
    pub guest_stats: Vec<(&'static str, u64)>,
    /// How long ago they came, in milliseconds.
    pub guest_stats_age: u64,
}

fn as_map<S: Serializer>(stats: &[(&str, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(stats.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_as_in_qmp() {
        let info = BalloonInfo {
            actual: 1 << 30,
            ferry: Some(FerryBalloonInfo {
                guest_stats: vec![("stat-free-memory", 5), ("stat-swap-in", 0)],
                guest_stats_age: 12,
            }),
        };
        assert_eq!(
            serde_json::to_string(&info).unwrap(),
            r#"{"actual":1073741824,"x-ferry":{"guest-stats":{"stat-free-memory":5,"stat-swap-in":0},"guest-stats-age":12}}"#
        );
    }
}
