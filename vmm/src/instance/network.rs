//! The commands about network cards.

use std::sync::Arc;

use devices::virtio::net::Net;

use super::announce::Announcement;
use super::commands::handing_over;
use super::{Instance, State};
use crate::control::command::{
    AnnounceRequest, CommandError, CommandResult, ErrorClass, NetworkInfo, RunState,
};

impl State {
    /// Tells the network that the guest is here, as after a migration.
    pub(super) fn announce(&mut self) {
        if let Some(guest) = &self.guest {
            self.announcement = Announcement::start(guest, None, self.announce);
        }
    }

    fn nets(&self) -> &[(String, Arc<Net>)] {
        let guest = self.guest.as_ref();
        guest.map_or(&[], |guest| guest.devices().nets())
    }

    fn net(&self, name: &str) -> CommandResult<&Arc<Net>> {
        let found = self.nets().iter().find(|(known, _)| known == name);
        found.map(|(_, net)| net).ok_or_else(|| {
            CommandError::new(
                ErrorClass::DeviceNotFound,
                format!("Device '{name}' not found"),
            )
        })
    }

    /// The guest must be here, and not about to leave.
    fn check_here(&self, command: &str) -> CommandResult<()> {
        match self.run {
            RunState::FinishMigrate => Err(handing_over(command)),
            RunState::Postmigrate | RunState::Inmigrate => Err(CommandError::generic(format!(
                "the guest is not here (state '{}')",
                self.run
            ))),
            _ => Ok(()),
        }
    }
}

impl Instance {
    pub(super) fn network_info(&self) -> Vec<NetworkInfo> {
        let state = self.0.state();
        let info = |(name, net): &(String, Arc<Net>)| {
            let packets = net.packets();
            NetworkInfo {
                name: name.clone(),
                mac: net.mac().to_string(),
                ifname: net.tap_name().to_owned(),
                link_up: net.link_is_up(),
                received: (packets.received, packets.receive_dropped),
                sent: (packets.sent, packets.send_dropped),
            }
        };
        state.nets().iter().map(info).collect()
    }

    pub(super) fn plug_link(&self, name: &str, up: bool) -> CommandResult<()> {
        let state = self.0.state();
        let net = state.net(name)?;
        state.check_here("set_link")?;
        net.set_link(up);
        Ok(())
    }

    pub(super) fn announce(&self, request: AnnounceRequest) -> CommandResult<()> {
        let AnnounceRequest { how, interfaces } = request;
        how.check()?;
        let mut state = self.0.state();
        for name in interfaces.iter().flatten() {
            state.net(name)?;
        }
        state.check_here("announce_self")?;
        let mut parameters = state.announce;
        how.apply(&mut parameters);
        if let Some(guest) = state.guest.clone() {
            state.announcement = Announcement::start(&guest, interfaces, parameters);
        }
        Ok(())
    }
}
