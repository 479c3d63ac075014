//! The ports by which a guest turns its machine off or resets it, at the addresses that QEMU's
//! `pc` and `q35` machines have: the ACPI PM1a control register at 0x604 and the reset control
//! register at 0xcf9.

use std::ops::RangeInclusive;

use tracing::warn;

use crate::bus::{MachineRequest, PortDevice};
use crate::state::SaveRestore;

/// PM1a_CNT (ACPI 6.5, section 4.8.3.2.1). Its high byte has all that is acted on.
const PM1A_CNT: u16 = 0x604;
/// SLP_EN, bit 13 of the register.
const SLP_EN: u8 = 1 << 5;
/// SLP_TYP, bits 10 to 12 of the register. 0 is soft off (S5), as in QEMU.
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;

/// A guest's way to power off: SLP_EN with SLP_TYP 0 in PM1a_CNT.
#[derive(Clone, Copy, Debug, Default)]
pub struct PowerPorts;

impl PowerPorts {
    /// The register.
    pub fn new() -> Self {
        Self
    }
}

impl PortDevice for PowerPorts {
    fn name(&self) -> &'static str {
        "power"
    }

    fn ports(&self) -> RangeInclusive<u16> {
        PM1A_CNT..=PM1A_CNT + 1
    }

    fn read(&self, _port: u16) -> u8 {
        // SCI_EN (bit 0) is off, and SLP_EN always reads as zero.
        0
    }

    fn write(&self, port: u16, value: u8) -> Option<MachineRequest> {
        if port == PM1A_CNT || value & SLP_EN == 0 {
            return None;
        }
        match (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK {
            0 => Some(MachineRequest::PowerOff),
            slp_typ => {
                warn!(
                    slp_typ,
                    "the guest asked for a sleep state that this machine doesn't have"
                );
                None
            }
        }
    }

    fn reset(&self) {}

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        None
    }
}

/// The port of the reset control register.
const RESET_CONTROL: u16 = 0xcf9;
/// RST_CPU: resets when written as 1.
const RST_CPU: u8 = 1 << 2;

/// A guest's way to reset: RST_CPU in the reset control register.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResetPort;

impl ResetPort {
    /// The register.
    pub fn new() -> Self {
        Self
    }
}

impl PortDevice for ResetPort {
    fn name(&self) -> &'static str {
        "reset-control"
    }

    fn ports(&self) -> RangeInclusive<u16> {
        RESET_CONTROL..=RESET_CONTROL
    }

    fn read(&self, _port: u16) -> u8 {
        0
    }

    fn write(&self, _port: u16, value: u8) -> Option<MachineRequest> {
        (value & RST_CPU != 0).then_some(MachineRequest::Reset)
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
    fn soft_off_needs_slp_en_and_type_0() {
        let power = PowerPorts::new();
        assert_eq!(power.write(0x605, 0x20), Some(MachineRequest::PowerOff));
        assert_eq!(power.write(0x605, 0x00), None);
        assert_eq!(power.write(0x605, 0x24), None);
        assert_eq!(power.write(0x604, 0x20), None);
    }

    #[test]
    fn rst_cpu_resets() {
        let reset = ResetPort::new();
        assert_eq!(reset.write(0xcf9, 0x02), None);
        assert_eq!(reset.write(0xcf9, 0x06), Some(MachineRequest::Reset));
    }
}
