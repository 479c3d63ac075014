//! The network device (section 5.1): a card whose packets go to and come from a [tap](tap::Tap)
//! of the host's.
//!
//! [`Net`] is the device. Its thread moves packets ([`receive`], [`transmit`]) and answers the
//! driver's commands ([`control`]). After a migration the network must learn where the guest is:
//! [`Net::announce`] sends a RARP packet, and asks a driver that can to announce itself.
//!
//! Packets are not filtered by address: the guest gets what the tap gives, which a bridge has
//! filtered already.

mod announce;
mod control;
mod counters;
mod mac;
mod port;
mod receive;
mod saved;
mod spec;
pub mod tap;
mod transmit;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tracing::{debug, error};

use self::counters::Counters;
pub use self::counters::PacketCounts;
pub use self::mac::MacAddress;
use self::port::Port;
use self::spec::{CONTROL, OFFLOAD_NAMES, RECEIVE, TRANSMIT, feature, status};
use self::tap::Tap;
use super::activation::Activation;
use super::worker::Worker;
use super::{DeviceKind, VirtioDevice, read_config_bytes};
use crate::state::SaveRestore;

/// The most entries of the queues of packets, as in QEMU, and of the commands' queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// Ethernet's usual MTU, which a driver needn't be told.
pub const USUAL_MTU: u16 = 1500;

/// The least MTU that can be told (section 5.1.4.1).
const LEAST_MTU: u16 = 68;

/// A network device as its guest sees it. It is the same wherever the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// The card's address.
    pub mac: MacAddress,
    /// The MTU in bytes that the driver is told, if it isn't [`USUAL_MTU`].
    pub mtu: Option<u16>,
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    config: NetConfig,
    shared: Arc<Shared>,
    worker: Worker,
}

/// What the device and its thread share.
#[derive(Debug)]
struct Shared {
    name: String,
    tap: Arc<Tap>,
    state: Mutex<State>,
    activation: Mutex<Option<Arc<Activation>>>,
    counters: Counters,
    /// The tap was deleted.
    gone: AtomicBool,
}

/// What changes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    mac: MacAddress,
    link_up: bool,
    /// The driver is to announce the guest, and has not said that it has.
    announce: bool,
    /// What the driver has made of the offloads that it took.
    guest_offloads: Option<u64>,
}

impl Net {
    /// The guest's network device of that index, as after power-on, with the link up.
    pub fn new(index: usize, config: NetConfig, tap: Arc<Tap>) -> io::Result<Self> {
        let mtu = config.mtu.unwrap_or(USUAL_MTU);
        if mtu < LEAST_MTU || !config.mac.is_unicast() {
            return Err(io::Error::other(format!(
                "no card has the MTU {mtu} and the MAC address {}",
                config.mac
            )));
        }
        if tap.mtu() < mtu {
            return Err(io::Error::other(format!(
                "the tap {tap} has an MTU of {} here, but the guest's network device has {mtu}: \
                 ip link set {tap} mtu {mtu}",
                tap.mtu(),
                tap = tap.name(),
            )));
        }
        let shared = Arc::new(Shared {
            name: format!("virtio-net.{index}"),
            tap,
            state: Mutex::new(State {
                mac: config.mac,
                link_up: true,
                announce: false,
                guest_offloads: None,
            }),
            activation: Mutex::default(),
            counters: Counters::default(),
            gone: AtomicBool::new(false),
        });
        let port = Port::new(Arc::clone(&shared));
        let thread = format!("net.{index}");
        Ok(Self {
            config,
            shared,
            worker: Worker::spawn(&thread, &[RECEIVE, TRANSMIT, CONTROL], port)?,
        })
    }

    /// The tap's name.
    pub fn tap_name(&self) -> &str {
        self.shared.tap.name()
    }

    /// The address that the guest uses.
    pub fn mac(&self) -> MacAddress {
        self.shared.state().mac
    }

