//! What a guest does to its own machine: resets, power-offs, and what its vCPUs can't go on from.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use devices::virtio::blk::errors::{Action, ErrorSink, IoError};
use tokio::sync::Notify;
use tracing::{error, info, warn};

use super::{Exit, Shared, State};
use crate::control::command::{EventKind, RunState, ShutdownCause};
use crate::vcpu::{EventSink, VcpuEvent};

/// Something that happened to the machine.
enum GuestEvent {
    Vcpu(u32, VcpuEvent),
    Disk(IoError),
    /// A migration to here is over: nothing of the guest's memory is still to come.
    MemoryCame,
}

/// Events of the vCPUs and devices, from their threads to whoever handles them.
///
/// That is the main thread as a rule. A migration that stops the guest handles what has come until
/// then itself: a reset that was asked for must not be forgotten on the way.
#[derive(Default)]
pub(super) struct GuestEvents {
    queue: Mutex<VecDeque<GuestEvent>>,
    arrived: Notify,
}

impl GuestEvents {
    /// Resolves when something has come since the last time.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// A migration to here is over: what waited for the guest's memory can be done.
    pub(super) fn memory_came(&self) {
        self.put(GuestEvent::MemoryCame);
    }

    fn put(&self, event: GuestEvent) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(event);
        self.arrived.notify_one();
    }

    /// Forgets what has come: the guest that it came from is gone.
    pub(super) fn forget(&self) {
        while self.take().is_some() {}
    }

    fn take(&self) -> Option<GuestEvent> {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }
}

impl EventSink for GuestEvents {
    fn vcpu_stopped(&self, index: u32, event: VcpuEvent) {
        self.put(GuestEvent::Vcpu(index, event));
    }
}

impl ErrorSink for GuestEvents {
    fn io_error(&self, error: IoError) {
        self.put(GuestEvent::Disk(error));
    }
}

impl Shared {
    /// Does what the vCPUs' events ask for. Whether there was any.
    pub(super) fn handle_guest_events(&self, state: &mut State) -> bool {
        let mut any = false;
        while let Some(event) = self.guest_events.take() {
            any = true;
            match event {
                GuestEvent::Vcpu(vcpu, event) => self.vcpu_event(state, vcpu, event),
                GuestEvent::Disk(error) => self.disk_error(state, &error),
                GuestEvent::MemoryCame => {
                    if let Some(cause) = state.awaited_reset {
                        self.reset(state, cause);
                    }
                }
            }
        }
        any
    }

    fn vcpu_event(&self, state: &mut State, vcpu: u32, event: VcpuEvent) {
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

    /// A disk of the guest's had an error; without space on the host the guest is stopped, until
    /// `cont` makes its disk try again.
    fn disk_error(&self, state: &mut State, error: &IoError) {
        let stop = error.action == Action::Stop;
        self.emit(EventKind::block_io_error(error));
        if stop && state.run == RunState::Running {
            error!(
                disk = error.disk,
                "the guest is stopped: {}; make room and continue it ('cont')", error.reason
            );
            state.stop_guest(self, RunState::IoError);
        }
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
            // It may be reset and run again, for which all of its memory is needed.
            self.emit(EventKind::shutdown(cause));
            return;
        }
        if let Some(incoming) = &state.incoming {
            incoming.guest_ended("it has shut down");
        }
        self.exit(cause, Exit::Success);
    }

    /// Resets the machine; it runs afterwards if it ran before. While memory of its is missing, it
    /// only stands still: the reset follows when all has come.
    pub(super) fn reset(&self, state: &mut State, cause: ShutdownCause) {
        if state.memory_missing().is_some() {
            info!(
                ?cause,
                "the machine resets as soon as all of its memory has come"
            );
            state.awaited_reset.get_or_insert(cause);
            state.still_guest();
            return;
        }
        state.awaited_reset = None;
        let Some(guest) = &state.guest else { return };
        let ran = state.run == RunState::Running;
        if !state.still_guest() {
            error!("the machine can't be reset: memory that it waits for never comes");
            return;
        }
        // What the vCPUs asked for until here is moot.
        self.guest_events.forget();
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
