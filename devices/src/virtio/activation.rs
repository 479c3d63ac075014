//! What a device has while a driver uses it: queues, memory, interrupt.

use std::num::Wrapping;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError, Table};
use super::interrupt::Interrupt;
use super::notifier::Notifier;
use super::{F_EVENT_IDX, GuestRam};

/// One queue: its rings, and the eventfd by which the driver says that it has put something in.
#[derive(Debug)]
pub(super) struct VirtQueue {
    ring: Mutex<Queue>,
    /// How many requests were given back since the driver was last told, or not. Changed only
    /// with the ring locked: it is about the ring's last entries.
    completed: AtomicU16,
    notifier: Notifier,
}

impl VirtQueue {
    pub(super) fn new(max_size: u16) -> std::io::Result<Self> {
        let ring = Queue::new(max_size)
            .map_err(|err| std::io::Error::new(std::io::ErrorKind::InvalidInput, err))?;
        Ok(Self {
            ring: Mutex::new(ring),
            completed: AtomicU16::new(0),
            notifier: Notifier::new()?,
        })
    }

    pub(super) fn ring(&self) -> MutexGuard<'_, Queue> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    pub(super) fn reset(&self) {
        self.ring().reset();
        self.completed.store(0, Ordering::Relaxed);
    }
}

/// How many requests [`Activation::serve`] does in a row.
const BATCH: usize = 16;

/// What a device works with from the moment that its driver is ready until it is reset.
#[derive(Debug)]
pub struct Activation {
    pub(super) device: String,
    pub(super) features: u64,
    pub(super) queues: Arc<[VirtQueue]>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) memory: GuestRam,
    pub(super) broken: Arc<AtomicBool>,
}

impl Activation {
    /// Whether the driver has taken all features of `bits`.
    pub fn has(&self, bits: u64) -> bool {
        self.features & bits == bits
    }

    /// Those features of `bits` that the driver has taken.
    pub fn negotiated(&self, bits: u64) -> u64 {
        self.features & bits
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The next request in a queue. `None` if there is none, or if the driver has broken the
    /// queue: then the device needs a reset, and is given no more requests.
    pub fn pop(&self, queue: usize) -> Option<Chain> {
        let ring = self.ready(queue)?;
        let head = {
            let mut ring = ring.ring();
            let (size, under_way) = (ring.size(), under_way(&ring));
            match ring.iter(&self.memory) {
                Ok(mut available) => {
                    let head = available.next()?.head_index();
                    if under_way < size {
                        Ok(head)
                    } else {
                        available.go_to_previous_position();
                        Err(ChainError::TooMany(size))
                    }
                }
                Err(err) => Err(ChainError::Ring(err)),
            }
        };
        let head = self.checked(head)?;
        self.chain(queue, head)
    }

    /// The request that begins at descriptor `head`, which was popped before and has not been
    /// given back. `None` if the driver has broken it meanwhile.
    pub fn chain(&self, queue: usize, head: u16) -> Option<Chain> {
        let queue = self.ready(queue)?;
        let table = {
            let ring = queue.ring();
            Table {
                address: GuestAddress(ring.desc_table()),
                len: ring.size().into(),
            }
        };
        self.checked(Chain::follow(&self.memory, table, head))
    }

    /// Gives a request back that nothing was done about, the last one that was popped and not
    /// given back yet.
    pub fn put_back(&self, queue: usize) {
        if let Some(queue) = self.ready(queue) {
            let mut ring = queue.ring();
            let previous = ring.next_avail().wrapping_sub(1);
            ring.set_next_avail(previous);
        }
    }

    /// Gives a request back to the driver, with `written` bytes at the beginning of what it let
    /// the device write. It learns of it by [`notify`](Self::notify).
    pub fn complete(&self, queue: usize, head: u16, written: u32) {
        self.complete_all(queue, &[(head, written)]);
    }

    /// Gives several requests back, (head, written) each, that the driver sees at the same time.
    pub fn complete_all(&self, queue: usize, requests: &[(u16, u32)]) {
        if let Some(queue) = self.ready(queue) {
            let mut ring = queue.ring();
            let added = add_used(&mut ring, &self.memory, requests);
            let count = requests.len() as u16;
            queue.completed.fetch_add(count, Ordering::Relaxed);
            drop(ring);
            self.checked(added.map_err(ChainError::Ring));
        }
    }

    /// Interrupts the driver about what was completed, if it wants that.
    pub fn notify(&self, queue: usize) {
        if let Some(queue) = self.ready(queue) {
            let ring = queue.ring();
            let completed = queue.completed.swap(0, Ordering::Relaxed);
            let wanted = wants_interrupt(&ring, &self.memory, completed);
            drop(ring);
            if self.checked(wanted.map_err(ChainError::Ring)) == Some(true) {
                self.interrupt.used_buffer();
            }
        }
    }

    /// Asks the driver to notify, or not to. When it is asked to, the result says whether there
    /// are requests already, about which it won't.
    pub fn want_notifications(&self, queue: usize, want: bool) -> bool {
        let Some(queue) = self.ready(queue) else {
            return false;
        };
        let more = if want {
            queue.ring().enable_notification(&self.memory)
        } else {
            let mut ring = queue.ring();
            ring.disable_notification(&self.memory).map(|()| false)
        };
        self.checked(more.map_err(ChainError::Ring)) == Some(true)
    }

    /// Does `work` on every request in a queue until there is none. It returns how many bytes it
    /// wrote, from the beginning of what the driver let it write.
    ///
    /// After [`BATCH`] requests it returns all the same, with the queue notified again: a driver
    /// that never ends must not keep the device's thread from a pause or a reset.
    pub fn serve(&self, queue: usize, mut work: impl FnMut(&Chain) -> u32) {
        loop {
            self.want_notifications(queue, false);
            let mut done = 0;
            while done < BATCH
                && let Some(chain) = self.pop(queue)
            {
                let written = work(&chain);
                self.complete(queue, chain.head, written);
                done += 1;
            }
            if done > 0 {
                self.notify(queue);
            }
            if done == BATCH {
                if let Some(notifier) = self.notifier(queue) {
                    notifier.notify();
                }
                return;
            }
            if !self.want_notifications(queue, true) {
                return;
            }
        }
    }

    /// The driver did something that it must not: the device stops until it is reset, and says so
    /// (DEVICE_NEEDS_RESET, section 2.1.1).
    pub fn break_device(&self, reason: &dyn std::fmt::Display) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            warn!(
                device = self.device,
                "the guest's driver broke it: {reason}"
            );
            self.interrupt.config_changed();
        }
    }

    /// The descriptor that becomes readable when the driver notifies a queue; `None` for a queue
    /// that the driver has not set up.
    pub(super) fn notifier(&self, queue: usize) -> Option<&Notifier> {
        self.ready(queue).map(VirtQueue::notifier)
    }

    pub(super) fn event_idx(&self) -> bool {
        self.has(F_EVENT_IDX)
    }

    fn ready(&self, queue: usize) -> Option<&VirtQueue> {
        if self.broken.load(Ordering::SeqCst) {
            return None;
        }
        self.queues.get(queue).filter(|queue| queue.ring().ready())
    }

    fn checked<T>(&self, result: Result<T, ChainError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(err) => {
                self.break_device(&err);
                None
            }
        }
    }
}

