//! The MMIO transport: the registers by which a driver finds, negotiates with and drives a device
//! (section 4.2).

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::debug;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::activation::{Activation, VirtQueue};
use super::interrupt::Interrupt;
use super::notifier::Notifier;
use super::saved::{SAVED_VERSION, SavedTransport};
use super::{GuestRam, TRANSPORT_FEATURES, VirtioDevice};
use crate::state::{SaveRestore, StateError, decode, encode};

/// The size of the register file in guest physical memory, in bytes.
pub const MMIO_LEN: u64 = 0x1000;

/// The offset of QueueNotify: a driver writes a queue's index there. An ioeventfd at this address
/// for each [notifier](VirtioMmio::notifiers) spares the exit to the VMM.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Where the device's configuration space begins.
const CONFIG: u64 = 0x100;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// The modern interface.
const MMIO_VERSION: u32 = 2;
/// Anything but 0; QEMU's.
const VENDOR: u32 = 0x554d_4551;

/// The bits of the status register (section 2.1).
pub(super) mod status {
    pub(in super::super) const ACKNOWLEDGE: u32 = 1;
    pub(in super::super) const DRIVER: u32 = 2;
    pub(in super::super) const DRIVER_OK: u32 = 4;
    pub(in super::super) const FEATURES_OK: u32 = 8;
    pub(in super::super) const NEEDS_RESET: u32 = 64;
    pub(in super::super) const FAILED: u32 = 128;
    /// All that a driver may set.
    pub(in super::super) const OF_DRIVER: u32 =
        ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// A virtio device on MMIO.
pub struct VirtioMmio {
    name: String,
    device: Arc<dyn VirtioDevice>,
    memory: GuestRam,
    queues: Arc<[VirtQueue]>,
    interrupt: Arc<Interrupt>,
    broken: Arc<AtomicBool>,
    registers: Mutex<Registers>,
}

/// What a driver has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
}

