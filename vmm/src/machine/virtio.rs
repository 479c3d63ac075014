//! The machine's virtio devices: in which slot each is, with its interrupt and its notifications
//! wired to KVM.

use std::io;
use std::sync::Arc;

use devices::state::{SaveRestore, StateError};
use devices::virtio::VirtioDevice;
use devices::virtio::blk::Block;
use devices::virtio::net::Net;
use devices::virtio::rng::Rng;
use devices::virtio::transport::{MMIO_LEN, QUEUE_NOTIFY, VirtioMmio};
use migration::section::{Section, Sections};
use vmm_sys_util::eventfd::EventFd;

use super::backends::Backends;
use super::config::VirtioConfig;
use super::devices::DeviceStateError;
use crate::boot::VirtioMmioSlot;
use crate::kvm::{IoctlError, Vm};

/// Why the virtio devices can't be built.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// More than there are slots.
    #[error("{0} virtio devices are too many: there is room for {most}", most = VirtioMmioSlot::MAX)]
    TooMany(usize),
    /// A device that can't be.
    #[error("{device}: {source}")]
    Device {
        /// Which.
        device: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A disk without an image.
    #[error("disk {id:?} of {capacity} bytes has no image of that size here")]
    NoImage {
        /// The disk.
        id: String,
        /// Its size in bytes.
        capacity: u64,
    },
    /// KVM.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
}

const _: () = assert!(MMIO_LEN == VirtioMmioSlot::LEN);

/// The virtio devices by slot.
pub(super) struct VirtioDevices {
    slots: Vec<VirtioMmio>,
    /// The network cards among them, by their names in commands.
    nets: Vec<(String, Arc<Net>)>,
}

impl VirtioDevices {
    /// Devices as after power-on, paused.
    pub(super) fn new(
        vm: &Vm,
        configs: &[VirtioConfig],
        backends: &Backends,
    ) -> Result<Self, VirtioError> {
        let mut slots = Vec::new();
        let mut nets = Vec::new();
        for (slot, config) in configs.iter().enumerate() {
            let place = VirtioMmioSlot::of(slot).ok_or(VirtioError::TooMany(configs.len()))?;
            let failed = |source| VirtioError::Device {
                device: config.kind_name(),
                source,
            };
            let device = device(config, backends, &mut nets)?;
            let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
            vm.register_irqfd(&irqfd, place.gsi)?;
            let transport =
                VirtioMmio::new(slot, device, vm.ram().clone(), irqfd).map_err(failed)?;
            for (queue, notifier) in (0..).zip(transport.notifiers()) {
                vm.register_ioeventfd(notifier.event_fd(), place.addr + QUEUE_NOTIFY, queue)?;
            }
            slots.push(transport);
        }
        Ok(Self { slots, nets })
    }

    /// The network cards by their names in commands.
    pub(super) fn nets(&self) -> &[(String, Arc<Net>)] {
        &self.nets
    }

    /// Where they are.
    pub(super) fn places(&self) -> impl Iterator<Item = VirtioMmioSlot> {
        (0..self.slots.len()).filter_map(VirtioMmioSlot::of)
    }

    /// The slot at a guest physical address, and the offset in it.
    pub(super) fn at(&self, addr: u64) -> Option<(&VirtioMmio, u64)> {
        let offset = addr.checked_sub(VirtioMmioSlot::of(0)?.addr)?;
        let slot = self.slots.get((offset / MMIO_LEN) as usize)?;
        Some((slot, offset % MMIO_LEN))
    }

    /// Lets all devices work.
    pub(super) fn run(&self) {
        for slot in &self.slots {
            slot.run();
        }
    }

    /// Stops all devices: when it returns, none touches the guest's memory, and none has a
    /// request in flight.
    pub(super) fn pause(&self) {
        for slot in &self.slots {
            slot.device().request_pause();
        }
        for slot in &self.slots {
            slot.device().wait_paused();
        }
    }

    /// Back to the state after power-on.
    pub(super) fn reset(&self) {
        for slot in &self.slots {
            slot.reset();
        }
    }

    /// Everything that is saved, by name and with the version; 0 for a device without a state of
    /// its own.
    pub(super) fn inventory(&self) -> impl Iterator<Item = (String, u32)> + '_ {
        self.slots.iter().flat_map(|slot| {
            let device = slot.device();
            let version = device.saved_state().map_or(0, |state| state.version());
            [
                (slot.name().to_owned(), slot.version()),
                (device.name().to_owned(), version),
            ]
        })
    }

    /// Why the guest can't be migrated because of its devices: a sentence each.
    pub(super) fn migration_blockers(&self) -> Vec<String> {
        self.slots
            .iter()
            .filter_map(|slot| slot.device().migration_blocker())
            .collect()
    }

    pub(super) fn save(&self) -> Result<Vec<Section>, StateError> {
        let mut sections = Vec::new();
        for slot in &self.slots {
            let device = slot.device();
            sections.push(section(slot.name(), slot)?);
            if let Some(state) = device.saved_state() {
                sections.push(section(device.name(), state)?);
            }
        }
        Ok(sections)
    }

    pub(super) fn load(&self, sections: &mut Sections) -> Result<(), DeviceStateError> {
        for slot in &self.slots {
            let device = slot.device();
            // The device first: its transport puts it to work.
            if let Some(state) = device.saved_state() {
                let section = sections.take(device.name(), 1, state.version())?;
                state.restore(section.version, &section.body)?;
            }
            let section = sections.take(slot.name(), 1, slot.version())?;
            slot.restore(section.version, &section.body)?;
        }
        Ok(())
    }
}

fn section(name: &str, state: &dyn SaveRestore) -> Result<Section, StateError> {
    Ok(Section {
        name: name.to_owned(),
        version: state.version(),
        body: state.save()?,
    })
}

/// Makes the device that `config` describes, out of what it uses of the host.
fn device(
    config: &VirtioConfig,
    backends: &Backends,
    nets: &mut Vec<(String, Arc<Net>)>,
) -> Result<Arc<dyn VirtioDevice>, VirtioError> {
    let failed = |source| VirtioError::Device {
        device: config.kind_name(),
        source,
    };
    Ok(match config {
        VirtioConfig::Rng => Arc::new(Rng::new().map_err(failed)?),
        VirtioConfig::Block(config) => {
            let disk = backends
                .disk(config)
                .filter(|disk| disk.image().capacity() == config.capacity)
                .ok_or_else(|| VirtioError::NoImage {
                    id: config.id.clone(),
                    capacity: config.capacity,
                })?;
            let errors = Arc::clone(&backends.errors);
            let block = Block::new(Arc::clone(disk), &config.serial, errors);
            Arc::new(block.map_err(failed)?)
        }
        VirtioConfig::Net(config) => {
            // As many as there are cards, which was checked when a guest arrived.
            let index = nets.len();
            let host = backends.nets.get(index);
            let host = host.ok_or_else(|| failed(io::Error::other("there is no tap for it")))?;
            let net = Net::new(index, *config, Arc::clone(&host.tap)).map_err(failed)?;
            let net = Arc::new(net);
            nets.push((host.id.clone(), Arc::clone(&net)));
            net
        }
    })
}
