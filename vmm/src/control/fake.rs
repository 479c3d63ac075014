//! A machine without a guest, for the tests of the control plane.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::broadcast;

use super::command::*;

pub(crate) struct FakeMachine {
    state: Mutex<State>,
    events: broadcast::Sender<Event>,
}

pub(crate) struct State {
    pub(crate) name: Option<String>,
    pub(crate) run_state: RunState,
    pub(crate) disks: Vec<BlockInfo>,
    pub(crate) info: MigrationInfo,
    pub(crate) forecast: MigrationForecast,
    pub(crate) dirty_rate: DirtyRateInfo,
    pub(crate) dirty_limits: Vec<DirtyLimitInfo>,
    pub(crate) parameters: MigrationParameters,
    pub(crate) capabilities: Capabilities,
    pub(crate) balloon: BalloonInfo,
    pub(crate) snapshots: Vec<SnapshotInfo>,
    /// The commands that arrived, in words.
    pub(crate) calls: Vec<String>,
    /// What the next command that can fail fails with.
    pub(crate) failure: Option<CommandError>,
}

impl FakeMachine {
    pub(crate) fn new() -> Arc<Self> {
        let state = State {
            name: Some("fake".into()),
            run_state: RunState::Running,
            disks: Vec::new(),
            info: MigrationInfo::default(),
            forecast: MigrationForecast::default(),
            dirty_rate: DirtyRateInfo::default(),
            dirty_limits: Vec::new(),
            parameters: MigrationParameters::default(),
            capabilities: Capabilities::default(),
            balloon: BalloonInfo {
                actual: 512 << 20,
                ferry: None,
            },
            snapshots: Vec::new(),
            calls: Vec::new(),
            failure: None,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            events: broadcast::channel(256).0,
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn send(&self, kind: EventKind) {
        // Without a subscriber there is nobody to tell.
        let _ = self.events.send(Event::now(kind));
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.state().calls)
    }

    /// Puts the migration under way into this status.
    pub(crate) fn migration(&self, info: MigrationInfo) {
        let status = info.status;
        self.state().info = info;
        self.send(EventKind::Migration { status });
    }

    fn call(&self, what: impl Into<String>) -> CommandResult<()> {
        let mut state = self.state();
        state.calls.push(what.into());
        state.failure.take().map_or(Ok(()), Err)
    }
}

impl Control for FakeMachine {
    fn name(&self) -> Option<String> {
        self.state().name.clone()
    }

    fn status(&self) -> StatusInfo {
        self.state().run_state.into()
    }

    fn cpus(&self) -> Vec<CpuInfo> {
        (0..2)
            .map(|index| CpuInfo {
                index,
                thread_id: 100 + index as i32,
                halted: index == 1,
            })
            .collect()
    }

    fn disks(&self) -> Vec<BlockInfo> {
        self.state().disks.clone()
    }

    fn registers(&self, cpu: u32) -> CommandResult<String> {
        match cpu {
            0 | 1 => Ok(format!("RAX={cpu:016x}\nRIP=0000000000100000\n")),
            _ => Err(CommandError::generic(format!("there is no vCPU {cpu}"))),
        }
    }

    fn stop(&self) -> CommandResult<()> {
        self.call("stop")?;
        self.state().run_state = RunState::Paused;
        self.send(EventKind::Stop);
        Ok(())
    }

    fn cont(&self) -> CommandResult<()> {
        self.call("cont")?;
        self.state().run_state = RunState::Running;
        self.send(EventKind::Resume);
        Ok(())
    }

    fn system_reset(&self) -> CommandResult<()> {
        self.call("system_reset")?;
        self.send(EventKind::reset(ShutdownCause::HostQmpSystemReset));
        Ok(())
    }

    fn system_powerdown(&self) -> CommandResult<()> {
        self.call("system_powerdown")?;
        self.send(EventKind::Powerdown);
        Ok(())
    }

    fn balloon(&self) -> CommandResult<BalloonInfo> {
        Ok(self.state().balloon.clone())
    }

    fn set_balloon(&self, bytes: u64) -> CommandResult<()> {
        self.call(format!("balloon {bytes}"))
    }

    fn networks(&self) -> Vec<NetworkInfo> {
        vec![NetworkInfo {
            name: "net0".into(),
            mac: "52:54:00:12:34:56".into(),
            ifname: "tap3".into(),
            link_up: true,
            received: (7, 1),
            sent: (5, 0),
        }]
    }

