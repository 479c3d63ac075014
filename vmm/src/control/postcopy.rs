//! What Ferry tells of post-copy beyond QEMU.

use serde::Serialize;

/// What happened after the guest had moved ahead of its memory: the member `postcopy` of
/// `x-ferry`. All times are microseconds, and none of them is downtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PostcopyInfo {
    /// How long the guest has run without all of its memory, or did.
    pub time: u64,
    /// Bytes sent (at the destination: received) in that time.
    pub bytes: u64,
    /// Requests by the destination.
    pub requests: u64,
    /// Pages that they were for.
    pub requested_pages: u64,
    /// Pages that are still to come.
    pub missing_pages: u64,
    /// How long all vCPUs waited for pages at the same time; only at the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocktime: Option<u64>,
    /// How long each vCPU waited; only at the destination.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vcpu_blocktime: Vec<u64>,
    /// From a fault to its page, on average; only at the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_average: Option<u64>,
    /// The longest of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_max: Option<u64>,
}
