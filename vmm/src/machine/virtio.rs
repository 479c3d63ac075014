//! The machine's virtio devices: in which slot each is, with its interrupt and its notifications
//! wired to KVM.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use devices::state::{SaveRestore, StateError};
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::Balloon;
use devices::virtio::blk::Block;
use devices::virtio::console::{Console, Output};
use devices::virtio::net::Net;
use devices::virtio::rng::Rng;
use devices::virtio::transport::{MMIO_LEN, QUEUE_NOTIFY, VirtioMmio};
use migration::section::{Section, Sections};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::backends::Backends;
use super::config::VirtioConfig;
use super::devices::DeviceStateError;
use crate::boot::VirtioMmioSlot;
use crate::console::{self, SerialBackend, SerialInput, SerialOutput};
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
    handles: Handles,
}

/// The devices that commands and back ends have to do with.
#[derive(Default)]
pub(super) struct Handles {
    pub(super) balloon: Option<Arc<Balloon>>,
    pub(super) console: Option<Arc<Console>>,
    /// The network cards, by their names in commands.
    pub(super) nets: Vec<(String, Arc<Net>)>,
}

impl VirtioDevices {
    /// Devices as after power-on, paused.
    pub(super) fn new(
        vm: &Vm,
        configs: &[VirtioConfig],
        backends: &Backends,
    ) -> Result<Self, VirtioError> {
        let mut slots = Vec::new();
        let mut handles = Handles::default();
        for (slot, config) in configs.iter().enumerate() {
            let place = VirtioMmioSlot::of(slot).ok_or(VirtioError::TooMany(configs.len()))?;
            let failed = |source| VirtioError::Device {
                device: config.kind_name(),
                source,
            };
            let device = device(config, vm, backends, &mut handles)?;
            let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
            vm.register_irqfd(&irqfd, place.gsi)?;
            let transport =
                VirtioMmio::new(slot, device, vm.ram().clone(), irqfd).map_err(failed)?;
            for (queue, notifier) in (0..).zip(transport.notifiers()) {
                vm.register_ioeventfd(notifier.event_fd(), place.addr + QUEUE_NOTIFY, queue)?;
            }
            slots.push(transport);
        }
        Ok(Self { slots, handles })
    }

    /// The devices that commands and back ends have to do with.
    pub(super) fn handles(&self) -> &Handles {
        &self.handles
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

    /// The same, but not longer than until `deadline`; whether they stand still. If not, follow
    /// with [`run`](Self::run).
    pub(super) fn pause_until(&self, deadline: Instant) -> bool {
        for slot in &self.slots {
            slot.device().request_pause();
        }
        self.slots
            .iter()
            .all(|slot| slot.device().wait_paused_until(deadline))
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
    vm: &Vm,
    backends: &Backends,
    handles: &mut Handles,
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
        VirtioConfig::Balloon(options) => {
            let ram = vm.ram().iter().map(|region| region.len()).sum();
            let balloon = Arc::new(Balloon::new(*options, ram).map_err(failed)?);
            handles.balloon = Some(Arc::clone(&balloon));
            balloon
        }
        VirtioConfig::Console => {
            let console = console(backends.console.clone()).map_err(failed)?;
            handles.console = Some(Arc::clone(&console));
            console
        }
        VirtioConfig::Net(config) => {
            // As many as there are cards, which was checked when a guest arrived.
            let index = handles.nets.len();
            let host = backends.nets.get(index);
            let host = host.ok_or_else(|| failed(io::Error::other("there is no tap for it")))?;
            let net = Net::new(index, *config, Arc::clone(&host.tap)).map_err(failed)?;
            let net = Arc::new(net);
            handles.nets.push((host.id.clone(), Arc::clone(&net)));
            net
        }
    })
}

/// A console whose other end is `host`, or nothing.
fn console(host: Option<Arc<console::Console>>) -> io::Result<Arc<Console>> {
    let host = match host {
        Some(host) => host,
        None => Arc::new(console::Console::open(&SerialBackend::None, false)?),
    };
    let (output, waker) = (host.output(), host.input_waker());
    let console = Arc::new(Console::new(
        Box::new(ConsoleOutput(output.clone())),
        Box::new(move || waker.wake()),
    )?);
    // Weak: the host's end outlives a machine that is given up.
    let device = Arc::downgrade(&console);
    output.on_room(Box::new(move || {
        if let Some(device) = device.upgrade() {
            device.output_has_room();
        }
    }));
    Ok(console)
}

struct ConsoleOutput(SerialOutput);

impl Output for ConsoleOutput {
    fn try_write(&self, bytes: &[u8]) -> usize {
        self.0.try_send(bytes)
    }
}

/// The guest's end of the virtio console, for the back end's input.
pub(super) struct ConsoleInput(pub(super) Arc<Console>);

impl SerialInput for ConsoleInput {
    fn room(&self) -> usize {
        self.0.room()
    }

    fn push(&self, bytes: &[u8]) {
        self.0.receive(bytes);
    }
}