    fn set_link(&self, name: &str, up: bool) -> CommandResult<()> {
        self.call(format!("set_link {name} {up}"))
    }

    fn announce_self(&self, request: AnnounceRequest) -> CommandResult<()> {
        self.call(format!(
            "announce_self {:?} rounds {:?}",
            request.interfaces, request.how.rounds
        ))
    }

    fn quit(&self, cause: ShutdownCause, force: bool) -> CommandResult<()> {
        let force = if force { " by force" } else { "" };
        self.call(format!("quit {cause:?}{force}"))?;
        self.send(EventKind::shutdown(cause));
        Ok(())
    }

    fn migrate(&self, request: MigrateRequest) -> CommandResult<()> {
        let resume = if request.resume { "-r " } else { "" };
        self.call(format!("migrate {resume}{}", request.address))?;
        self.migration(MigrationInfo {
            status: MigrationStatus::Setup,
            ..Default::default()
        });
        Ok(())
    }

    fn migrate_cancel(&self) -> CommandResult<()> {
        self.call("migrate_cancel")?;
        if self.migration_info().status.is_running() {
            let status = MigrationStatus::Cancelled;
            self.migration(MigrationInfo {
                status,
                ..Default::default()
            });
        }
        Ok(())
    }

    fn migrate_start_postcopy(&self) -> CommandResult<()> {
        self.call("migrate_start_postcopy")
    }

    fn migrate_pause(&self) -> CommandResult<()> {
        self.call("migrate_pause")
    }

    fn migrate_recover(&self, address: Uri) -> CommandResult<()> {
        self.call(format!("migrate_recover {address}"))
    }

    fn migrate_incoming(&self, address: Uri, exit_on_error: bool) -> CommandResult<()> {
        self.call(format!("migrate_incoming {address} {exit_on_error}"))
    }

    fn save_snapshot(&self, tag: Option<String>) -> CommandResult<Work> {
        Ok(Work::done(self.call(format!("savevm {tag:?}"))))
    }

    fn load_snapshot(&self, tag: &str) -> CommandResult<Work> {
        Ok(Work::done(self.call(format!("loadvm {tag}"))))
    }

    fn delete_snapshot(&self, tag: &str) -> CommandResult<Work> {
        Ok(Work::done(self.call(format!("delvm {tag}"))))
    }

    fn snapshots(&self) -> CommandResult<Vec<SnapshotInfo>> {
        Ok(self.state().snapshots.clone())
    }

    fn migration_info(&self) -> MigrationInfo {
        self.state().info.clone()
    }

    fn calc_dirty_rate(&self, request: DirtyRateRequest) -> CommandResult<()> {
        self.call(format!(
            "calc_dirty_rate {} {} {}",
            request.calc_time, request.sample_pages, request.mode
        ))
    }

    fn dirty_rate(&self) -> DirtyRateInfo {
        self.state().dirty_rate.clone()
    }

    fn set_vcpu_dirty_limit(&self, cpu: Option<u64>, rate: u64) -> CommandResult<()> {
        self.call(format!("set_vcpu_dirty_limit {rate} {cpu:?}"))
    }

    fn cancel_vcpu_dirty_limit(&self, cpu: Option<u64>) -> CommandResult<()> {
        self.call(format!("cancel_vcpu_dirty_limit {cpu:?}"))
    }

    fn vcpu_dirty_limits(&self) -> Vec<DirtyLimitInfo> {
        self.state().dirty_limits.clone()
    }

    fn migration_forecast(&self, bandwidth: u64) -> CommandResult<MigrationForecast> {
        let forecast = MigrationForecast {
            bandwidth,
            ..self.state().forecast
        };
        self.state().failure.take().map_or(Ok(forecast), Err)
    }

    fn parameters(&self) -> MigrationParameters {
        self.state().parameters
    }

    fn set_parameters(&self, change: ParameterChange) -> CommandResult<()> {
        change.apply(&mut self.state().parameters);
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        self.state().capabilities
    }

    fn set_capabilities(&self, changes: &[MigrationCapabilityStatus]) -> CommandResult<()> {
        let mut state = self.state();
        state.capabilities = state.capabilities.after(changes);
        Ok(())
    }

    fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }
}
