//! The transport's saved state, and its check.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

use super::transport::{Registers, status};
use super::{F_EVENT_IDX, F_VERSION_1, GuestRam};
use crate::state::StateError;

pub(super) const SAVED_VERSION: u32 = 1;

/// Version 1 of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedTransport {
    pub(super) device_kind: u32,
    pub(super) status: u32,
    pub(super) needs_reset: bool,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) queues: Vec<SavedQueue>,
}

/// A queue. With the machine stopped nothing is in flight: all that was taken was given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedQueue {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptor_table: u64,
    pub(super) available_ring: u64,
    pub(super) used_ring: u64,
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

/// A saved state that a driver could have left.
pub(super) struct Restored {
    pub(super) registers: Registers,
    pub(super) broken: bool,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    pub(super) rings: Vec<Queue>,
}

impl SavedTransport {
    pub(super) fn new(
        device_kind: u32,
        registers: &Registers,
        needs_reset: bool,
        (interrupt_status, config_generation): (u32, u32),
        queues: impl Iterator<Item = QueueState>,
    ) -> Self {
        let Registers {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
        } = *registers;
        Self {
            device_kind,
            status,
            needs_reset,
            interrupt_status,
            config_generation,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues: queues.map(SavedQueue::from).collect(),
        }
    }

    /// Checks it for a device of that kind, with those features and sizes of queues, in a machine
    /// with that memory. `missing` says why the device doesn't offer what the driver uses.
    pub(super) fn check(
        self,
        device: &str,
        kind: u32,
        offered: u64,
        missing: Option<&str>,
        max_sizes: &[u16],
        memory: &GuestRam,
    ) -> Result<Restored, StateError> {
        let Self {
            device_kind,
            status,
            needs_reset,
            interrupt_status,
            config_generation,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            queues,
        } = self;
        let field = |name: &str, value, valid, expected: &str| {
            StateError::unless(valid, device, name, value, expected)
        };
        field(
            "device_kind",
            device_kind.into(),
            device_kind == kind,
            "the kind of the device that is here",
        )?;
        let features_ok = status & status::FEATURES_OK != 0;
        let driver_ok = status & status::DRIVER_OK != 0;
        field(
            "status",
            status.into(),
            status & !status::OF_DRIVER == 0 && (features_ok || !driver_ok),
            "bits of a driver, DRIVER_OK only after FEATURES_OK",
        )?;
        field(
            "interrupt_status",
            interrupt_status.into(),
            interrupt_status & !3 == 0,
            "bits 0 and 1",
        )?;
        let taken = driver_features & !offered == 0 && driver_features & F_VERSION_1 != 0;
        field(
            "driver_features",
            driver_features,
            taken || !features_ok,
            missing.unwrap_or("features that the device offers, with VIRTIO_F_VERSION_1"),
        )?;
        field(
            "queues",
            queues.len() as u64,
            queues.len() == max_sizes.len(),
            "as many queues as the device has",
        )?;
        let event_idx = driver_ok && driver_features & F_EVENT_IDX != 0;
        let mut rings = Vec::with_capacity(queues.len());
        for (index, (queue, &max_size)) in queues.into_iter().zip(max_sizes).enumerate() {
            let ring = queue.check(device, index, max_size, event_idx)?;
            // Before the driver is ready its addresses may be half written.
            let needed = driver_ok && !needs_reset && ring.ready();
            field(
                &format!("queues[{index}].used_ring"),
                ring.used_ring(),
                !needed || ring.is_valid(memory),
                "rings in RAM",
            )?;
            rings.push(ring);
        }
        Ok(Restored {
            registers: Registers {
                status,
                device_features_sel,
                driver_features_sel,
                driver_features,
                queue_sel,
            },
            broken: needs_reset,
            interrupt_status,
            config_generation,
            rings,
        })
    }
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        let QueueState {
            // The device's, and the features'.
            max_size: _,
            event_idx_enabled: _,
            next_avail,
            next_used,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = state;
        Self {
            size,
            ready,
            descriptor_table: desc_table,
            available_ring: avail_ring,
            used_ring,
            next_available: next_avail,
            next_used,
        }
    }
}

impl SavedQueue {
    fn check(
        self,
        device: &str,
        index: usize,
        max_size: u16,
        event_idx_enabled: bool,
    ) -> Result<Queue, StateError> {
        let Self {
            size,
            ready,
            descriptor_table,
            available_ring,
            used_ring,
            next_available,
            next_used,
        } = self;
        let field = |name: &str, value, valid, expected: &str| {
            let name = format!("queues[{index}].{name}");
            StateError::unless(valid, device, &name, value, expected)
        };
        field(
            "size",
            size.into(),
            size <= max_size && size.is_power_of_two(),
            "a power of two, at most the size that the device offers",
        )?;
        for (name, address, align) in [
            ("descriptor_table", descriptor_table, 16),
            ("available_ring", available_ring, 2),
            ("used_ring", used_ring, 4),
        ] {
            let aligned = address.is_multiple_of(align);
            field(name, address, aligned, "an aligned address")?;
        }
        field(
            "next_used",
            next_used.into(),
            next_available.wrapping_sub(next_used) <= size,
            "not more behind next_available than the queue is long",
        )?;
        let state = QueueState {
            max_size,
            next_avail: next_available,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table: descriptor_table,
            avail_ring: available_ring,
            used_ring,
        };
        Queue::try_from(state)
            .map_err(|_| StateError::field(device, "queues", index as u64, "a queue that can be"))
    }
}
