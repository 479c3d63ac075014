//! The ports by which a guest turns its machine off or resets it, and by which it learns that it
//! shall turn itself off: ACPI's fixed hardware, at the addresses that QEMU's `pc` and `q35`
//! machines have. The PM1a event block is at 0x600, the control register at 0x604, the reset control
//! register at 0xcf9.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::LevelLine;
use crate::bus::{MachineRequest, PortDevice};
use crate::state::{SaveRestore, StateError, decode, encode};

/// The SCI, by which the fixed hardware interrupts.
pub const SCI: u32 = 9;

const NAME: &str = "power";

/// PM1_STS (ACPI 6.5, section 4.8.3.1.1): the low and the high byte. Writing a bit as 1 clears it.
const STATUS: u16 = 0x600;
const STATUS_HIGH: u16 = STATUS + 1;
/// PM1_EN (section 4.8.3.1.2).
const ENABLE: u16 = 0x602;
const ENABLE_HIGH: u16 = ENABLE + 1;
/// PM1_CNT (section 4.8.3.2.1). Its high byte has all that is acted on.
const CONTROL: u16 = 0x604;
const CONTROL_HIGH: u16 = CONTROL + 1;

/// PWRBTN_STS and PWRBTN_EN.
const POWER_BUTTON: u16 = 1 << 8;
/// The events that can be enabled: timer, global lock, power button, sleep button, RTC. Only the
/// button ever comes; but a kernel that enables one and reads that it isn't takes the hardware for
/// broken.
const EVENTS: u16 = 1 << 0 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
/// SCI_EN: the machine is in ACPI mode all the time.
const SCI_EN: u8 = 1;
/// SLP_EN, bit 13 of the control register.
const SLP_EN: u8 = 1 << 5;
/// SLP_TYP, bits 10 to 12 of the control register. 0 is soft off (S5), as in QEMU.
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;

/// The PM1a registers: the power button, and a guest's way to power off (SLP_EN with SLP_TYP 0).
///
/// A press sets PWRBTN_STS. While that and PWRBTN_EN are set the SCI is asserted; a guest's driver
/// clears the status, and tells whoever turns the guest off.
pub struct Pm1 {
    registers: Mutex<Registers>,
    sci: Arc<dyn LevelLine>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    status: u16,
    enable: u16,
}

impl Registers {
    fn interrupts(self) -> bool {
        self.status & self.enable != 0
    }
}

impl Pm1 {
    /// The registers, with their interrupt line.
    pub fn new(sci: Arc<dyn LevelLine>) -> Self {
        Self {
            registers: Mutex::default(),
            sci,
        }
    }

    /// Presses the power button, shortly: what follows from it is the guest's to decide.
    pub fn press_power_button(&self) {
        self.change(|registers| registers.status |= POWER_BUTTON);
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes registers, and the line with them: under the lock, so that the line's last level is
    /// that of the last change.
    fn change(&self, f: impl FnOnce(&mut Registers)) {
        let mut registers = self.registers();
        f(&mut registers);
        if let Err(err) = self.sci.set(registers.interrupts()) {
            warn!(%err, "power management: can't set the SCI");
        }
    }
}

impl PortDevice for Pm1 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn ports(&self) -> RangeInclusive<u16> {
        STATUS..=CONTROL_HIGH
    }

    fn read(&self, port: u16) -> u8 {
        let Registers { status, enable } = *self.registers();
        match port {
            STATUS => status.to_le_bytes()[0],
            STATUS_HIGH => status.to_le_bytes()[1],
            ENABLE => enable.to_le_bytes()[0],
            ENABLE_HIGH => enable.to_le_bytes()[1],
            CONTROL => SCI_EN,
            // SLP_EN always reads as zero.
            _ => 0,
        }
    }

    fn write(&self, port: u16, value: u8) -> Option<MachineRequest> {
        let low = u16::from(value);
        let high = low << 8;
        match port {
            STATUS => self.change(|registers| registers.status &= !low),
            STATUS_HIGH => self.change(|registers| {
                if registers.status & high & POWER_BUTTON != 0 {
                    debug!("the guest has seen the power button pressed");
                }
                registers.status &= !high;
            }),
            ENABLE => self.change(|registers| {
                registers.enable = registers.enable & 0xff00 | low & EVENTS;
            }),
            ENABLE_HIGH => self.change(|registers| {
                registers.enable = registers.enable & 0x00ff | high & EVENTS;
            }),
            CONTROL_HIGH => return sleep(value),
            _ => {}
        }
        None
    }

    fn reset(&self) {
        self.change(|registers| *registers = Registers::default());
    }

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        Some(self)
    }
}

