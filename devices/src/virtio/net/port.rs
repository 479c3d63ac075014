//! What the device's thread does.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::PollFlags;
use tracing::error;

use super::receive::Receiver;
use super::spec::{CONTROL, RECEIVE, TRANSMIT, feature};
use super::transmit::Transmitter;
use super::{Shared, control};
use crate::virtio::activation::Activation;
use crate::virtio::worker::Handler;

/// Moves packets between the queues and the tap, both ways.
#[derive(Debug)]
pub(super) struct Port {
    shared: Arc<Shared>,
    receiver: Receiver,
    transmitter: Transmitter,
}

impl Port {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            receiver: Receiver::new(),
            transmitter: Transmitter::default(),
        }
    }

    /// What to wait for at the tap.
    fn interest(&self) -> PollFlags {
        let mut interest = PollFlags::empty();
        if self.shared.tap_was_gone() {
            return interest;
        }
        if self.receiver.is_ready() || !self.shared.link_is_up() {
            interest |= PollFlags::IN;
        }
        if self.transmitter.is_blocked() {
            interest |= PollFlags::OUT;
        }
        interest
    }
}

impl Handler for Port {
    fn start(&mut self, activation: &Arc<Activation>) {
        let offloads = {
            let state = self.shared.state();
            let negotiated = activation.negotiated(feature::GUEST_OFFLOADS);
            state.guest_offloads.unwrap_or(negotiated)
        };
        if let Err(err) = self.shared.tap.set_guest_offloads(offloads) {
            error!(device = self.shared.name, %err, "the tap's offloads can't be set");
        }
        control::serve(&self.shared, activation);
        self.receiver.refill(&self.shared, activation);
        self.transmitter.transmit(&self.shared, activation);
    }

    fn queue_notified(&mut self, activation: &Arc<Activation>, queue: usize) {
        match queue {
            RECEIVE => self.receiver.refill(&self.shared, activation),
            TRANSMIT => self.transmitter.transmit(&self.shared, activation),
            CONTROL => control::serve(&self.shared, activation),
            _ => {}
        }
    }

    fn drain(&mut self, activation: &Arc<Activation>) {
        self.receiver.give_back(activation);
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        match self.interest() {
            none if none.is_empty() => Vec::new(),
            interest => vec![(self.shared.tap.as_fd(), interest)],
        }
    }

    fn source_ready(&mut self, activation: &Arc<Activation>, _tap: usize) {
        if self.receiver.is_ready() || !self.shared.link_is_up() {
            self.receiver.receive(&self.shared, activation);
        }
        if self.transmitter.is_blocked() {
            self.transmitter.transmit(&self.shared, activation);
        }
    }
}
