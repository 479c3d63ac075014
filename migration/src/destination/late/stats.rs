//! The numbers of late memory.

use std::time::Duration;

use super::latency::Latency;

/// How it goes. Times that still run are counted up to now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LateStats {
    /// Pages that have not come yet.
    pub missing: u64,
    /// Pages that were to be asked for because somebody touched them.
    pub requested: u64,
    /// Pages placed that came in the source's own order.
    pub from_stream: u64,
    /// Pages placed that came in answer to requests.
    pub from_requests: u64,
    /// Pages placed of which it was said, either way, that they are zero.
    pub zero: u64,
    /// Pages that came though they were there already, and were left alone.
    pub duplicates: u64,
    /// Faults of pages that had come as zeroes, which needed nothing from the source.
    pub served_here: u64,
    /// How long faults waited for pages from the source.
    pub latency: Latency,
    /// How long each vCPU waited, in their order. Zero if the kernel doesn't tell threads.
    pub vcpu_block_time: Vec<Duration>,
    /// How long all vCPUs waited at once.
    pub block_time: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) requested: u64,
    pub(super) from_stream: u64,
    pub(super) from_requests: u64,
    pub(super) zero: u64,
    pub(super) duplicates: u64,
    pub(super) served_here: u64,
}
