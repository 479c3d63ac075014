//! What the device's thread does: bytes from the host to the guest and back.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::PollFlags;

use super::{OnRoom, Output, RECEIVE, Shared, TRANSMIT};
use crate::virtio::activation::Activation;
use crate::virtio::chain::Chain;
use crate::virtio::worker::Handler;

/// How many bytes are handed over at once.
const PIECE: usize = 4096;
/// How many are handed over, and how many requests are done, before the thread looks at whether
/// something else is wanted of it.
const MOST: u64 = 1 << 20;
const MOST_REQUESTS: usize = 64;

/// How a request to transmit ended.
enum Sent {
    All,
    /// The host takes no more for now.
    Blocked,
    /// It has taken a lot; the rest can wait for a moment.
    Enough,
}

pub(super) struct Port {
    shared: Arc<Shared>,
    output: Box<dyn Output>,
    on_room: OnRoom,
}

impl Port {
    pub(super) fn new(shared: Arc<Shared>, output: Box<dyn Output>, on_room: OnRoom) -> Self {
        Self {
            shared,
            output,
            on_room,
        }
    }

    fn transmit(&self, activation: &Activation) {
        activation.want_notifications(TRANSMIT, false);
        for _ in 0..MOST_REQUESTS {
            let Some(chain) = activation.pop(TRANSMIT) else {
                if activation.want_notifications(TRANSMIT, true) {
                    continue;
                }
                return;
            };
            match self.send(activation, &chain) {
                Sent::All => {
                    activation.complete(TRANSMIT, chain.head, 0);
                    activation.notify(TRANSMIT);
                }
                Sent::Blocked => return activation.put_back(TRANSMIT),
                Sent::Enough => {
                    activation.put_back(TRANSMIT);
                    break;
                }
            }
        }
        self.again(activation, TRANSMIT);
    }

    /// Hands over what the host has not taken yet of a request.
    fn send(&self, activation: &Activation, chain: &Chain) -> Sent {
        let transmitted = &self.shared.transmitted;
        let mut done = transmitted.load(Ordering::SeqCst);
        let enough = done.saturating_add(MOST);
        while done < chain.readable_len() {
            let mut piece = [0; PIECE];
            let len = chain.read(activation.memory(), done, &mut piece);
            let taken = self.output.try_write(piece.get(..len).unwrap_or_default());
            done += taken as u64;
            transmitted.store(done, Ordering::SeqCst);
            if taken < len {
                return Sent::Blocked;
            }
            if len == 0 || done >= chain.readable_len() {
                break;
            }
            if done >= enough {
                return Sent::Enough;
            }
        }
        transmitted.store(0, Ordering::SeqCst);
        Sent::All
    }

    fn receive(&self, activation: &Activation) {
        for _ in 0..MOST_REQUESTS {
            // Taken only as far as the guest gets it: nothing else takes from it meanwhile.
            let bytes = self.shared.input().make_contiguous().to_vec();
            if bytes.is_empty() {
                return;
            }
            let Some(chain) = activation.pop(RECEIVE) else {
                if activation.want_notifications(RECEIVE, true) {
                    continue;
                }
                return;
            };
            let written = chain.write(activation.memory(), 0, &bytes);
            self.shared.input().drain(..written);
            activation.complete(RECEIVE, chain.head, written as u32);
            activation.notify(RECEIVE);
            (self.on_room)();
        }
        self.again(activation, RECEIVE);
    }

    /// Comes back to a queue after a look at what else is wanted.
    fn again(&self, activation: &Activation, queue: usize) {
        if let Some(notifier) = activation.notifier(queue) {
            notifier.notify();
        }
    }
}

impl Handler for Port {
    fn start(&mut self, activation: &Arc<Activation>) {
        // After a reset the input is empty.
        (self.on_room)();
        self.receive(activation);
        self.transmit(activation);
    }

    fn queue_notified(&mut self, activation: &Arc<Activation>, queue: usize) {
        match queue {
            RECEIVE => self.receive(activation),
            _ => self.transmit(activation),
        }
    }

    fn drain(&mut self, _activation: &Arc<Activation>) {
        // What was not done to its end is back in its queue.
    }

    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        vec![(self.shared.wake.as_fd(), PollFlags::IN)]
    }

    fn source_ready(&mut self, activation: &Arc<Activation>, _source: usize) {
        self.shared.wake.consume();
        self.receive(activation);
        self.transmit(activation);
    }
}
