//! From the tap to the guest.

use std::collections::VecDeque;

use tracing::debug;

use super::Shared;
use super::spec::{ETHERNET_HEADER, LONGEST_PACKET, RECEIVE, feature, header};
use super::tap::{MAX_BUFFERS, Transfer};
use crate::virtio::activation::Activation;
use crate::virtio::chain::Chain;

/// The most packets between two looks at all else that is to be done.
const BATCH: usize = 64;

/// Puts packets into the guest's buffers.
///
/// How long a packet is shows when it is read. So with merged buffers there have to be enough for
/// the longest first; they are taken from the queue, and those that a packet doesn't need are kept
/// for the next.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Buffers taken from the queue, and what has room in them.
    held: VecDeque<Chain>,
    room: u64,
    buffers: usize,
    /// The most room that there has been: a guest that never gives enough for the longest packet
    /// gets what fits.
    most: u64,
    /// The guest has given too few buffers; it will say when there are more.
    starved: bool,
    /// Takes what doesn't fit.
    rest: Box<[u8]>,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            held: VecDeque::new(),
            room: 0,
            buffers: 0,
            most: 0,
            starved: true,
            rest: vec![0; header::LEN + LONGEST_PACKET].into(),
        }
    }

    /// Whether a packet can be received.
    pub(super) fn is_ready(&self) -> bool {
        !self.starved
    }

    /// Takes buffers from the queue, until a packet can be received or there are none.
    pub(super) fn refill(&mut self, shared: &Shared, activation: &Activation) {
        let wanted = wanted(shared, activation);
        activation.want_notifications(RECEIVE, false);
        while self.room < wanted && self.buffers < MAX_BUFFERS {
            if let Some(chain) = activation.pop(RECEIVE) {
                self.hold(activation, chain);
            } else if self.room > 0 && self.room >= self.most {
                break;
            } else if !activation.want_notifications(RECEIVE, true) {
                self.starved = true;
                return;
            }
        }
        self.starved = false;
    }

    fn hold(&mut self, activation: &Activation, chain: Chain) {
        if chain.writable_len() < header::LEN as u64 || chain.writable.len() > MAX_BUFFERS {
            debug!("virtio-net: a buffer that no packet fits into");
            activation.complete(RECEIVE, chain.head, 0);
            activation.notify(RECEIVE);
            return;
        }
        self.room += chain.writable_len();
        self.buffers += chain.writable.len();
        self.held.push_back(chain);
        self.most = self.most.max(self.room);
    }

    /// Receives what has come, a batch at most.
    pub(super) fn receive(&mut self, shared: &Shared, activation: &Activation) {
        if !shared.link_is_up() {
            return discard(shared);
        }
        let mut any = false;
        for _ in 0..BATCH {
            self.refill(shared, activation);
            if self.starved {
                break;
            }
            let merged = activation.has(feature::MRG_RXBUF);
            let usable = if merged { self.fitting() } else { 1 };
            let buffers = self.held.iter().take(usable).flat_map(|c| &c.writable);
            match shared
                .tap
                .read(activation.memory(), buffers, &mut self.rest)
            {
                Transfer::Done(len) => any |= self.give(shared, activation, usable, len),
                Transfer::WouldBlock => break,
                Transfer::Lost => {
                    shared.counters.receive_dropped();
                    break;
                }
                Transfer::Gone => {
                    shared.tap_is_gone();
                    break;
                }
            }
        }
        if any {
            activation.notify(RECEIVE);
        }
    }

    /// How many of the chains can be used at once.
    fn fitting(&self) -> usize {
        let mut buffers = 0;
        let fitting = self.held.iter().take_while(|chain| {
            buffers += chain.writable.len();
            buffers <= MAX_BUFFERS
        });
        fitting.count()
    }

    /// Gives a packet of `len` bytes, which is in the first buffers, to the guest. Whether it
    /// was.
    fn give(
        &mut self,
        shared: &Shared,
        activation: &Activation,
        usable: usize,
        len: usize,
    ) -> bool {
        let mut left = len as u64;
        let mut used = Vec::new();
        for chain in self.held.iter().take(usable) {
            let part = left.min(chain.writable_len());
            used.push((chain.head, part as u32));
            left -= part;
            if left == 0 {
                break;
            }
        }
        if left > 0 || len <= header::LEN {
            // It doesn't fit: the buffers are for the next.
            shared.counters.receive_dropped();
            return false;
        }
        // The kernel leaves this field to us.
        if let Some(first) = self.held.front() {
            let count = (used.len() as u16).to_le_bytes();
            first.write(activation.memory(), header::NUM_BUFFERS, &count);
        }
        for chain in self.held.drain(..used.len()) {
            self.room -= chain.writable_len();
            self.buffers -= chain.writable.len();
        }
        activation.complete_all(RECEIVE, &used);
        shared.counters.received();
        true
    }

    /// Puts the buffers back into the queue.
    pub(super) fn give_back(&mut self, activation: &Activation) {
        for _ in self.held.drain(..) {
            activation.put_back(RECEIVE);
        }
        self.room = 0;
        self.buffers = 0;
        self.most = 0;
        self.starved = true;
    }
}

/// The room that the longest packet takes; of buffers that are not merged it takes one.
fn wanted(shared: &Shared, activation: &Activation) -> u64 {
    let longest = if !activation.has(feature::MRG_RXBUF) {
        return 1;
    } else if activation.negotiated(feature::GUEST_SEGMENTS) != 0 {
        LONGEST_PACKET
    } else {
        usize::from(shared.tap.mtu()) + ETHERNET_HEADER
    };
    (header::LEN + longest) as u64
}

/// With the link down packets are lost.
fn discard(shared: &Shared) {
    for _ in 0..BATCH {
        match shared.tap.discard() {
            Transfer::Done(_) | Transfer::Lost => shared.counters.receive_dropped(),
            Transfer::WouldBlock => return,
            Transfer::Gone => return shared.tap_is_gone(),
        }
    }
}
