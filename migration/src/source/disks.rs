//! What happens to the disks before the rounds, and what they are in numbers.

use std::sync::Arc;
use std::time::Duration;

use super::{Source, SourceError, blocks_error, vm};
use crate::blocks::{Disks, SentBlocks};
use crate::progress::Round;
use crate::session::Session;

impl Source<'_> {
    /// All of each disk, once. The log is started before the first block is read.
    pub(super) fn bulk_pass(
        &mut self,
        session: &mut Session,
        disks: &mut Disks,
    ) -> Result<(), SourceError> {
        if disks.is_empty() {
            return Ok(());
        }
        for disk in disks.each() {
            disk.start_log()
                .map_err(vm("switching the log of a disk on"))?;
            self.logged.push(Arc::clone(disk));
        }
        let progress = &self.job.progress;
        let began = self.clock.now();
        let before = session.sent_bytes();
        disks.send_whole(session, progress).map_err(blocks_error)?;
        disks.flush(0, session, progress)?;
        let seconds = self.clock.now().saturating_sub(began).as_secs_f64();
        let bytes = session.sent_bytes() - before;
        progress.update(|snapshot| {
            if let Some(disk) = &mut snapshot.disk {
                disk.mbps = bytes as f64 * 8.0 / 1e6 / seconds.max(1e-6);
            }
        });
        Ok(())
    }

    /// Tells what a round was for the disks.
    pub(super) fn tell_blocks(
        &self,
        session: &Session,
        round: &Round,
        sent: SentBlocks,
        time: Duration,
    ) {
        let seconds = time.as_secs_f64().max(1e-6);
        self.job.progress.update(|snapshot| {
            if let Some(disk) = &mut snapshot.disk {
                disk.remaining = round.dirty_block_bytes;
                disk.dirty_sync_count = round.number;
                disk.dirty_bytes_rate = session.convergence.dirty_block_rate() as u64;
                if sent.data > 0 {
                    disk.mbps = sent.data as f64 * 8.0 / 1e6 / seconds;
                }
            }
        });
    }
}
