//! The commands, as this process carries them out.

use std::sync::Arc;

use devices::virtio::balloon::Balloon;
use tokio::sync::broadcast;
use tracing::{info as log, warn};

use super::{Exit, Instance, State, info};
use crate::control::command::{
    AnnounceRequest, BalloonInfo, BlockInfo, Capabilities, CommandError, CommandResult, Control,
    CpuInfo, DirtyLimitInfo, DirtyRateInfo, DirtyRateRequest, ErrorClass, Event, EventKind,
    FerryBalloonInfo, MigrateRequest, MigrationCapabilityStatus, MigrationForecast, MigrationInfo,
    MigrationParameters, NetworkInfo, ParameterChange, RunState, ShutdownCause, SnapshotInfo,
    StatusInfo, Uri, Work,
};
use crate::machine::{Machine, backends};

impl State {
    pub(super) fn guest(&self) -> CommandResult<&Arc<Machine>> {
        self.guest
            .as_ref()
            .ok_or_else(|| CommandError::generic("there is no guest here yet"))
    }
}

impl Control for Instance {
    fn name(&self) -> Option<String> {
        self.0.state().name.clone()
    }

    fn status(&self) -> StatusInfo {
        self.0.state().run.into()
    }

    fn cpus(&self) -> Vec<CpuInfo> {
        match &self.0.state().guest {
            Some(guest) => guest.cpus(),
            None => Vec::new(),
        }
    }

    fn disks(&self) -> Vec<BlockInfo> {
        match &self.0.state().guest {
            Some(guest) => guest
                .disks()
                .iter()
                .map(|disk| BlockInfo::of(disk))
                .collect(),
            None => Vec::new(),
        }
    }

    fn registers(&self, cpu: u32) -> CommandResult<String> {
        let mut state = self.0.state();
        let guest = Arc::clone(state.guest()?);
        state.refuse_while_paused("info registers")?;
        let runs = state.run == RunState::Running;
        if runs || state.memory_missing().is_some() {
            state.pause_guest()?;
        }
        let registers = guest.registers(cpu);
        if runs
            && state.awaited_reset.is_none()
            && let Err(err) = guest.run()
        {
            state.run = RunState::InternalError;
            return Err(CommandError::generic(err.to_string()));
        }
        registers.map_err(|err| CommandError::generic(err.to_string()))
    }

    fn stop(&self) -> CommandResult<()> {
        let mut state = self.0.state();
        match state.run {
            RunState::Running => {
                state.refuse_while_paused("stop")?;
                state.pause_guest()?;
                state.stop_guest(&self.0, RunState::Paused);
            }
            RunState::Inmigrate | RunState::RestoreVm => state.autostart = false,
            RunState::FinishMigrate => return Err(handing_over("stop")),
            RunState::SaveVm => return Err(saving("stop")),
            _ => {}
        }
        Ok(())
    }

    fn cont(&self) -> CommandResult<()> {
        let mut state = self.0.state();
        match state.run {
            RunState::Running => Ok(()),
            RunState::Inmigrate | RunState::RestoreVm => {
                state.autostart = true;
                Ok(())
            }
            RunState::FinishMigrate => Err(handing_over("cont")),
            RunState::SaveVm => Err(saving("cont")),
            RunState::Shutdown | RunState::InternalError | RunState::GuestPanicked => Err(
                CommandError::generic("Resetting the Virtual Machine is required"),
            ),
            RunState::Postmigrate => {
                match &state.outgoing {
                    Some(outgoing) if outgoing.guest_is_elsewhere() => {
                        return Err(CommandError::generic(
                            "the guest has moved: it belongs to the destination, and is never \
                             run twice",
                        ));
                    }
                    Some(outgoing) if outgoing.guest_is_in_file() => log!(
                        "the guest was saved to a file, and runs on here: what it writes to its \
                         disks from now on, the file does not know"
                    ),
                    _ => warn!(
                        "'cont' overrides an unfinished hand-over: if the guest runs at the \
                         destination, it now runs twice"
                    ),
                }
                self.run(&mut state)?;
                if let Some(outgoing) = &state.outgoing {
                    outgoing.take_back();
                }
                // The network may have heard of it from the destination.
                state.announce();
                Ok(())
            }
            RunState::Paused | RunState::Prelaunch | RunState::IoError | RunState::Debug => {
                self.run(&mut state)
            }
        }
    }

    fn system_reset(&self) -> CommandResult<()> {
        let mut state = self.0.state();
        state.guest()?;
        match state.run {
            RunState::FinishMigrate => Err(handing_over("system_reset")),
            RunState::SaveVm => Err(saving("system_reset")),
            RunState::Postmigrate | RunState::Inmigrate => Err(CommandError::generic(format!(
                "the guest is not here to be reset (state '{}')",
                state.run
            ))),
            _ => {
                state.refuse_while_paused("system_reset")?;
                self.0.reset(&mut state, ShutdownCause::HostQmpSystemReset);
                Ok(())
            }
        }
    }

    fn system_powerdown(&self) -> CommandResult<()> {
        let state = self.0.state();
        let guest = state.guest()?;
        match state.run {
            RunState::FinishMigrate => Err(handing_over("system_powerdown")),
            RunState::SaveVm => Err(saving("system_powerdown")),
            RunState::Postmigrate | RunState::Inmigrate => Err(CommandError::generic(format!(
                "the guest is not here to be powered down (state '{}')",
                state.run
            ))),
            _ => {
                guest.devices().press_power_button();
                self.0.emit(EventKind::Powerdown);
                Ok(())
            }
        }
    }

