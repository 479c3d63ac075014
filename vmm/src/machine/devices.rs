//! The machine's devices on the vCPUs' buses.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use devices::bus::{MachineRequest, PortBus, PortConflict};
use devices::cmos::Cmos;
use devices::i8042::I8042;
use devices::power::{self, Pm1, ResetPort};
use devices::serial::{self, Serial};
use devices::state::StateError;
use devices::virtio::balloon::Balloon;
use devices::virtio::net::Net;
use devices::{InterruptLine, LevelLine};
use migration::section::{Section, SectionError, Sections};

use super::backends::Backends;
use super::config::VirtioConfig;
use super::virtio::{ConsoleInput, VirtioDevices, VirtioError};
use crate::boot::VirtioMmioSlot;
use crate::console::SerialInput;
use crate::kvm::Vm;
use crate::vcpu::{IoBus, IoOutcome};

/// Why the devices' state could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// The device refused it.
    #[error(transparent)]
    Device(#[from] StateError),
    /// Its section is not there, or of a wrong version.
    #[error(transparent)]
    Section(#[from] SectionError),
}

/// An interrupt line of the in-kernel interrupt controllers.
struct IrqchipLine {
    vm: Arc<Vm>,
    gsi: u32,
}

impl InterruptLine for IrqchipLine {
    fn pulse(&self) -> io::Result<()> {
        // Not an irqfd: KVM injects those from a work queue, and one that is queued there when
        // the state is saved would be lost.
        self.vm.fd().set_irq_line(self.gsi, true)?;
        self.vm.fd().set_irq_line(self.gsi, false)?;
        Ok(())
    }
}

impl LevelLine for IrqchipLine {
    fn set(&self, asserted: bool) -> io::Result<()> {
        Ok(self.vm.fd().set_irq_line(self.gsi, asserted)?)
    }
}

/// The machine's devices.
pub struct Devices {
    ports: PortBus,
    serial: Arc<Serial>,
    power: Arc<Pm1>,
    virtio: VirtioDevices,
}

/// Why a machine's devices can't be built.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Two devices in one place.
    #[error(transparent)]
    Ports(#[from] PortConflict),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
}

impl Devices {
    /// The devices of a machine, as after power-on. `output` takes what the guest writes to its
    /// serial port; `on_room` is called when the port has room for input.
    pub fn new(
        vm: &Arc<Vm>,
        output: serial::Output,
        on_room: serial::RoomNotifier,
        virtio: &[VirtioConfig],
        backends: &Backends,
    ) -> Result<Self, DeviceError> {
        let line = |gsi| {
            Arc::new(IrqchipLine {
                vm: Arc::clone(vm),
                gsi,
            })
        };
        let serial = Arc::new(Serial::new(line(serial::IRQ), output, on_room));
        let power = Arc::new(Pm1::new(line(power::SCI)));
        let mut ports = PortBus::new();
        ports.add(serial.clone())?;
        ports.add(Arc::new(Cmos::new()))?;
        ports.add(Arc::new(I8042::new()))?;
        ports.add(power.clone())?;
        ports.add(Arc::new(ResetPort::new()))?;
        Ok(Self {
            ports,
            serial,
            power,
            virtio: VirtioDevices::new(vm, virtio, backends)?,
        })
    }

    /// The devices by name, each with the version of its saved state; 0 for one without state.
    pub fn inventory(&self) -> Vec<(String, u32)> {
        let version = |device: &dyn devices::bus::PortDevice| {
            device.saved_state().map_or(0, |state| state.version())
        };
        self.ports
            .devices()
            .map(|device| (device.name().to_owned(), version(&**device)))
            .chain(self.virtio.inventory())
            .collect()
    }

    /// Presses the machine's power button.
    pub fn press_power_button(&self) {
        self.power.press_power_button();
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        for device in self.ports.devices() {
            device.reset();
        }
        self.virtio.reset();
    }

    /// The memory balloon, if there is one.
    pub fn balloon(&self) -> Option<&Arc<Balloon>> {
        self.virtio.handles().balloon.as_ref()
    }

    /// Where the virtio console takes input, if there is one.
    pub fn console_input(&self) -> Option<Arc<dyn SerialInput>> {
        let console = Arc::clone(self.virtio.handles().console.as_ref()?);
        Some(Arc::new(ConsoleInput(console)))
    }

    /// Where the virtio devices are.
    pub fn virtio_mmio(&self) -> impl Iterator<Item = VirtioMmioSlot> {
        self.virtio.places()
    }

    /// The network cards by their names in commands.
    pub fn nets(&self) -> &[(String, Arc<Net>)] {
        &self.virtio.handles().nets
    }

    /// Lets the devices work that do so on their own.
    pub fn run(&self) {
        self.serial.raise_again();
        self.virtio.run();
    }

    /// Stops them; when it returns, none has anything in flight.
    pub fn pause(&self) {
        self.virtio.pause();
    }

    /// The same, but not longer than until `deadline`; whether none has. If not, follow with
    /// [`run`](Self::run).
    pub fn pause_until(&self, deadline: Instant) -> bool {
        self.virtio.pause_until(deadline)
    }

    /// Why the guest can't be migrated because of its devices: a sentence each.
    pub fn migration_blockers(&self) -> Vec<String> {
        self.virtio.migration_blockers()
    }

    /// The devices' state, with the machine stopped.
    pub fn save(&self) -> Result<Vec<Section>, DeviceStateError> {
        let mut sections = Vec::new();
        for device in self.ports.devices() {
            if let Some(state) = device.saved_state() {
                sections.push(Section {
                    name: device.name().to_owned(),
                    version: state.version(),
                    body: state.save()?,
                });
            }
        }
        sections.extend(self.virtio.save()?);
        Ok(sections)
    }

    /// Takes the devices' state out of `sections`.
    pub fn load(&self, sections: &mut Sections) -> Result<(), DeviceStateError> {
        for device in self.ports.devices() {
            if let Some(state) = device.saved_state() {
                let section = sections.take(device.name(), 1, state.version())?;
                state.restore(section.version, &section.body)?;
            }
        }
        self.virtio.load(sections)
    }
}

impl IoBus for Devices {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port, data);
    }

    fn port_write(&self, port: u16, data: &[u8]) -> IoOutcome {
        match self.ports.write(port, data) {
            None => IoOutcome::Continue,
            Some(MachineRequest::Reset) => IoOutcome::Reset,
            Some(MachineRequest::PowerOff) => IoOutcome::Shutdown,
        }
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        match self.virtio.at(addr) {
            Some((slot, offset)) => slot.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) -> IoOutcome {
        if let Some((slot, offset)) = self.virtio.at(addr) {
            slot.write(offset, data);
        }
        IoOutcome::Continue
    }
}

impl SerialInput for Devices {
    fn room(&self) -> usize {
        self.serial.room()
    }

    fn push(&self, bytes: &[u8]) {
        let taken = self.serial.receive(bytes);
        if taken < bytes.len() {
            // A guest that has the port in loopback mode hears nothing from outside.
            tracing::debug!(lost = bytes.len() - taken, "serial port: input not taken");
        }
    }
}

#[cfg(test)]
#[path = "saved_tests.rs"]
mod saved_tests;