/// A write to the high byte of the control register.
fn sleep(value: u8) -> Option<MachineRequest> {
    if value & SLP_EN == 0 {
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

/// Version 1 of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedPm1 {
    status: u16,
    enable: u16,
}

impl SaveRestore for Pm1 {
    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let Registers { status, enable } = *self.registers();
        encode(NAME, &SavedPm1 { status, enable })
    }

    fn restore(&self, _version: u32, body: &[u8]) -> Result<(), StateError> {
        let SavedPm1 { status, enable } = decode(NAME, body)?;
        let field = |name, value: u16, bits: u16, expected| {
            StateError::unless(value & !bits == 0, NAME, name, value.into(), expected)
        };
        field("status", status, POWER_BUTTON, "at most the power button's")?;
        field("enable", enable, EVENTS, "bits 0, 5, 8, 9 and 10")?;
        let saved = Registers { status, enable };
        let mut registers = self.registers();
        // KVM's saved interrupt controllers know no lines: they must be set anew.
        self.sci
            .set(saved.interrupts())
            .map_err(|source| StateError::Restore {
                device: NAME.to_owned(),
                source,
            })?;
        *registers = saved;
        Ok(())
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
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Default)]
    struct Line(AtomicBool);

    impl LevelLine for Line {
        fn set(&self, asserted: bool) -> io::Result<()> {
            self.0.store(asserted, Ordering::Relaxed);
            Ok(())
        }
    }

    impl Line {
        fn asserted(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn pm1() -> (Pm1, Arc<Line>) {
        let line = Arc::new(Line::default());
        (Pm1::new(line.clone()), line)
    }

    #[test]
    fn soft_off_needs_slp_en_and_type_0() {
        let (pm1, _) = pm1();
        assert_eq!(pm1.write(0x605, 0x20), Some(MachineRequest::PowerOff));
        assert_eq!(pm1.write(0x605, 0x00), None);
        assert_eq!(pm1.write(0x605, 0x24), None);
        assert_eq!(pm1.write(0x604, 0x20), None);
        assert_eq!(pm1.read(0x604) & 1, 1, "SCI_EN");
    }

    #[test]
    fn the_sci_is_asserted_until_the_guest_clears_the_press() {
        let (pm1, sci) = pm1();
        pm1.write(0x603, 1);
        assert!(!sci.asserted());
        pm1.press_power_button();
        assert!(sci.asserted());
        assert_eq!((pm1.read(0x600), pm1.read(0x601)), (0, 1));
        // Writing zeroes, or other bits, clears nothing.
        pm1.write(0x600, 0xff);
        pm1.write(0x601, 0xfe);
        assert!(sci.asserted());
        pm1.write(0x601, 1);
        assert!(!sci.asserted());
        assert_eq!(pm1.read(0x601), 0);
    }

    #[test]
    fn a_press_that_is_not_enabled_waits() {
        let (pm1, sci) = pm1();
        pm1.press_power_button();
        assert!(!sci.asserted());
        pm1.write(0x603, 1);
        assert!(sci.asserted());
        pm1.write(0x603, 0);
        assert!(!sci.asserted());
        pm1.write(0x603, 1);
        pm1.reset();
        assert!(!sci.asserted());
        assert_eq!((pm1.read(0x601), pm1.read(0x603)), (0, 0));
    }

    #[test]
    fn events_can_be_enabled_though_they_never_come() {
        let (pm1, _) = pm1();
        pm1.write(0x602, 0xff);
        pm1.write(0x603, 0xff);
        assert_eq!((pm1.read(0x602), pm1.read(0x603)), (0x21, 0x07));
    }

    #[test]
    fn a_press_that_the_guest_has_not_seen_survives_a_restore() {
        let (pm1, _) = self::pm1();
        pm1.write(0x602, 0x20);
        pm1.write(0x603, 1);
        pm1.press_power_button();
        let body = pm1.save().unwrap();
        // Version 1, as it is on the wire: status, enable.
        assert_eq!(body, [0x00, 0x01, 0x20, 0x01]);
        let (other, sci) = self::pm1();
        other.restore(1, &body).unwrap();
        assert!(sci.asserted());
        assert_eq!((other.read(0x601), other.read(0x603)), (1, 1));
        other.write(0x601, 1);
        assert!(!sci.asserted());
        // And one that it has seen doesn't come again.
        pm1.restore(1, &other.save().unwrap()).unwrap();
        assert_eq!(pm1.read(0x601), 0);
    }

    #[test]
    fn a_state_that_cannot_be_is_refused() {
        let (pm1, sci) = pm1();
        for (body, expected) in [
            (&[0x00, 0x81, 0x20, 0x01][..], "'status' is 33024"),
            (&[0x00, 0x01, 0x22, 0x01], "'enable' is 290"),
            (&[0x00, 0x01, 0x20], "can't be decoded"),
            (&[0x00, 0x01, 0x20, 0x01, 0x00], "1 bytes behind"),
        ] {
            let error = pm1.restore(1, body).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(!sci.asserted());
        assert_eq!(pm1.save().unwrap(), [0; 4]);
    }

    #[test]
    fn rst_cpu_resets() {
        let reset = ResetPort::new();
        assert_eq!(reset.write(0xcf9, 0x02), None);
        assert_eq!(reset.write(0xcf9, 0x06), Some(MachineRequest::Reset));
    }
}