/// How many requests were popped and not given back. The ring itself is only known not to have more
/// than its size beyond those.
fn under_way(ring: &Queue) -> u16 {
    ring.next_avail().wrapping_sub(ring.next_used())
}

/// Puts requests into the used ring, of which the driver sees none before it sees the last.
fn add_used(
    ring: &mut Queue,
    memory: &GuestRam,
    requests: &[(u16, u32)],
) -> Result<(), virtio_queue::Error> {
    let Some(((last, written), others)) = requests.split_last() else {
        return Ok(());
    };
    for (head, written) in others {
        // An element of the used ring (section 2.7.8); its index is written with the last one.
        let at = ring.used_ring() + 4 + 8 * u64::from(ring.next_used() % ring.size());
        let element = (u64::from(*written) << 32 | u64::from(*head)).to_le_bytes();
        memory
            .write_slice(&element, GuestAddress(at))
            .map_err(virtio_queue::Error::GuestMemory)?;
        ring.set_next_used(ring.next_used().wrapping_add(1));
    }
    ring.add_used(memory, *last, *written)
}

/// Whether the driver wants to be interrupted about the `completed` requests that were put into
/// the used ring last (section 2.7.10).
fn wants_interrupt(
    ring: &Queue,
    memory: &GuestRam,
    completed: u16,
) -> Result<bool, virtio_queue::Error> {
    if !ring.event_idx_enabled() {
        return Ok(true);
    }
    // The driver writes used_event, then looks at the ring; here it is the other way round.
    fence(Ordering::SeqCst);
    let at = ring.avail_ring() + 4 + 2 * u64::from(ring.size());
    let event: u16 = memory
        .load(GuestAddress(at), Ordering::Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)?;
    let behind = Wrapping(ring.next_used()) - Wrapping(u16::from_le(event)) - Wrapping(1);
    Ok(behind < Wrapping(completed))
}
