//! What migrations are allowed to do beyond the ordinary: QAPI's capabilities.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::command::{CommandError, CommandResult};

/// QAPI's `MigrationCapability`, as far as Ferry has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationCapability {
    /// A guest that writes faster than its memory moves is slowed down.
    AutoConverge,
    /// The same, but only those vCPUs that write, as much as the link asks.
    DirtyLimit,
    /// MIGRATION and MIGRATION_PASS are sent.
    Events,
    /// The guest may move ahead of its memory.
    PostcopyRam,
    /// Pages that are sent again go as differences to what was sent before.
    Xbzrle,
    /// Pages go on several connections.
    Multifd,
    /// Pages go into the network without a copy into the kernel.
    ZeroCopySend,
    /// Each page goes with a checksum.
    #[serde(rename = "x-page-checksum")]
    PageChecksum,
}

impl MigrationCapability {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::AutoConverge,
        Self::DirtyLimit,
        Self::Events,
        Self::PostcopyRam,
        Self::Xbzrle,
        Self::Multifd,
        Self::ZeroCopySend,
        Self::PageChecksum,
    ];

    /// The name in QMP and in the monitor.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AutoConverge => "auto-converge",
            Self::DirtyLimit => "dirty-limit",
            Self::Events => "events",
            Self::PostcopyRam => "postcopy-ram",
            Self::Xbzrle => "xbzrle",
            Self::Multifd => "multifd",
            Self::ZeroCopySend => "zero-copy-send",
            Self::PageChecksum => "x-page-checksum",
        }
    }
}

impl fmt::Display for MigrationCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for MigrationCapability {
    type Err = CommandError;

    fn from_str(name: &str) -> CommandResult<Self> {
        let known = Self::ALL.into_iter().find(|known| known.as_str() == name);
        known.ok_or_else(|| {
            CommandError::generic(format!(
                "Parameter 'capability' does not accept value '{name}'"
            ))
        })
    }
}

/// QAPI's `MigrationCapabilityStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MigrationCapabilityStatus {
    /// Which one.
    pub capability: MigrationCapability,
    /// Whether it is on.
    pub state: bool,
}

/// Every capability, on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// [`MigrationCapability::AutoConverge`].
    pub auto_converge: bool,
    /// [`MigrationCapability::DirtyLimit`].
    pub dirty_limit: bool,
    /// [`MigrationCapability::Events`].
    pub events: bool,
    /// [`MigrationCapability::PostcopyRam`].
    pub postcopy_ram: bool,
    /// [`MigrationCapability::Xbzrle`].
    pub xbzrle: bool,
    /// [`MigrationCapability::Multifd`].
    pub multifd: bool,
    /// [`MigrationCapability::ZeroCopySend`].
    pub zero_copy_send: bool,
    /// [`MigrationCapability::PageChecksum`].
    pub page_checksum: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            auto_converge: false,
            dirty_limit: false,
            events: true,
            postcopy_ram: false,
            xbzrle: false,
            multifd: false,
            zero_copy_send: false,
            page_checksum: true,
        }
    }
}

impl Capabilities {
    /// Each with its state.
    pub fn list(self) -> Vec<MigrationCapabilityStatus> {
        let Self {
            auto_converge,
            dirty_limit,
            events,
            postcopy_ram,
            xbzrle,
            multifd,
            zero_copy_send,
            page_checksum,
        } = self;
        let status = |capability| MigrationCapabilityStatus {
            capability,
            state: match capability {
                MigrationCapability::AutoConverge => auto_converge,
                MigrationCapability::DirtyLimit => dirty_limit,
                MigrationCapability::Events => events,
                MigrationCapability::PostcopyRam => postcopy_ram,
                MigrationCapability::Xbzrle => xbzrle,
                MigrationCapability::Multifd => multifd,
                MigrationCapability::ZeroCopySend => zero_copy_send,
                MigrationCapability::PageChecksum => page_checksum,
            },
        };
        MigrationCapability::ALL.map(status).to_vec()
    }

    /// What they are after these changes; the last one of a capability counts.
    pub fn after(mut self, changes: &[MigrationCapabilityStatus]) -> Self {
        for change in changes {
            match change.capability {
                MigrationCapability::AutoConverge => self.auto_converge = change.state,
                MigrationCapability::DirtyLimit => self.dirty_limit = change.state,
                MigrationCapability::Events => self.events = change.state,
                MigrationCapability::PostcopyRam => self.postcopy_ram = change.state,
                MigrationCapability::Xbzrle => self.xbzrle = change.state,
                MigrationCapability::Multifd => self.multifd = change.state,
                MigrationCapability::ZeroCopySend => self.zero_copy_send = change.state,
                MigrationCapability::PageChecksum => self.page_checksum = change.state,
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_has_one_name_everywhere() {
        for capability in MigrationCapability::ALL {
            let name = capability.as_str();
            assert_eq!(serde_json::to_value(capability).unwrap(), name);
            assert_eq!(name.parse(), Ok(capability));
        }
        let error = "warp-drive".parse::<MigrationCapability>().unwrap_err();
        assert!(error.desc.contains("warp-drive"), "{error}");
    }

    #[test]
    fn changes_leave_what_they_do_not_name() {
        let on = MigrationCapabilityStatus {
            capability: MigrationCapability::PostcopyRam,
            state: true,
        };
        let after = Capabilities::default().after(&[on]);
        assert!(after.events && after.postcopy_ram);
        assert_eq!(after.list().len(), MigrationCapability::ALL.len());
        assert!(after.list().contains(&on));
    }
}
