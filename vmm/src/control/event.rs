//! What happens to a machine without being asked for.

use std::time::{SystemTime, UNIX_EPOCH};

use devices::virtio::blk::errors::{Action, IoError};
use serde::{Serialize, Serializer};

use super::migration::MigrationStatus;

/// Something that happened, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// When, by the host's wall clock: the one place where QMP wants that clock.
    #[serde(serialize_with = "qmp_timestamp")]
    pub timestamp: SystemTime,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

impl Event {
    /// An event that happens now.
    pub fn now(kind: EventKind) -> Self {
        Self {
            timestamp: SystemTime::now(),
            kind,
        }
    }
}

fn qmp_timestamp<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Timestamp {
        seconds: i64,
        microseconds: i64,
    }
    // QEMU sends -1 for both when the host's clock cannot be told.
    let stamp = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => Timestamp {
            seconds: i64::try_from(since.as_secs()).unwrap_or(-1),
            microseconds: i64::from(since.subsec_micros()),
        },
        Err(_) => Timestamp {
            seconds: -1,
            microseconds: -1,
        },
    };
    stamp.serialize(serializer)
}

/// QAPI's events, as far as Ferry has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EventKind {
    /// The guest has stopped.
    Stop,
    /// The guest runs on.
    Resume,
    /// The machine was reset.
    Reset {
        /// Whether the guest did it.
        guest: bool,
        /// What led to it.
        reason: ShutdownCause,
    },
    /// The machine's power button was pressed.
    Powerdown,
    /// The guest has inflated or deflated the memory balloon; at most once a second.
    BalloonChange {
        /// The RAM that it has now, in bytes.
        actual: u64,
    },
    /// The machine has shut down, or is about to because of a request to quit.
    Shutdown {
        /// Whether the guest did it.
        guest: bool,
        /// What led to it.
        reason: ShutdownCause,
    },
    /// A disk had an error.
    #[serde(rename_all = "kebab-case")]
    BlockIoError {
        /// The disk's name.
        device: String,
        /// The same: an image has no name of its own.
        node_name: String,
        /// `read` or `write`.
        operation: &'static str,
        /// `report` (the guest was told) or `stop`.
        action: &'static str,
        /// Whether the host has no space left.
        #[serde(rename = "nospace")]
        no_space: bool,
        /// The error in words.
        reason: String,
    },
    /// A migration, outgoing or incoming, has a new status.
    Migration {
        /// The status.
        status: MigrationStatus,
    },
    /// A pass over the guest's memory begins.
    MigrationPass {
        /// Which one, from 1.
        pass: u64,
    },
}

impl EventKind {
    /// The event of a reset for this cause.
    pub fn reset(reason: ShutdownCause) -> Self {
        Self::Reset {
            guest: reason.by_guest(),
            reason,
        }
    }

    /// The event of an error of a disk.
    pub fn block_io_error(error: &IoError) -> Self {
        Self::BlockIoError {
            device: error.disk.clone(),
            node_name: error.disk.clone(),
            operation: error.operation.event_name(),
            action: match error.action {
                Action::Report => "report",
                Action::Stop => "stop",
            },
            no_space: error.no_space,
            reason: error.reason.clone(),
        }
    }

    /// The event of a shutdown for this cause.
    pub fn shutdown(reason: ShutdownCause) -> Self {
        Self::Shutdown {
            guest: reason.by_guest(),
            reason,
        }
    }
}

/// QAPI's `ShutdownCause`, as far as Ferry has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownCause {
    /// An error on the host, also a failed incoming migration.
    HostError,
    /// `quit`, in QMP or in a monitor.
    HostQmpQuit,
    /// `system_reset`, in QMP or in a monitor.
    HostQmpSystemReset,
    /// A signal, such as SIGTERM.
    HostSignal,
    /// The user interface: Ctrl-a x.
    HostUi,
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset, or had a triple fault.
    GuestReset,
    /// The guest panicked.
    GuestPanic,
}

impl ShutdownCause {
    /// Whether the guest did it.
    pub fn by_guest(self) -> bool {
        matches!(
            self,
            Self::GuestShutdown | Self::GuestReset | Self::GuestPanic
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn json(kind: EventKind) -> String {
        let timestamp = UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
        serde_json::to_string(&Event { timestamp, kind }).unwrap()
    }

    #[test]
    fn events_look_as_in_qmp() {
        let time = r#"{"timestamp":{"seconds":1700000000,"microseconds":123456},"#;
        for (kind, rest) in [
            (EventKind::Stop, r#""event":"STOP"}"#),
            (EventKind::Powerdown, r#""event":"POWERDOWN"}"#),
            (
                EventKind::reset(ShutdownCause::GuestReset),
                r#""event":"RESET","data":{"guest":true,"reason":"guest-reset"}}"#,
            ),
            (
                EventKind::shutdown(ShutdownCause::HostQmpQuit),
                r#""event":"SHUTDOWN","data":{"guest":false,"reason":"host-qmp-quit"}}"#,
            ),
            (
                EventKind::Migration {
                    status: MigrationStatus::Active,
                },
                r#""event":"MIGRATION","data":{"status":"active"}}"#,
            ),
            (
                EventKind::BalloonChange { actual: 4096 },
                r#""event":"BALLOON_CHANGE","data":{"actual":4096}}"#,
            ),
            (
                EventKind::MigrationPass { pass: 3 },
                r#""event":"MIGRATION_PASS","data":{"pass":3}}"#,
            ),
        ] {
            assert_eq!(json(kind), format!("{time}{rest}"));
        }
    }
}
