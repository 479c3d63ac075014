//! Virtio devices (Virtual I/O Device specification, version 1.2) on the MMIO transport.
//!
//! [`transport::VirtioMmio`] is the register file that a driver sees; it negotiates, and hands
//! over to a [`VirtioDevice`], which does the work on threads of its own. Once a driver is ready
//! a device gets an [`Activation`](activation::Activation): its queues, the guest's memory and
//! the way to interrupt. [`worker::Worker`] is the thread with what all devices need: it waits
//! for the queues' notifications, and stands still, with nothing in flight, when the machine does.

pub mod activation;
pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
#[cfg(test)]
mod hostile_tests;
pub mod interrupt;
pub mod net;
pub mod notifier;
pub mod rng;
mod saved;
#[cfg(test)]
mod test_driver;
pub mod transport;
pub mod worker;

use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

use crate::state::SaveRestore;
use activation::Activation;
use worker::Worker;

/// The guest's memory. What devices write through it is recorded in its bitmaps.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// VIRTIO_F_INDIRECT_DESC: a descriptor may refer to a table of descriptors (section 2.7.7).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX: each side says from where on it wants to be told (section 2.7.10).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1: not a legacy device (section 6).
pub const F_VERSION_1: u64 = 1 << 32;

/// What every device here offers, beside its own features.
pub const TRANSPORT_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// A kind of device, by its number in section 5 of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
}

/// A virtio device behind its transport.
///
/// The transport calls [`activate`](Self::activate) when a driver is ready and
/// [`reset`](Self::reset) when it goes. The machine stops and runs all devices at once:
/// [`request_pause`](Self::request_pause) to each, then [`wait_paused`](Self::wait_paused), and
/// [`run`](Self::run). A new device is paused.
pub trait VirtioDevice: Send + Sync {
    /// What kind of device it is.
    fn kind(&self) -> DeviceKind;

    /// The stable, unique name of this device and of its saved state, such as `virtio-rng`: at
    /// most 64 printable ASCII characters.
    fn name(&self) -> &str;

    /// The features that it offers beside [`TRANSPORT_FEATURES`].
    fn features(&self) -> u64;

    /// What it would take to offer `features`, which a driver took elsewhere and which are not
    /// offered here: a phrase to follow "expected"; `None` if there is nothing particular to say.
    fn explain_missing(&self, _features: u64) -> Option<String> {
        None
    }

    /// Its thread.
    fn worker(&self) -> &Worker;

    /// The most entries of each of its queues: powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads its configuration space; what lies outside reads as zeroes.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration space; what lies outside, or is read-only, is ignored: all of it, if
    /// the device doesn't say otherwise.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// A driver is ready. The device serves the queues from now on, whenever the machine runs.
    fn activate(&self, activation: Arc<Activation>) {
        self.worker().activate(activation);
    }

    /// Back to the state after power-on. When it returns, the device touches neither memory nor
    /// queues. Called while the machine runs, too.
    fn reset(&self);

    /// Asks the device to finish what is in flight and then to stand still.
    fn request_pause(&self) {
        self.worker().request_pause();
    }

    /// Waits until it does so.
    fn wait_paused(&self) {
        self.worker().wait_settled();
    }

    /// The same, but not longer than until `deadline`; whether it stands still. A device may have
    /// to wait for guest memory that is not there yet. [`run`](Self::run) takes the request back.
    fn wait_paused_until(&self, deadline: Instant) -> bool {
        self.worker().wait_settled_until(deadline)
    }

    /// Lets it work. It looks at all queues first: notifications may have come before.
    fn run(&self) {
        self.worker().run();
    }

    /// Its saved state, beside that of the transport and the queues; `None` says that it has
    /// none. Used while it is paused.
    fn saved_state(&self) -> Option<&dyn SaveRestore>;

    /// Why the guest can't be migrated because of this device; `None` if it can.
    fn migration_blocker(&self) -> Option<String>;
}

/// Reads from the bytes of a configuration space, which end where it ends.
pub(crate) fn read_config_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = usize::try_from(offset).ok().and_then(|at| space.get(at..));
    for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
        *to = *from;
    }
}
