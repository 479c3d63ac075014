//! What a guest does to its own machine: resets, power-offs, and what its vCPUs can't go on from.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;
use tracing::{error, info, warn};

use super::{Exit, Shared, State};
use crate::control::command::{EventKind, RunState, ShutdownCause};
use crate::vcpu::{EventSink, VcpuEvent};

/// Events of the vCPUs, from their threads to whoever handles them.
///
/// That is the main thread as a rule. A migration that stops the guest handles what has come until
/// then itself: a reset that was asked for must not be forgotten on the way.
#[derive(Default)]
pub(super) struct GuestEvents {
    queue: Mutex<VecDeque<(u32, VcpuEvent)>>,
    arrived: Notify,
}

impl GuestEvents {
    /// Resolves when something has come since the last time.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    fn take(&self) -> Option<(u32, VcpuEvent)> {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }
}

impl EventSink for GuestEvents {
    fn vcpu_stopped(&self, index: u32, event: VcpuEvent) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back((index, event));
        self.arrived.notify_one();
    }
}

impl Shared {
    /// Does what the vCPUs' events ask for. Whether there was any.
    pub(super) fn handle_guest_events(&self, state: &mut State) -> bool {
        let mut any = false;
        while let Some((vcpu, event)) = self.guest_events.take() {
            any = true;
            match event {
                VcpuEvent::Reset => self.guest_reset(state),
                VcpuEvent::TripleFault => {
                    warn!(vcpu, "triple fault: the guest resets");
                    self.guest_reset(state);
                }
                VcpuEvent::Shutdown => self.guest_power_off(state),
                VcpuEvent::InternalError(what) => {
                    error!("{what}");
                    state.stop_guest(self, RunState::InternalError);
                }
            }
        }
        any
    }

    fn guest_reset(&self, state: &mut State) {
        if self.settings.no_reboot {
            info!("the guest asked for a reset: the process ends (--no-reboot)");
            self.power_off(state, ShutdownCause::GuestReset);
        } else {
            self.reset(state, ShutdownCause::GuestReset);
        }
    }

    fn guest_power_off(&self, state: &mut State) {
        info!("the guest powered off");
        self.power_off(state, ShutdownCause::GuestShutdown);
    }

    fn power_off(&self, state: &mut State, cause: ShutdownCause) {
        state.stop_guest(self, RunState::Shutdown);
        if self.settings.no_shutdown {
            self.emit(EventKind::shutdown(cause));
        } else {
            self.exit(cause, Exit::Success);
        }
    }

    /// Resets the machine; it runs afterwards if it ran before.
    pub(super) fn reset(&self, state: &mut State, cause: ShutdownCause) {
        let Some(guest) = &state.guest else { return };
        let ran = state.run == RunState::Running;
        guest.pause();
        // What the vCPUs asked for until here is moot.
        while self.guest_events.take().is_some() {}
        info!(?cause, "the machine resets");
        match guest.reset() {
            Ok(()) => {
                self.emit(EventKind::reset(cause));
                if ran {
                    if let Err(err) = guest.run() {
                        error!(%err, "the guest can't run after its reset");
                        state.run = RunState::InternalError;
                        self.emit(EventKind::Stop);
                    }
                } else if matches!(state.run, RunState::Shutdown | RunState::InternalError) {
                    // As in QEMU, a reset makes such a machine fit to be continued.
                    state.run = RunState::Paused;
                }
            }
            Err(err) => {
                error!(%err, "the machine can't be reset");
                state.run = RunState::InternalError;
                if ran {
                    self.emit(EventKind::Stop);
                }
            }
        }
    }
}
