//! How a device interrupts its driver.

use std::sync::atomic::{AtomicU32, Ordering};

use tracing::error;
use vmm_sys_util::eventfd::EventFd;

/// A queue has used buffers (InterruptStatus, section 4.2.2).
pub const USED_BUFFER: u32 = 1 << 0;
/// The configuration space has changed.
pub const CONFIG_CHANGE: u32 = 1 << 1;

/// The interrupt of one device: why it was raised, and the irqfd that raises it.
///
/// KVM may inject what was written to an irqfd a little later, from a work queue. So an interrupt
/// that was raised just before the machine's state was saved can be lost on the way; that is why
/// one that the driver has not acknowledged is raised [again](Self::raise_again) when the machine
/// runs on. A driver that sees it twice finds no reason the second time, and ignores it.
#[derive(Debug)]
pub struct Interrupt {
    irqfd: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
}

impl Interrupt {
    /// An interrupt that writes to `irqfd`.
    pub fn new(irqfd: EventFd) -> Self {
        Self {
            irqfd,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
        }
    }

    /// Tells the driver that a queue has used buffers.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// Raises it again if the driver has not acknowledged it.
    pub fn raise_again(&self) {
        if self.status() != 0 {
            self.write();
        }
    }

    /// InterruptStatus.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// ConfigGeneration.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn restore(&self, status: u32, generation: u32) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
    }

    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        self.write();
    }

    fn write(&self) {
        if let Err(err) = self.irqfd.write(1) {
            error!(%err, "a virtio device can't interrupt the guest");
        }
    }
}
