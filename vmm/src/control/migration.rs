//! The types of the migration commands.
//!
//! Names, units and shapes are those of QEMU's `qapi/migration.json`. What only Ferry tells is in
//! one object, [`FerryMigrationInfo`].

use std::fmt;

use serde::Serialize;

use super::address::SocketAddress;
use super::compression::{CompressionInfo, XbzrleCacheStats};
use super::postcopy::PostcopyInfo;

/// QAPI's `MigrationStatus`, as far as Ferry has the states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// There has been no migration.
    #[default]
    None,
    /// Connecting and agreeing with the peer.
    Setup,
    /// Memory is moving, the guest runs.
    Active,
    /// The guest is stopped; the rest and the device state are moving.
    Device,
    /// A cancel was asked for and is being carried out.
    Cancelling,
    /// Cancelled: the guest is here as before.
    Cancelled,
    /// The guest runs at the destination, and not all of its memory is there yet.
    PostcopyActive,
    /// The same, and the connection is broken: it waits to be recovered.
    PostcopyPaused,
    /// The same, over another connection: both sides agree on what is left.
    PostcopyRecover,
    /// The guest has moved.
    Completed,
    /// It failed: see [`MigrationInfo::error_desc`].
    Failed,
}

impl MigrationStatus {
    /// The name in QMP and in the monitor.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Device => "device",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }

    /// Whether the guest is at one side and some of its memory at the other.
    pub fn is_postcopy(self) -> bool {
        matches!(
            self,
            Self::PostcopyActive | Self::PostcopyPaused | Self::PostcopyRecover
        )
    }

    /// Whether a migration is under way.
    pub fn is_running(self) -> bool {
        matches!(
            self,
            Self::Setup
                | Self::Active
                | Self::Device
                | Self::PostcopyActive
                | Self::PostcopyPaused
                | Self::PostcopyRecover
                | Self::Cancelling
        )
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// QAPI's `MigrationInfo`, what `query-migrate` returns. A member that has nothing to tell is
/// `None` or empty, and is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// The status; left out, as in QEMU, if there has been no migration.
    #[serde(skip_serializing_if = "is_none_status")]
    pub status: MigrationStatus,
    /// What has moved, and what has not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<MigrationStats>,
    /// The same of the disks that travel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<MigrationStats>,
    /// Pages that went as differences; left out without the capability `xbzrle`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xbzrle_cache: Option<XbzrleCacheStats>,
    /// Milliseconds since it began, or that it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds that the guest was stopped, of a completed migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Milliseconds that the guest would be stopped if it were handed over now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Milliseconds from the start to the first page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// The share of time in percent that vCPUs are kept from running, while they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u64>,
    /// Milliseconds that all vCPUs waited for pages at the same time, after the guest had moved;
    /// only at the destination, as are the next three. None of it is downtime.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_blocktime: Option<u64>,
    /// Milliseconds that each vCPU waited.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub postcopy_vcpu_blocktime: Vec<u64>,
    /// Nanoseconds from a fault to its page, on average.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy_latency: Option<u64>,
    /// How many faults took from 2^N to 2^(N+1) microseconds, by N.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub postcopy_latency_dist: Vec<u64>,
    /// Why it failed, or why it is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// Why the guest cannot migrate now, each reason a sentence.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blocked_reasons: Vec<String>,
    /// Where a destination listens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub socket_address: Vec<SocketAddress>,
    /// What QEMU has no member for.
    #[serde(rename = "x-ferry", skip_serializing_if = "Option::is_none")]
    pub ferry: Option<FerryMigrationInfo>,
}

fn is_none_status(status: &MigrationStatus) -> bool {
    *status == MigrationStatus::None
}

/// QAPI's `MigrationStats`: how the guest's memory is moving.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationStats {
    /// Bytes sent, of everything.
    pub transferred: u64,
    /// Bytes of RAM that are left to send.
    pub remaining: u64,
    /// Bytes of RAM that the guest has.
    pub total: u64,
    /// Zero pages, which are told but not sent.
    pub duplicate: u64,
    /// Pages sent.
    pub normal: u64,
    /// Bytes of the pages sent.
    pub normal_bytes: u64,
    /// Pages that the guest dirties in a second.
    pub dirty_pages_rate: u64,
    /// Throughput in megabits (10^6) a second.
    pub mbps: f64,
    /// How many times dirty pages were collected: the rounds.
    pub dirty_sync_count: u64,
    /// How often the destination asked for pages.
    pub postcopy_requests: u64,
    /// Bytes of a page.
    pub page_size: u64,
    /// Bytes sent over further connections.
    pub multifd_bytes: u64,
    /// Pages sent in a second.
    pub pages_per_second: u64,
    /// Sends that were to go without a copy into the kernel, and went with one.
    pub dirty_sync_missed_zero_copy: u64,
    /// Bytes sent while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes sent while the guest was stopped.
    pub downtime_bytes: u64,
    /// Bytes sent after the guest had moved.
    pub postcopy_bytes: u64,
}