impl VirtioMmio {
    /// A device as after power-on, in the slot of that number, which interrupts through `irqfd`.
    pub fn new(
        slot: usize,
        device: Arc<dyn VirtioDevice>,
        memory: GuestRam,
        irqfd: EventFd,
    ) -> io::Result<Self> {
        let queues = device
            .queue_sizes()
            .into_iter()
            .map(VirtQueue::new)
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            name: format!("virtio-mmio.{slot}"),
            device,
            memory,
            queues: queues.into(),
            interrupt: Arc::new(Interrupt::new(irqfd)),
            broken: Arc::default(),
            registers: Mutex::default(),
        })
    }

    /// The name of the transport's own saved state.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device behind it.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    /// For each queue the eventfd that notifies the device of it.
    pub fn notifiers(&self) -> impl Iterator<Item = &Notifier> {
        self.queues.iter().map(VirtQueue::notifier)
    }

    /// Lets the device work; the driver learns what it may have missed.
    pub fn run(&self) {
        self.device.run();
        self.interrupt.raise_again();
    }

    /// A read by the guest at `offset` within [`MMIO_LEN`].
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.device.read_config(offset, data);
        }
        data.fill(0);
        // Registers are 32 bits wide and read whole (section 4.2.2.2).
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.register(offset).to_le_bytes();
        } else {
            debug!(
                device = self.device.name(),
                offset, "register not read whole"
            );
        }
    }

    /// A write by the guest at `offset` within [`MMIO_LEN`].
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.device.write_config(offset, data);
        }
        match <[u8; 4]>::try_from(data) {
            Ok(value) => self.set_register(offset, u32::from_le_bytes(value)),
            Err(_) => debug!(
                device = self.device.name(),
                offset, "register not written whole"
            ),
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        self.reset_with(&mut self.registers());
    }

    fn register(&self, offset: u64) -> u32 {
        let registers = self.registers();
        match offset {
            0x00 => MAGIC,
            0x04 => MMIO_VERSION,
            0x08 => self.device.kind() as u32,
            0x0c => VENDOR,
            0x10 => half(self.features(), registers.device_features_sel),
            0x34 => self
                .queue(&registers)
                .map_or(0, |queue| queue.ring().max_size().into()),
            0x44 => self
                .queue(&registers)
                .map_or(0, |queue| queue.ring().ready().into()),
            0x60 => self.interrupt.status(),
            0x70 => registers.status | self.needs_reset(),
            // The length of shared memory that isn't there (section 4.2.2).
            0xb0 | 0xb4 => u32::MAX,
            0xfc => self.interrupt.generation(),
            _ => {
                debug!(device = self.device.name(), offset, "no register to read");
                0
            }
        }
    }

    fn set_register(&self, offset: u64, value: u32) {
        let mut registers = self.registers();
        let registers = &mut *registers;
        match offset {
            0x14 => registers.device_features_sel = value,
            0x20 if registers.status & status::FEATURES_OK == 0 => {
                set_half(
                    &mut registers.driver_features,
                    registers.driver_features_sel,
                    value,
                );
            }
            0x24 => registers.driver_features_sel = value,
            0x30 => registers.queue_sel = value,
            QUEUE_NOTIFY => {
                if let Some(queue) = self.queues.get(value as usize) {
                    queue.notifier().notify();
                }
            }
            0x64 => self.interrupt.acknowledge(value),
            0x70 => self.set_status(registers, value),
            _ => self.set_queue_register(registers, offset, value),
        }
    }

    /// The registers of the selected queue. A driver sets them before it says that the queue is
    /// ready, and before it says so of itself.
    fn set_queue_register(&self, registers: &Registers, offset: u64, value: u32) {
        if registers.status & status::DRIVER_OK != 0 {
            debug!(
                device = self.device.name(),
                offset, "queue register written too late"
            );
            return;
        }
        let Some(queue) = self.queue(registers) else {
            return;
        };
        let mut ring = queue.ring();
        let value_too = Some(value);
        match offset {
            0x44 => ring.set_ready(value & 1 != 0),
            _ if ring.ready() => {
                debug!(
                    device = self.device.name(),
                    offset, "queue register written too late"
                );
            }
            0x38 => match u16::try_from(value) {
                // An unfit size leaves the one before, which the queue's check knows.
                Ok(size) => ring.set_size(size),
                Err(_) => debug!(device = self.device.name(), value, "no size for a queue"),
            },
            0x80 => ring.set_desc_table_address(value_too, None),
            0x84 => ring.set_desc_table_address(None, value_too),
            0x90 => ring.set_avail_ring_address(value_too, None),
            0x94 => ring.set_avail_ring_address(None, value_too),
            0xa0 => ring.set_used_ring_address(value_too, None),
            0xa4 => ring.set_used_ring_address(None, value_too),
            _ => debug!(device = self.device.name(), offset, "no register to write"),
        }
    }

    fn set_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            return self.reset_with(registers);
        }
        let old = registers.status;
        // A driver only ever adds bits (section 2.1.1).
        let mut new = (old | value) & status::OF_DRIVER;
        if new & status::FEATURES_OK != 0 && old & status::FEATURES_OK == 0 {
            let taken = registers.driver_features;
            let acceptable = taken & !self.features() == 0 && taken & super::F_VERSION_1 != 0;
            if !acceptable {
                debug!(
                    device = self.device.name(),
                    "the driver takes features {taken:#x} of {:#x}",
                    self.features()
                );
                new &= !status::FEATURES_OK;
            }
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        registers.status = new;
        if new & status::DRIVER_OK != 0 && old & status::DRIVER_OK == 0 {
            self.activate(registers);
        }
    }

    fn activate(&self, registers: &Registers) {
        let activation = self.activation(registers);
        for (index, queue) in self.queues.iter().enumerate() {
            let mut ring = queue.ring();
            ring.set_event_idx(activation.event_idx());
            if ring.ready() && !ring.is_valid(&self.memory) {
                drop(ring);
                activation.break_device(&format_args!("queue {index} does not lie in RAM"));
                return;
            }
        }
        self.device.activate(Arc::new(activation));
    }

    fn activation(&self, registers: &Registers) -> Activation {
        Activation {
            device: self.device.name().to_owned(),
            features: registers.driver_features,
            queues: Arc::clone(&self.queues),
            interrupt: Arc::clone(&self.interrupt),
            memory: self.memory.clone(),
            broken: Arc::clone(&self.broken),
        }
    }

    #[cfg(test)]
    pub(super) fn skip_available(&self, queue: usize) {
        let mut ring = self.queues[queue].ring();
        let next = ring.next_avail().wrapping_add(1);
        ring.set_next_avail(next);
    }

    #[cfg(test)]
    pub(super) fn activation_for_tests(&self) -> Arc<Activation> {
        Arc::new(self.activation(&self.registers()))
    }

    fn reset_with(&self, registers: &mut Registers) {
        self.device.reset();
        for queue in self.queues.iter() {
            queue.reset();
            queue.notifier().consume();
        }
        self.interrupt.restore(0, 0);
        self.broken.store(false, Ordering::SeqCst);
        *registers = Registers::default();
    }

    fn features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn needs_reset(&self) -> u32 {
        if self.broken.load(Ordering::SeqCst) {
            status::NEEDS_RESET
        } else {
            0
        }
    }

    fn queue(&self, registers: &Registers) -> Option<&VirtQueue> {
        self.queues.get(registers.queue_sel as usize)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The transport's state and its queues', into a device that no driver uses. The device's own state
/// must have been restored before: a driver that is ready finds it at work at once.
impl SaveRestore for VirtioMmio {
    fn version(&self) -> u32 {
        SAVED_VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let saved = SavedTransport::new(
            self.device.kind() as u32,
            &self.registers(),
            self.broken.load(Ordering::SeqCst),
            (self.interrupt.status(), self.interrupt.generation()),
            self.queues.iter().map(|queue| queue.ring().state()),
        );
        encode(&self.name, &saved)
    }

    fn restore(&self, _version: u32, body: &[u8]) -> Result<(), StateError> {
        let saved: SavedTransport = decode(&self.name, body)?;
        let sizes: Vec<u16> = self
            .queues
            .iter()
            .map(|queue| queue.ring().max_size())
            .collect();
        let missing = saved.driver_features & !self.features();
        let restored = saved.check(
            &self.name,
            self.device.kind() as u32,
            self.features(),
            self.device.explain_missing(missing).as_deref(),
            &sizes,
            &self.memory,
        )?;
        let mut registers = self.registers();
        *registers = restored.registers;
        for (queue, ring) in self.queues.iter().zip(restored.rings) {
            *queue.ring() = ring;
        }
        self.interrupt
            .restore(restored.interrupt_status, restored.config_generation);
        self.broken.store(restored.broken, Ordering::SeqCst);
        if registers.status & status::DRIVER_OK != 0 && !restored.broken {
            self.device.activate(Arc::new(self.activation(&registers)));
        }
        Ok(())
    }
}

fn half(features: u64, sel: u32) -> u32 {
    match sel {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_half(features: &mut u64, sel: u32, value: u32) {
    match sel {
        0 => *features = *features & !u64::from(u32::MAX) | u64::from(value),
        1 => *features = *features & u64::from(u32::MAX) | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