    fn balloon(&self) -> CommandResult<BalloonInfo> {
        let state = self.0.state();
        let balloon = balloon(&state)?;
        let ferry = balloon.guest_stats().map(|stats| FerryBalloonInfo {
            guest_stats: stats.iter().collect(),
            guest_stats_age: u64::try_from(stats.at().elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        Ok(BalloonInfo {
            actual: balloon.actual(),
            ferry,
        })
    }

    fn set_balloon(&self, bytes: u64) -> CommandResult<()> {
        let state = self.0.state();
        let balloon = balloon(&state)?;
        match state.run {
            RunState::FinishMigrate => Err(handing_over("balloon")),
            RunState::Postmigrate => Err(CommandError::generic(
                "the guest is not here any more: its balloon is at the destination",
            )),
            _ if bytes == 0 => Err(CommandError::generic("Parameter 'value' expects a size")),
            _ => {
                balloon.set_target(bytes);
                Ok(())
            }
        }
    }

    fn networks(&self) -> Vec<NetworkInfo> {
        self.network_info()
    }

    fn set_link(&self, name: &str, up: bool) -> CommandResult<()> {
        self.plug_link(name, up)
    }

    fn announce_self(&self, request: AnnounceRequest) -> CommandResult<()> {
        self.announce(request)
    }

    fn quit(&self, cause: ShutdownCause, force: bool) -> CommandResult<()> {
        if !force {
            self.0.state().refuse_to_end()?;
        }
        self.0.exit(cause, Exit::Success);
        Ok(())
    }

    fn migrate(&self, request: MigrateRequest) -> CommandResult<()> {
        if request.resume {
            self.resume_migration(&request.address)
        } else {
            self.start_migration(request)
        }
    }

    fn migrate_cancel(&self) -> CommandResult<()> {
        match &self.0.state().outgoing {
            Some(outgoing) => outgoing.cancel(),
            None => Ok(()),
        }
    }

    fn migrate_start_postcopy(&self) -> CommandResult<()> {
        self.start_postcopy()
    }

    fn migrate_pause(&self) -> CommandResult<()> {
        self.pause_migration()
    }

    fn migrate_recover(&self, address: Uri) -> CommandResult<()> {
        self.recover_migration(&address)
    }

    fn migrate_incoming(&self, address: Uri, exit_on_error: bool) -> CommandResult<()> {
        self.start_incoming(&address, exit_on_error)
    }

    fn save_snapshot(&self, tag: Option<String>) -> CommandResult<Work> {
        self.begin_save(tag)
    }

    fn load_snapshot(&self, tag: &str) -> CommandResult<Work> {
        self.begin_load(tag)
    }

    fn delete_snapshot(&self, tag: &str) -> CommandResult<Work> {
        self.begin_delete(tag)
    }

    fn snapshots(&self) -> CommandResult<Vec<SnapshotInfo>> {
        self.list_snapshots()
    }

    fn migration_info(&self) -> MigrationInfo {
        self.show_migration()
    }

    fn calc_dirty_rate(&self, request: DirtyRateRequest) -> CommandResult<()> {
        self.measure_dirty_rate(request)
    }

    fn dirty_rate(&self) -> DirtyRateInfo {
        self.show_dirty_rate()
    }

    fn set_vcpu_dirty_limit(&self, cpu: Option<u64>, rate: u64) -> CommandResult<()> {
        self.limit_vcpu_writes(cpu, rate)
    }

    fn cancel_vcpu_dirty_limit(&self, cpu: Option<u64>) -> CommandResult<()> {
        self.unlimit_vcpu_writes(cpu)
    }

    fn vcpu_dirty_limits(&self) -> Vec<DirtyLimitInfo> {
        self.show_vcpu_limits()
    }

    fn migration_forecast(&self, bandwidth: u64) -> CommandResult<MigrationForecast> {
        self.forecast(bandwidth)
    }

    fn parameters(&self) -> MigrationParameters {
        info::parameters(&self.0.parameters, self.0.state().announce)
    }

    fn set_parameters(&self, change: ParameterChange) -> CommandResult<()> {
        change.check()?;
        change.announce.apply(&mut self.0.state().announce);
        info::change(&self.0.parameters, change)
    }

    fn capabilities(&self) -> Capabilities {
        self.0.state().capabilities
    }

    fn set_capabilities(&self, changes: &[MigrationCapabilityStatus]) -> CommandResult<()> {
        self.switch_capabilities(changes)
    }

    fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }
}

impl Instance {
    fn run(&self, state: &mut State) -> CommandResult<()> {
        let guest = state.guest()?;
        // They may have been given away to a migration. Not while memory is missing: they are
        // locked since the guest is here, and a request may be using them that waits for memory.
        if state.memory_missing().is_none() {
            backends::lock(guest.disks()).map_err(|err| CommandError::generic(err.to_string()))?;
        }
        state
            .run_guest(&self.0)
            .map_err(|err| CommandError::generic(format!("the guest can't run: {err}")))
    }
}

fn balloon(state: &State) -> CommandResult<&Balloon> {
    match state.guest()?.devices().balloon() {
        Some(balloon) => Ok(balloon),
        None => Err(CommandError::new(
            ErrorClass::DeviceNotActive,
            "No balloon device has been activated",
        )),
    }
}

pub(super) fn handing_over(command: &str) -> CommandError {
    CommandError::generic(format!(
        "the guest is being handed over to the destination: '{command}' is possible before or \
         after that"
    ))
}

fn saving(command: &str) -> CommandError {
    CommandError::generic(format!(
        "a snapshot of the guest is being saved: '{command}' is possible before or after that"
    ))
}
