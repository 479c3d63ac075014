//! The port bus: which device answers at which I/O port.

use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::state::SaveRestore;

/// What a guest asks of the whole machine with a port write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineRequest {
    /// Reset the machine.
    Reset,
    /// Turn the machine off.
    PowerOff,
}

/// A device with 8-bit registers at consecutive ports.
///
/// Wider accesses are split by the [`PortBus`], as the bus of a PC does.
pub trait PortDevice: Send + Sync {
    /// The stable name of the device and of its saved state.
    fn name(&self) -> &'static str;

    /// The ports that the device answers at.
    fn ports(&self) -> RangeInclusive<u16>;

    /// Reads the register at `port`.
    fn read(&self, port: u16) -> u8;

    /// Writes the register at `port`.
    fn write(&self, port: u16, value: u8) -> Option<MachineRequest>;

    /// Back to the state after power-on.
    fn reset(&self);

    /// The device's saved state; `None` says that it has none.
    fn saved_state(&self) -> Option<&dyn SaveRestore>;
}

/// Two devices at one port.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("I/O port {port:#x} of {second} belongs to {first} already")]
pub struct PortConflict {
    /// The first port that both claim.
    pub port: u16,
    /// The device that has it.
    pub first: &'static str,
    /// The device that wants it.
    pub second: &'static str,
}

/// The devices by port.
#[derive(Default)]
pub struct PortBus {
    devices: Vec<Arc<dyn PortDevice>>,
}

impl PortBus {
    /// An empty bus: all ports read as 0xff.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a device at its ports.
    pub fn add(&mut self, device: Arc<dyn PortDevice>) -> Result<(), PortConflict> {
        for port in device.ports() {
            if let Some(first) = self.find(port) {
                return Err(PortConflict {
                    port,
                    first: first.name(),
                    second: device.name(),
                });
            }
        }
        self.devices.push(device);
        Ok(())
    }

    /// The devices, in the order in which they were added.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<dyn PortDevice>> {
        self.devices.iter()
    }

    /// Reads `data.len()` consecutive ports from `port`. Ports without a device read as 0xff.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        let mut port = port;
        for byte in data {
            *byte = self.find(port).map_or(0xff, |device| device.read(port));
            port = port.wrapping_add(1);
        }
    }

    /// Writes `data.len()` consecutive ports from `port`; says what the guest asks of the machine
    /// with it.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<MachineRequest> {
        let mut request = None;
        let mut port = port;
        for &byte in data {
            if let Some(device) = self.find(port) {
                request = device.write(port, byte).or(request);
            }
            port = port.wrapping_add(1);
        }
        request
    }

    fn find(&self, port: u16) -> Option<&Arc<dyn PortDevice>> {
        // A handful of devices: a scan beats a map.
        self.devices
            .iter()
            .find(|device| device.ports().contains(&port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::i8042::I8042;
    use crate::power::ResetPort;

    #[test]
    fn wide_accesses_are_split_over_the_ports() {
        let mut bus = PortBus::new();
        bus.add(Arc::new(ResetPort::new())).unwrap();
        assert_eq!(
            bus.write(0xcf8, &0x0600u16.to_le_bytes()),
            Some(MachineRequest::Reset)
        );
        assert_eq!(bus.write(0xcf8, &[6, 0]), None);
        let mut nothing = [0u8; 4];
        bus.read(0xfffe, &mut nothing);
        assert_eq!(nothing, [0xff; 4]);
    }

    #[test]
    fn a_port_has_one_owner() {
        let mut bus = PortBus::new();
        bus.add(Arc::new(I8042::new())).unwrap();
        assert_eq!(
            bus.add(Arc::new(I8042::new())).unwrap_err().to_string(),
            "I/O port 0x64 of i8042 belongs to i8042 already"
        );
    }
}
