//! The device's saved state, and its check.

use serde::{Deserialize, Serialize};

use super::mac::MacAddress;
use super::spec::{feature, status};
use super::{Net, State};
use crate::state::{SaveRestore, StateError, decode, encode};

const VERSION: u32 = 1;

/// Version 1 of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedNet {
    /// The address that the driver has set, or the configured one.
    pub(super) mac: [u8; 6],
    /// Bits of the status in the configuration space.
    pub(super) status: u16,
    /// The MTU that the driver is told; 0 if it isn't.
    pub(super) mtu: u16,
    /// What the driver has made of the offloads of packets that it receives.
    pub(super) guest_offloads: Option<u64>,
}

impl SavedNet {
    fn new(state: &State, mtu: Option<u16>) -> Self {
        let State {
            mac,
            link_up,
            announce,
            guest_offloads,
        } = *state;
        let bit = |on, bit| if on { bit } else { 0 };
        Self {
            mac: mac.0,
            status: bit(link_up, status::LINK_UP) | bit(announce, status::ANNOUNCE),
            mtu: mtu.unwrap_or(0),
            guest_offloads,
        }
    }

    fn check(self, device: &str, configured: Option<u16>) -> Result<State, StateError> {
        let Self {
            mac,
            status,
            mtu,
            guest_offloads,
        } = self;
        let field =
            |name, value, valid, expected| StateError::unless(valid, device, name, value, expected);
        let [a, b, c, d, e, f] = mac;
        field(
            "mac",
            u64::from_be_bytes([0, 0, a, b, c, d, e, f]),
            MacAddress(mac).is_unicast(),
            "a card's address",
        )?;
        field(
            "status",
            status.into(),
            status & !(status::LINK_UP | status::ANNOUNCE) == 0,
            "bits 0 and 1",
        )?;
        field(
            "mtu",
            mtu.into(),
            mtu == configured.unwrap_or(0),
            "the MTU of the machine's configuration",
        )?;
        let offloads = guest_offloads.unwrap_or(0);
        field(
            "guest_offloads",
            offloads,
            offloads & !feature::GUEST_OFFLOADS == 0,
            "features about packets that the guest receives",
        )?;
        Ok(State {
            mac: MacAddress(mac),
            link_up: status & status::LINK_UP != 0,
            announce: status & status::ANNOUNCE != 0,
            guest_offloads,
        })
    }
}

impl SaveRestore for Net {
    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let saved = SavedNet::new(&self.shared.state(), self.config.mtu);
        encode(&self.shared.name, &saved)
    }

    fn restore(&self, _version: u32, body: &[u8]) -> Result<(), StateError> {
        let saved: SavedNet = decode(&self.shared.name, body)?;
        *self.shared.state() = saved.check(&self.shared.name, self.config.mtu)?;
        Ok(())
    }
}
