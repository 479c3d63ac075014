//! What one migration was like.

use serde::Serialize;
use serde_json::Value;

use super::cost::{CpuTime, GuestWork};
use super::rounds::Round;
use crate::figure::Unit::{Count, Mebibytes, Milliseconds, Seconds, Share};
use crate::figure::{Figure, Measured, Unit};
use crate::vmm::Reported;

/// What one migration was like. Times are in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// From the command to the event that it is completed.
    pub total: f64,
    /// The same as the source says.
    pub total_reported: f64,
    /// From the last heartbeat at the source to the first at the destination, as they were read:
    /// on a busy machine the reading may be late, and this negative.
    pub felt: f64,
    /// By how much `felt` may be wrong, because two hosts' clocks were compared.
    pub clock_uncertainty: Option<f64>,
    /// The downtime as the source says.
    pub reported: Reported,
    /// The longest time between heartbeats before the migration: what the machine itself does.
    pub gap_quiet: f64,
    /// The same from the command on, at the source.
    pub gap_before: f64,
    /// The same at the destination.
    pub gap_after: f64,
    /// How much the guest did from the command until right after the end.
    pub work: GuestWork,
    /// What the source says that it sent.
    pub bytes: u64,
    /// What went over the link, packets' headers included, where it can be told.
    pub wire: Option<u64>,
    /// How often the source has gone over the guest's memory.
    pub rounds: u64,
    /// CPU time of both processes from the command to the event.
    pub cpu: CpuTime,
    /// CPU time that other virtual machines of the same host have taken from this one meanwhile:
    /// a run in which it is much says little.
    pub stolen: f64,
    /// Of the guest's RAM at the source, in bytes, before.
    pub resident_source: u64,
    /// Of the guest's RAM at the destination, right after.
    pub resident_destination: u64,
    /// Post-copy, where the VMM tells of it.
    pub postcopy: Option<Postcopy>,
    /// Pages that the guest has verified at the destination; none was wrong.
    pub verified_pages: u64,
    /// How the rounds went.
    pub convergence: Vec<Round>,
    /// Settings that the VMM doesn't know, and that it was measured without.
    pub without: Vec<String>,
}

/// Post-copy as the destination says. Times are in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Postcopy {
    /// From the guest's move to its last page.
    pub time: f64,
    /// Pages that were asked for.
    pub requests: u64,
    /// How long one was waited for.
    pub average: f64,
    /// Half of them were not waited for any longer than this, a power of two.
    pub median_below: f64,
    /// The longest wait.
    pub longest: f64,
    /// How long all vCPUs waited at once.
    pub blocked: f64,
    /// How many waits lasted how long: the entry `n` counts those of 2^n up to and without 2^(n+1)
    /// microseconds.
    pub waits: Vec<u64>,
}

impl Postcopy {
    /// From the time that it took, and what `query-migrate` says at the destination.
    pub(super) fn told(time: f64, there: &Value) -> Self {
        let ns = |name: &str| there[name].as_f64().unwrap_or_default() / 1e6;
        let distribution = there["postcopy-latency-dist"].as_array();
        let counts: Vec<u64> = distribution
            .map(|counts| counts.iter().filter_map(Value::as_u64).collect())
            .unwrap_or_default();
        let all: u64 = counts.iter().sum();
        let mut below = 0;
        let median = counts.iter().position(|count| {
            below += count;
            2 * below >= all
        });
        let ferry = &there["x-ferry"]["postcopy"];
        Self {
            time,
            requests: there["ram"]["postcopy-requests"]
                .as_u64()
                .unwrap_or_default(),
            average: ns("postcopy-latency"),
            // The bucket n ends at 2^(n+1) µs.
            median_below: median.map_or(0.0, |n| f64::from(2u32 << n.min(30)) / 1e3),
            longest: ferry["latency-max"].as_f64().unwrap_or_default() / 1e3,
            blocked: ferry["blocktime"].as_f64().unwrap_or_default() / 1e3,
            waits: counts,
        }
    }
}

