//! The machine's virtio devices: in which slot each is, with its interrupt and its notifications
//! wired to KVM.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use devices::state::{SaveRestore, StateError};
use devices::virtio::VirtioDevice;
use devices::virtio::blk::Block;
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
    #[error("disk {id:?} of {capacity} bytes has no image here")]
    NoImage {
        /// The disk.
        id: String,
        /// Its size in bytes.
        capacity: u64,
    },
    /// A disk whose image is of another size.
    #[error("disk {id:?} of {capacity} bytes can't have the image '{}', which is a disk of {here}", path.display())]
    ImageSize {
        /// The disk.
        id: String,
        /// Its size in bytes.
        capacity: u64,
        /// The image.
        path: PathBuf,
        /// The size of the image's disk in bytes.
        here: u64,
    },
    /// KVM.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
}

const _: () = assert!(MMIO_LEN == VirtioMmioSlot::LEN);

/// The virtio devices by slot.
pub(super) struct VirtioDevices {
    slots: Vec<VirtioMmio>,
}

impl VirtioDevices {
    /// Devices as after power-on, paused.
    pub(super) fn new(
        vm: &Vm,
        configs: &[VirtioConfig],
        backends: &Backends,
    ) -> Result<Self, VirtioError> {
        let mut slots = Vec::new();
        for (slot, config) in configs.iter().enumerate() {
            let place = VirtioMmioSlot::of(slot).ok_or(VirtioError::TooMany(configs.len()))?;
            let failed = |source| VirtioError::Device {
                device: config.kind_name(),
                source,
            };
            let device = device(config, backends)?;
            let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
            vm.register_irqfd(&irqfd, place.gsi)?;
            let transport =
                VirtioMmio::new(slot, device, vm.ram().clone(), irqfd).map_err(failed)?;
            for (queue, notifier) in (0..).zip(transport.notifiers()) {
                vm.register_ioeventfd(notifier.event_fd(), place.addr + QUEUE_NOTIFY, queue)?;
            }
            slots.push(transport);
        }
        Ok(Self { slots })
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
) -> Result<Arc<dyn VirtioDevice>, VirtioError> {
    let failed = |source| VirtioError::Device {
        device: config.kind_name(),
        source,
    };
    Ok(match config {
        VirtioConfig::Rng => Arc::new(Rng::new().map_err(failed)?),
        VirtioConfig::Block(config) => {
            let (id, capacity) = (config.id.clone(), config.capacity);
            let Some(disk) = backends.disk(config) else {
                return Err(VirtioError::NoImage { id, capacity });
            };
            let image = disk.image();
            if image.capacity() != capacity {
                return Err(VirtioError::ImageSize {
                    id,
                    capacity,
                    path: image.path().to_owned(),
                    here: image.capacity(),
                });
            }
            let errors = Arc::clone(&backends.errors);
            let block = Block::new(Arc::clone(disk), &config.serial, errors);
            Arc::new(block.map_err(failed)?)
        }
    })
}
