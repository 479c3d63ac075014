//! What the driver wishes of the device.

use tracing::{debug, warn};

use super::Shared;
use super::mac::MacAddress;
use super::spec::{CONTROL, control, feature};
use crate::virtio::activation::Activation;
use crate::virtio::chain::Chain;

/// Answers all commands in the queue.
pub(super) fn serve(shared: &Shared, activation: &Activation) {
    activation.serve(CONTROL, |chain| {
        // The longest command is one with 8 bytes.
        let mut bytes = [0; 16];
        let len = chain.read(activation.memory(), 0, &mut bytes);
        let command = bytes.get(..len).unwrap_or_default();
        let ack = match carry_out(shared, activation, command) {
            Some(()) => control::OK,
            None => {
                debug!(device = shared.name, ?command, "a command that can't be");
                control::ERR
            }
        };
        answer(activation, chain, ack)
    });
}

fn answer(activation: &Activation, chain: &Chain, ack: u8) -> u32 {
    chain.write(activation.memory(), 0, &[ack]) as u32
}

fn carry_out(shared: &Shared, activation: &Activation, command: &[u8]) -> Option<()> {
    let (class, rest) = command.split_first()?;
    let (command, data) = rest.split_first()?;
    match (*class, *command) {
        (control::MAC, control::MAC_ADDR_SET) if activation.has(feature::CTRL_MAC_ADDR) => {
            let address = MacAddress(data.try_into().ok()?);
            shared.state().mac = Some(address).filter(|address| address.is_unicast())?;
        }
        (control::ANNOUNCE, control::ANNOUNCE_ACK)
            if activation.has(feature::GUEST_ANNOUNCE) && data.is_empty() =>
        {
            shared.state().announce = false;
        }
        (control::GUEST_OFFLOADS, control::GUEST_OFFLOADS_SET)
            if activation.has(feature::CTRL_GUEST_OFFLOADS) =>
        {
            let offloads = u64::from_le_bytes(data.try_into().ok()?);
            if offloads & !feature::GUEST_OFFLOADS != 0 || !activation.has(offloads) {
                return None;
            }
            if let Err(err) = shared.tap.set_guest_offloads(offloads) {
                warn!(device = shared.name, %err, "the tap's offloads can't be set");
                return None;
            }
            shared.state().guest_offloads = Some(offloads);
        }
        _ => return None,
    }
    Some(())
}