const MIB: f64 = (1 << 20) as f64;

const fn figure(
    name: &'static str,
    unit: Unit,
    digits: usize,
    of: fn(&Outcome) -> Option<f64>,
) -> Figure<Outcome> {
    Figure {
        name,
        unit,
        digits,
        of,
    }
}

impl Measured for Outcome {
    const FIGURES: &'static [Figure<Self>] = &[
        figure("total", Milliseconds, 0, |o| Some(o.total)),
        figure("total reported", Milliseconds, 0, |o| {
            Some(o.total_reported)
        }),
        figure("downtime felt", Milliseconds, 2, |o| Some(o.felt)),
        figure("  clocks compared within", Milliseconds, 3, |o| {
            o.clock_uncertainty
        }),
        figure("downtime reported", Milliseconds, 2, |o| {
            Some(o.reported.total)
        }),
        figure("  stop", Milliseconds, 2, |o| o.reported.stop),
        figure("  last pages", Milliseconds, 2, |o| o.reported.last_pages),
        figure("  save", Milliseconds, 2, |o| o.reported.save),
        figure("  send", Milliseconds, 2, |o| o.reported.send),
        figure("  load", Milliseconds, 2, |o| o.reported.load),
        figure("  start", Milliseconds, 2, |o| o.reported.start),
        figure("estimated - reported", Milliseconds, 2, |o| {
            Some(o.reported.expected? - o.reported.total)
        }),
        figure("felt - reported", Milliseconds, 2, |o| {
            Some(o.felt - o.reported.total)
        }),
        figure("longest gap when quiet", Milliseconds, 2, |o| {
            Some(o.gap_quiet)
        }),
        figure("longest gap before", Milliseconds, 2, |o| {
            Some(o.gap_before)
        }),
        figure("longest gap after", Milliseconds, 2, |o| Some(o.gap_after)),
        figure("guest's work during, of before", Share, 3, |o| o.work.turns),
        figure("  pages rewritten", Share, 3, |o| o.work.written),
        figure("post-copy", Milliseconds, 1, |o| {
            o.postcopy.as_ref().map(|p| p.time)
        }),
        figure("  pages asked for", Count, 0, |o| {
            o.postcopy.as_ref().map(|p| p.requests as f64)
        }),
        figure("  wait, average", Milliseconds, 3, |o| {
            o.postcopy.as_ref().map(|p| p.average)
        }),
        figure("  wait, median at most", Milliseconds, 3, |o| {
            o.postcopy.as_ref().map(|p| p.median_below)
        }),
        figure("  wait, longest", Milliseconds, 3, |o| {
            o.postcopy.as_ref().map(|p| p.longest)
        }),
        figure("  all vCPUs waited", Milliseconds, 1, |o| {
            o.postcopy.as_ref().map(|p| p.blocked)
        }),
        figure("sent", Mebibytes, 1, |o| {
            o.wire.map(|bytes| bytes as f64 / MIB)
        }),
        figure("sent as reported", Mebibytes, 1, |o| {
            Some(o.bytes as f64 / MIB)
        }),
        figure("rounds", Count, 0, |o| Some(o.rounds as f64)),
        figure("CPU", Seconds, 2, |o| Some(o.cpu.all)),
        figure("CPU beside the vCPUs", Seconds, 2, |o| {
            Some(o.cpu.beside_vcpus)
        }),
        figure("stolen from this machine", Milliseconds, 0, |o| {
            Some(o.stolen)
        }),
        figure(
            "resident at the destination, of the source's",
            Share,
            3,
            |o| Some(o.resident_destination as f64 / o.resident_source as f64),
        ),
    ];

    const HEADLINES: &'static [&'static str] = &[
        "total",
        "downtime felt",
        "downtime reported",
        "guest's work during, of before",
        "sent",
        "CPU",
        "CPU beside the vCPUs",
    ];
}