/// What Ferry tells beyond QEMU: the member `x-ferry` of `query-migrate`. All times are
/// microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FerryMigrationInfo {
    /// The last rounds that have ended, oldest first, at most [`MAX_ROUNDS`](Self::MAX_ROUNDS).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<MigrationRound>,
    /// What the bytes sent (at the destination: received) were; together
    /// [`MigrationStats::transferred`].
    pub bytes: BytesByKind,
    /// The downtime in its parts, once the guest has moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<DowntimeParts>,
    /// The link's throughput as measured, in bytes a second; only at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// The link's shortest round trip as measured, in microseconds; only at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round_trip: Option<u64>,
    /// What went compressed; only at the source, and left out if nothing was to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionInfo>,
    /// More connections for pages; only at the source, with the capability `multifd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multifd: Option<MultifdInfo>,
    /// Sends without a copy; only at the source, with the capability `zero-copy-send`, and left
    /// out if no connection can do that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_copy: Option<ZeroCopyInfo>,
    /// What happened after the guest had moved ahead of its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub postcopy: Option<PostcopyInfo>,
}

impl FerryMigrationInfo {
    /// How many rounds are kept: a migration that does not converge makes any number of them.
    pub const MAX_ROUNDS: usize = 64;
}

/// More connections for pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MultifdInfo {
    /// How many there are beside the first one; 0 if there can't be any.
    pub channels: u64,
    /// How many of them take work: as many as make a difference.
    pub in_use: u64,
    /// Why only one is used, or none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_one: Option<String>,
}

/// What became of the sends that were to go without a copy into the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ZeroCopyInfo {
    /// How many were handed to the kernel so.
    pub sends: u64,
    /// Of those, how many the kernel is done with.
    pub done: u64,
    /// Of those, how many it has copied all the same.
    pub copied: u64,
    /// How many more went with a copy, because no more memory may be pinned.
    pub refused: u64,
}

impl ZeroCopyInfo {
    /// How many went with a copy, for either reason.
    pub fn missed(&self) -> u64 {
        self.copied.saturating_add(self.refused)
    }
}

/// One round over the guest's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationRound {
    /// Which one, from 1.
    pub round: u64,
    /// Pages that it has to send or tell to be zero.
    pub pages: u64,
    /// Pages that it has sent.
    pub sent: u64,
    /// Pages that it has told to be zero.
    pub zero: u64,
    /// Bytes that it has sent.
    pub bytes: u64,
    /// Microseconds that it took, or has been under way.
    pub time: u64,
    /// Pages found dirty at its end; left out while it is under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirtied: Option<u64>,
}

/// The bytes that were sent, by what they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BytesByKind {
    /// The contents of pages.
    pub pages: u64,
    /// Runs of zero pages.
    pub zero: u64,
    /// The state of everything but RAM.
    pub state: u64,
    /// The kernel and the initrd, for a later reset.
    pub files: u64,
    /// All else: headers, checksums, agreement.
    pub control: u64,
}

/// From the last instruction at the source to the first at the destination, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DowntimeParts {
    /// The whole.
    pub total: u64,
    /// Stopping the other vCPUs and devices.
    pub stop: u64,
    /// Sending the last pages.
    pub last_pages: u64,
    /// Saving the state.
    pub save: u64,
    /// Sending the state.
    pub send: u64,
    /// Checking and loading at the destination.
    pub load: u64,
    /// From the agreement to the first instruction.
    pub start: u64,
    /// What `total` was estimated to be when the guest was stopped; left out in post-copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_migration_is_an_empty_object() {
        assert_eq!(
            serde_json::to_string(&MigrationInfo::default()).unwrap(),
            "{}"
        );
    }

    #[test]
    fn members_have_the_names_of_the_schema() {
        let info = MigrationInfo {
            status: MigrationStatus::Completed,
            ram: Some(MigrationStats {
                page_size: 4096,
                ..Default::default()
            }),
            total_time: Some(1),
            downtime: Some(2),
            ferry: Some(FerryMigrationInfo {
                downtime: Some(DowntimeParts {
                    last_pages: 7,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let json = serde_json::to_value(&info).unwrap();
        assert_eq!(json["status"], "completed");
        assert_eq!(json["total-time"], 1);
        assert_eq!(json["ram"]["page-size"], 4096);
        assert_eq!(json["ram"]["dirty-sync-count"], 0);
        assert_eq!(json["ram"]["dirty-sync-missed-zero-copy"], 0);
        assert_eq!(json["x-ferry"]["downtime"]["last-pages"], 7);
        assert!(json.get("setup-time").is_none());
    }
}
