//! What `query-vcpu-dirty-limit` tells, as in QEMU's `qapi/migration.json`.

use serde::Serialize;

/// QAPI's `DirtyLimitInfo`, with what is Ferry's own: a vCPU whose writes are limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DirtyLimitInfo {
    /// The vCPU's index.
    pub cpu_index: u32,
    /// MB that it may write to in a second.
    pub limit_rate: u64,
    /// MB that it writes to in a second.
    pub current_rate: u64,
    /// Ours: the share of its time in percent for which it is kept from running.
    #[serde(rename = "x-throttle-percentage")]
    pub throttle_percentage: u8,
    /// Ours: whether the current rate is only the average of all vCPUs, as this host doesn't tell
    /// which of them writes.
    #[serde(
        rename = "x-rate-is-average",
        skip_serializing_if = "std::ops::Not::not"
    )]
    pub rate_is_average: bool,
}
