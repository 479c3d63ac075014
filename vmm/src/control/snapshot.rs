//! Snapshots of the guest with its disks, as commands see them.

use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use tokio::sync::oneshot;

use super::command::{CommandError, CommandResult};

/// Something that goes on in the background and that a client waits for. It goes on if nobody does.
#[derive(Debug)]
pub struct Work(oneshot::Receiver<CommandResult<()>>);

impl Work {
    /// Work, and where to say how it ended.
    pub fn new() -> (oneshot::Sender<CommandResult<()>>, Self) {
        let (sender, receiver) = oneshot::channel();
        (sender, Self(receiver))
    }

    /// Work that is over.
    pub fn done(result: CommandResult<()>) -> Self {
        let (sender, work) = Self::new();
        // It has a receiver.
        let _ = sender.send(result);
        work
    }

    /// Waits for its end.
    pub async fn wait(self) -> CommandResult<()> {
        match self.0.await {
            Ok(result) => result,
            Err(_) => Err(CommandError::generic("it ended without a result")),
        }
    }
}

/// A snapshot, as `info snapshots` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its name.
    pub tag: String,
    /// What is known of it, if that can be read.
    pub saved: Option<SavedInfo>,
    /// Why it can't be loaded, as far as can be told without reading all of it.
    pub problem: Option<String>,
}

/// What is known of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedInfo {
    /// Bytes of the guest's state, memory included, without the disks.
    pub state_bytes: u64,
    /// When it was saved.
    pub date: SystemTime,
    /// How long the guest had run by its own clock.
    pub vm_clock: Duration,
}

impl SavedInfo {
    /// The date, in UTC, as QEMU writes it.
    pub fn date(&self) -> String {
        let date = OffsetDateTime::from(self.date);
        let (hour, minute, second) = date.to_hms();
        format!("{} {hour:02}:{minute:02}:{second:02}", date.date())
    }

    /// The time that the guest had run, as QEMU writes it.
    pub fn vm_clock(&self) -> String {
        let seconds = self.vm_clock.as_secs();
        format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            self.vm_clock.subsec_millis()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_qemu_does() {
        let saved = SavedInfo {
            state_bytes: 0,
            date: SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_210_096),
            vm_clock: Duration::from_millis(90_061_007),
        };
        assert_eq!(saved.date(), "2024-02-29 12:34:56");
        assert_eq!(saved.vm_clock(), "0025:01:01.007");
    }
}
