//! Ways out.

use super::{port, privileged};

/// ACPI's PM1a control register, where QEMU's machines and Ferry have it.
const PM1A_CONTROL: u16 = 0x604;
/// SLP_EN, with the sleep type 0 that means S5 there.
const SLEEP_ENABLE: u16 = 1 << 13;
/// The keyboard controller's command port.
const KEYBOARD_CONTROLLER: u16 = 0x64;
/// Pulse the reset line.
const PULSE_RESET: u8 = 0xfe;

/// Powers off; halts for good where the machine can't.
pub fn off() -> ! {
    port::write_u16(PM1A_CONTROL, SLEEP_ENABLE);
    privileged::stop()
}

/// Resets through the keyboard controller; halts for good where there is none.
pub fn reset() -> ! {
    port::write(KEYBOARD_CONTROLLER, PULSE_RESET);
    privileged::stop()
}
