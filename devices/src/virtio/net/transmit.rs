//! From the guest to the tap.

use super::Shared;
use super::spec::{LONGEST_PACKET, SHORTEST_PACKET, TRANSMIT, feature, header};
use super::tap::{MAX_BUFFERS, Transfer};
use crate::virtio::activation::Activation;
use crate::virtio::chain::{Chain, pieces};

/// The most packets between two looks at all else that is to be done.
const BATCH: usize = 64;

/// Sends what the guest gives.
#[derive(Debug, Default)]
pub(super) struct Transmitter {
    /// The tap takes no more for now.
    blocked: bool,
}

impl Transmitter {
    /// Whether it waits until the tap takes more.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Sends what is there, a batch at most; the queue's notifier says if there is more.
    pub(super) fn transmit(&mut self, shared: &Shared, activation: &Activation) {
        self.blocked = false;
        activation.want_notifications(TRANSMIT, false);
        let mut any = false;
        for _ in 0..BATCH {
            let Some(chain) = activation.pop(TRANSMIT) else {
                if any {
                    activation.notify(TRANSMIT);
                    any = false;
                }
                if activation.want_notifications(TRANSMIT, true) {
                    continue;
                }
                return;
            };
            match send(shared, activation, &chain) {
                Transfer::WouldBlock => {
                    activation.put_back(TRANSMIT);
                    self.blocked = true;
                    break;
                }
                Transfer::Done(_) => shared.counters.sent(),
                Transfer::Lost => shared.counters.send_dropped(),
                Transfer::Gone => {
                    shared.counters.send_dropped();
                    shared.tap_is_gone();
                }
            }
            activation.complete(TRANSMIT, chain.head, 0);
            any = true;
        }
        if any {
            activation.notify(TRANSMIT);
        }
        if !self.blocked
            && let Some(notifier) = activation.notifier(TRANSMIT)
        {
            notifier.notify();
        }
    }
}

fn send(shared: &Shared, activation: &Activation, chain: &Chain) -> Transfer {
    let mut header = [0; header::LEN];
    let len = chain.readable_len();
    let fits = (header::LEN + SHORTEST_PACKET) as u64..=(header::LEN + LONGEST_PACKET) as u64;
    // A copy: the guest can't change what was checked.
    chain.read(activation.memory(), 0, &mut header);
    if !fits.contains(&len)
        || chain.readable.len() > MAX_BUFFERS
        || !is_negotiated(&header, activation)
        || !shared.is_connected()
    {
        return Transfer::Lost;
    }
    let packet: Vec<_> = pieces(&chain.readable, header::LEN as u64, len).collect();
    shared
        .tap
        .write(activation.memory(), &header, packet.iter())
}

/// Whether the packet asks only for what was agreed upon. The kernel checks the rest.
fn is_negotiated(header: &[u8; header::LEN], activation: &Activation) -> bool {
    let [flags, gso, ..] = *header;
    let mut needed = match gso & !header::GSO_ECN {
        header::GSO_NONE => 0,
        header::GSO_TCPV4 => feature::HOST_TSO4,
        header::GSO_TCPV6 => feature::HOST_TSO6,
        header::GSO_UDP_L4 => feature::HOST_USO,
        _ => return false,
    };
    if gso & header::GSO_ECN != 0 {
        needed |= feature::HOST_ECN;
    }
    if flags & header::FLAG_NEEDS_CSUM != 0 {
        needed |= feature::CSUM;
    }
    activation.has(needed)
}
