//! What a machine's devices use of the host. It is opened before the machine is built, and never
//! travels: each side of a migration has its own.

use std::collections::VecDeque;
use std::io;

use devices::virtio::net::tap::{Tap, TapError};
use devices::virtio::net::{MacAddress, NetConfig, USUAL_MTU};

use super::config::{Given, VirtioConfig};

/// Why something of the host can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A tap.
    #[error("--net: {0}")]
    Tap(#[from] TapError),
    /// No random numbers for a MAC address.
    #[error("cannot choose a MAC address: {0}")]
    Mac(#[source] io::Error),
}

/// The host's side of the devices, in the order of the command line.
#[derive(Debug, Default)]
pub struct Backends {
    /// For each network card its name in commands, and the tap.
    pub(super) net: VecDeque<(String, Tap)>,
}

impl Backends {
    /// Opens what the command line names.
    pub fn open(given: &Given) -> Result<Self, BackendError> {
        let mut net = VecDeque::new();
        for (index, given) in given.net.iter().enumerate() {
            net.push_back((given.id_at(index), Tap::open(&given.ifname)?));
        }
        Ok(Self { net })
    }

    /// The network cards of a machine that is started here: what their guest sees of the taps.
    pub(super) fn net_configs(&self, given: &Given) -> Result<Vec<VirtioConfig>, BackendError> {
        let config = |(given, (_, tap)): (&super::config::GivenNet, &(String, Tap))| {
            let mac = match given.mac {
                Some(mac) => mac,
                None => MacAddress::random().map_err(BackendError::Mac)?,
            };
            let mtu = Some(tap.mtu()).filter(|&mtu| mtu != USUAL_MTU);
            Ok(VirtioConfig::Net(NetConfig { mac, mtu }))
        };
        given.net.iter().zip(&self.net).map(config).collect()
    }
}
