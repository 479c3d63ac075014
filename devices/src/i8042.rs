//! The keyboard controller, as far as a machine without a keyboard needs it: its command to reset
//! the CPU.

use std::convert::Infallible;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::bus::{MachineRequest, PortDevice};
use crate::state::SaveRestore;

/// The command and status port. The data port, 0x60, is left out: nobody answers there, so that a
/// guest's driver finds no keyboard.
const PORT: u16 = 0x64;
/// The offset by which vm-superio knows the command port.
const COMMAND_OFFSET: u8 = 4;

#[derive(Default)]
struct ResetLatch(AtomicBool);

impl Trigger for ResetLatch {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// An i8042 that only resets.
pub struct I8042(Mutex<I8042Device<ResetLatch>>);

impl I8042 {
    /// The controller.
    pub fn new() -> Self {
        Self(Mutex::new(I8042Device::new(ResetLatch::default())))
    }
}

impl Default for I8042 {
    fn default() -> Self {
        Self::new()
    }
}

impl PortDevice for I8042 {
    fn name(&self) -> &'static str {
        "i8042"
    }

    fn ports(&self) -> RangeInclusive<u16> {
        PORT..=PORT
    }

    fn read(&self, _port: u16) -> u8 {
        let mut device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        device.read(COMMAND_OFFSET)
    }

    fn write(&self, _port: u16, value: u8) -> Option<MachineRequest> {
        let mut device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(()) = device.write(COMMAND_OFFSET, value);
        device
            .reset_evt()
            .0
            .swap(false, Ordering::Relaxed)
            .then_some(MachineRequest::Reset)
    }

    fn reset(&self) {}

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let i8042 = I8042::new();
        assert_eq!(i8042.write(PORT, 0xd1), None);
        assert_eq!(i8042.write(PORT, 0xfe), Some(MachineRequest::Reset));
        assert_eq!(i8042.write(PORT, 0xff), None);
    }
}
