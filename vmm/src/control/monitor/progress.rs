//! Follows a migration that somebody waits for.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::control::command::{CommandError, Control, Event, MigrationInfo, MigrationStatus};
use crate::control::size::format_size;

/// What a follower tells.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// How it stands, without a line feed.
    Line(String),
    /// How it ended, with one.
    End(String),
}

/// Follows the machine's migration.
pub struct Follower {
    machine: Arc<dyn Control>,
    events: Option<broadcast::Receiver<Event>>,
    ticks: Interval,
    /// Why a cancel was refused.
    refusal: Option<CommandError>,
}

impl Follower {
    /// Follows the migration that has been started just before, with a line every `period`.
    pub fn new(machine: Arc<dyn Control>, period: Duration) -> Self {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            events: Some(machine.subscribe()),
            machine,
            ticks,
            refusal: None,
        }
    }

    /// Waits for the next thing to tell; can be dropped while waiting.
    pub async fn next(&mut self) -> Progress {
        loop {
            let info = self.machine.migration_info();
            // One that is paused goes on only by commands, for which the prompt must come back.
            if !info.status.is_running() || info.status == MigrationStatus::PostcopyPaused {
                return Progress::End(end(&info));
            }
            if let Some(error) = self.refusal.take() {
                return Progress::End(format!(
                    "Error: {error}; the migration goes on (see info migrate)\n"
                ));
            }
            tokio::select! {
                _ = self.ticks.tick() => return Progress::Line(line(&info)),
                () = changed(&mut self.events) => {}
            }
        }
    }

    /// Cancels the migration; how it ends is told as ever. In post-copy it can't be cancelled: that
    /// is told, and it is not followed any further.
    pub fn cancel(&mut self) {
        if let Err(error) = self.machine.migrate_cancel() {
            tracing::warn!(%error, "cannot cancel the migration");
            let status = self.machine.migration_info().status;
            self.refusal = status.is_postcopy().then_some(error);
        }
    }
}

/// Returns when anything has happened to the machine.
async fn changed(events: &mut Option<broadcast::Receiver<Event>>) {
    match events {
        Some(receiver) => {
            if let Err(RecvError::Closed) = receiver.recv().await {
                *events = None;
            }
        }
        None => std::future::pending().await,
    }
}

/// How a migration stands, in one line.
pub fn line(info: &MigrationInfo) -> String {
    let Some(ram) = info.ram.as_ref().filter(|ram| ram.total > 0) else {
        return match info.status {
            MigrationStatus::Cancelling => "cancelling".to_owned(),
            _ => "connecting".to_owned(),
        };
    };
    match info.status {
        MigrationStatus::Cancelling => return "cancelling".to_owned(),
        MigrationStatus::Device => return "guest stopped, handing it over".to_owned(),
        MigrationStatus::PostcopyActive | MigrationStatus::PostcopyRecover => {
            return format!(
                "the guest runs at the destination, {} of {} to follow, {} pages asked for",
                format_size(ram.remaining),
                format_size(ram.total),
                ram.postcopy_requests
            );
        }
        _ => {}
    }
    let done = ram.total.saturating_sub(ram.remaining);
    let percent = u128::from(done)
        .saturating_mul(100)
        .checked_div(ram.total.into())
        .unwrap_or(0);
    let mut text = format!(
        "round {}: {percent}%, {} of {} remaining, {}/s",
        ram.dirty_sync_count.max(1),
        format_size(ram.remaining),
        format_size(ram.total),
        // A megabit is 125,000 bytes.
        format_size((ram.mbps * 125_000.0) as u64),
    );
    if ram.dirty_pages_rate > 0 {
        text += &format!(", {} pages/s dirtied", ram.dirty_pages_rate);
    }
    if let Some(downtime) = info.expected_downtime {
        text += &format!(", expected downtime {downtime} ms");
    }
    text
}

/// How a migration ended, in one line.
fn end(info: &MigrationInfo) -> String {
    match info.status {
        MigrationStatus::Completed => {
            let mut text = String::from("Migration completed");
            if let Some(total) = info.total_time {
                text += &format!(" in {total} ms");
            }
            if let Some(downtime) = info.downtime {
                text += &format!(", downtime {downtime} ms");
            }
            if let Some(ram) = &info.ram {
                let sent = format_size(ram.transferred);
                text += &format!(", {} rounds, {sent} sent", ram.dirty_sync_count);
                if ram.postcopy_requests > 0 {
                    let requests = ram.postcopy_requests;
                    text += &format!(", {requests} requests for pages after the downtime");
                }
            }
            text + "\n"
        }
        MigrationStatus::PostcopyPaused => {
            let why = info.error_desc.as_deref().unwrap_or("no reason was given");
            format!(
                "Error: the migration is paused, the connection is broken: {why}; recover it with \
                 migrate_recover at the destination, then migrate -r here\n"
            )
        }
        MigrationStatus::Cancelled => "Error: migration cancelled\n".to_owned(),
        _ => {
            let why = info.error_desc.as_deref().unwrap_or("no reason was given");
            format!("Error: migration failed: {why}\n")
        }
    }
}
