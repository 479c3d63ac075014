//! What is done about a guest that doesn't converge: it is slowed down, or its time is up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Source, SourceError, vm};
use crate::cancel::TooLate;
use crate::layout::PAGE_SIZE;
use crate::parameters::TimeoutAction;
use crate::progress::Round;
use crate::session::{Hurry, Session};
use crate::throttle::{Moved, Throttle, Throttling};
use crate::timeout::Timer;

/// What presses for the end of pre-copy.
#[derive(Debug, Default)]
pub(super) struct Pressure {
    throttling: Throttling,
    timer: Option<Timer>,
    forced: Arc<AtomicBool>,
}

impl Pressure {
    /// Whether the guest is to be stopped as soon as possible, whatever is left; that may become so
    /// at any time.
    pub(super) fn forced(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.forced)
    }

    /// The same, for who waits.
    pub(super) fn hurry(&self) -> Hurry {
        let forced = self.forced();
        Arc::new(move || forced.load(Ordering::Relaxed))
    }

    /// Whether it is so now.
    pub(super) fn is_forced(&self) -> bool {
        self.forced.load(Ordering::Relaxed)
    }
}

impl Source<'_> {
    /// From here on the migration has as much time as its user gives it.
    pub(super) fn start_timeout(&mut self) -> Result<(), SourceError> {
        let Some(timeout) = self.job.parameters.timeout().get() else {
            return Ok(());
        };
        let reason = format!(
            "it took longer than the timeout of {} ms",
            timeout.after.as_millis()
        );
        let expired: Box<dyn FnOnce() + Send> = match timeout.action {
            TimeoutAction::Cancel => {
                let cancel = self.job.cancel.clone();
                Box::new(move || {
                    // Too late means that it is nearly over.
                    let _: Result<(), TooLate> = cancel.cancel(&reason);
                })
            }
            TimeoutAction::Force => {
                let forced = self.pressure.forced();
                Box::new(move || {
                    tracing::info!("the guest is stopped, whatever is left: {reason}");
                    forced.store(true, Ordering::Relaxed);
                })
            }
            TimeoutAction::Postcopy => {
                let control = self.job.postcopy.clone();
                let control = control.ok_or(SourceError::TimeoutAction)?;
                Box::new(move || {
                    tracing::info!("post-copy starts: {reason}");
                    control.start();
                })
            }
        };
        let timer = Timer::start(timeout.after, expired).map_err(SourceError::Timeout)?;
        self.pressure.timer = Some(timer);
        Ok(())
    }

    /// Its time can't be up any more.
    pub(super) fn stop_timeout(&mut self) {
        self.pressure.timer = None;
    }

    /// Slows the guest down (more) if rounds like this one lead nowhere, and its user allows it.
    pub(super) fn slow_down(
        &mut self,
        session: &Session,
        round: &Round,
        skipped: u64,
    ) -> Result<(), SourceError> {
        let pages = (round.pages + round.zero).saturating_sub(skipped);
        let moved = Moved {
            time: round.time,
            sent: pages * PAGE_SIZE + round.block_bytes,
            dirtied: round.dirty * PAGE_SIZE + round.dirty_block_bytes,
            bandwidth: session
                .convergence
                .page_rate(self.job.parameters.max_bandwidth()),
        };
        let parameters = self.job.parameters.throttle();
        match self.pressure.throttling.round_ended(parameters, moved) {
            Some(throttle) => self.set_throttle(throttle),
            None => Ok(()),
        }
    }

    fn set_throttle(&mut self, throttle: Throttle) -> Result<(), SourceError> {
        tracing::debug!(id = ?self.id, ?throttle, "the guest is slowed down");
        self.job
            .progress
            .update(|snapshot| snapshot.throttle = throttle);
        self.vm
            .throttle(throttle)
            .map_err(vm("slowing the guest down"))
    }

    /// The guest runs as it likes from here on.
    pub(super) fn unthrottle(&mut self) {
        if self.pressure.throttling.end() {
            if let Err(error) = self.vm.throttle(Throttle::Off) {
                tracing::error!(id = ?self.id, %error, "the guest stays slowed down");
            }
            self.job
                .progress
                .update(|snapshot| snapshot.throttle = Throttle::Off);
        }
    }

    /// Pre-copy is over, however it went.
    pub(super) fn end_pressure(&mut self) {
        self.stop_timeout();
        self.unthrottle();
    }
}