    /// Whether the cable is plugged in.
    pub fn link_is_up(&self) -> bool {
        self.shared.link_is_up()
    }

    /// Plugs the cable in or out; while it is out, packets are lost.
    pub fn set_link(&self, up: bool) {
        let mut state = self.shared.state();
        if state.link_up == up {
            return;
        }
        state.link_up = up;
        drop(state);
        if let Some(activation) = &*self.shared.activation() {
            activation.interrupt().config_changed();
            // What the thread waits for is different now.
            if let Some(notifier) = activation.notifier(RECEIVE) {
                notifier.notify();
            }
        }
    }

    /// Tells the network that the guest is here: sends a RARP packet, and asks the driver to
    /// announce the guest if it can. Nothing while the link is down. Returns at once.
    pub fn announce(&self) {
        let mac = {
            let state = self.shared.state();
            if !self.shared.is_connected_in(&state) {
                return;
            }
            state.mac
        };
        if let Err(err) = self.shared.tap.write_own(&announce::rarp(mac)) {
            // Perhaps the interface is down still; there will be another try.
            debug!(device = self.shared.name, %err, "no RARP packet could be sent");
        }
        if let Some(activation) = &*self.shared.activation()
            && activation.has(feature::GUEST_ANNOUNCE | feature::CTRL_VQ)
        {
            self.shared.state().announce = true;
            activation.interrupt().config_changed();
        }
    }

    /// How many packets there were.
    pub fn packets(&self) -> PacketCounts {
        self.shared.counters.now()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn activation(&self) -> MutexGuard<'_, Option<Arc<Activation>>> {
        self.activation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn link_is_up(&self) -> bool {
        self.state().link_up
    }

    /// Whether packets can be sent.
    fn is_connected(&self) -> bool {
        self.is_connected_in(&self.state())
    }

    fn is_connected_in(&self, state: &State) -> bool {
        state.link_up && !self.tap_was_gone()
    }

    fn tap_was_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn tap_is_gone(&self) {
        if !self.gone.swap(true, Ordering::Relaxed) {
            error!(
                device = self.name,
                "the tap {} is gone: the guest has no network any more",
                self.tap.name()
            );
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn features(&self) -> u64 {
        let always = feature::MAC
            | feature::STATUS
            | feature::MRG_RXBUF
            | feature::CTRL_VQ
            | feature::CTRL_MAC_ADDR
            | feature::CTRL_GUEST_OFFLOADS
            | feature::GUEST_ANNOUNCE;
        let mtu = self.config.mtu.map_or(0, |_| feature::MTU);
        always | mtu | self.shared.tap.offloads()
    }

    fn explain_missing(&self, features: u64) -> Option<String> {
        let missing = OFFLOAD_NAMES.iter().filter(|(bit, _)| features & bit != 0);
        let names: Vec<_> = missing.map(|(_, name)| *name).collect();
        if names.is_empty() {
            return None;
        }
        Some(format!(
            "features that the tap {} has here: the guest's driver uses {}, which this host's \
             kernel lacks",
            self.tap_name(),
            names.join(", ")
        ))
    }

    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state();
        let mut status = 0;
        if state.link_up {
            status |= status::LINK_UP;
        }
        if state.announce {
            status |= status::ANNOUNCE;
        }
        // struct virtio_net_config; one pair of queues.
        let mut space = state.mac.0.to_vec();
        space.extend(status.to_le_bytes());
        space.extend(1_u16.to_le_bytes());
        space.extend(self.config.mtu.unwrap_or(0).to_le_bytes());
        read_config_bytes(&space, offset, data);
    }

    fn activate(&self, activation: Arc<Activation>) {
        *self.shared.activation() = Some(Arc::clone(&activation));
        self.worker.activate(activation);
    }

    fn reset(&self) {
        self.worker.deactivate();
        *self.shared.activation() = None;
        let mut state = self.shared.state();
        state.mac = self.config.mac;
        state.announce = false;
        state.guest_offloads = None;
    }

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        Some(self)
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests;
