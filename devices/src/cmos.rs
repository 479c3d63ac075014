//! The CMOS clock: the time-of-day part of an MC146818, and its battery-backed RAM.
//!
//! Its time is the host's UTC plus what the guest has set it off by. It raises no interrupts
//! (alarm, periodic, update-ended).

use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};

use crate::bus::{MachineRequest, PortDevice};
use crate::state::{SaveRestore, StateError, decode, encode};

const NAME: &str = "cmos";
const INDEX: u16 = 0x70;
const RAM: usize = 128;

const SECONDS: usize = 0x00;
const MINUTES: usize = 0x02;
const HOURS: usize = 0x04;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const STATUS_A: usize = 0x0a;
const STATUS_B: usize = 0x0b;
const STATUS_C: usize = 0x0c;
const STATUS_D: usize = 0x0d;
const CENTURY: usize = 0x32;

/// Status A: a 32.768 kHz time base and the usual periodic rate, no update in progress.
const STATUS_A_DEFAULT: u8 = 0x26;
/// Status B: the clock is halted while the guest sets it.
const STATUS_B_SET: u8 = 1 << 7;
/// Status B: binary instead of BCD.
const STATUS_B_BINARY: u8 = 1 << 2;
/// Status B: 24-hour mode, the only one that this clock has.
const STATUS_B_24_HOUR: u8 = 1 << 1;
/// Status D: the battery is good.
const STATUS_D_VALID: u8 = 1 << 7;

/// The largest offset that a guest can set: no two dates of years 0 to 9999 are further apart.
const MAX_OFFSET: i64 = 10_000 * 366 * 86_400;

/// The CMOS clock.
pub struct Cmos {
    registers: Mutex<Registers>,
    now: fn() -> OffsetDateTime,
}

struct Registers {
    index: u8,
    /// What the guest's clock is ahead of the host's, in seconds.
    offset: i64,
    /// All registers; those of the time are only valid while the clock is halted.
    ram: [u8; RAM],
}

impl Registers {
    fn power_on() -> Self {
        let mut ram = [0; RAM];
        ram[STATUS_A] = STATUS_A_DEFAULT;
        ram[STATUS_B] = STATUS_B_24_HOUR;
        Self {
            index: 0,
            offset: 0,
            ram,
        }
    }

    fn halted(&self) -> bool {
        self.ram[STATUS_B] & STATUS_B_SET != 0
    }

    /// Writes the time into the registers.
    fn latch(&mut self, host: OffsetDateTime) {
        let guest = host
            .checked_add(time::Duration::seconds(self.offset))
            .unwrap_or(host);
        let year = guest.year().rem_euclid(10_000);
        for (register, value) in [
            (SECONDS, guest.second()),
            (MINUTES, guest.minute()),
            (HOURS, guest.hour()),
            (WEEKDAY, guest.weekday().number_from_sunday()),
            (DAY, guest.day()),
            (MONTH, guest.month().into()),
            (YEAR, (year % 100) as u8),
            (CENTURY, (year / 100) as u8),
        ] {
            self.ram[register] = if self.ram[STATUS_B] & STATUS_B_BINARY != 0 {
                value
            } else {
                ((value / 10) << 4) | (value % 10)
            };
        }
    }

    /// Takes the time from the registers; one that is no date changes nothing.
    fn set(&mut self, host: OffsetDateTime) {
        let field = |register: usize| {
            let value = self.ram[register];
            if self.ram[STATUS_B] & STATUS_B_BINARY != 0 {
                value
            } else {
                (value >> 4) * 10 + (value & 0xf)
            }
        };
        let year = i32::from(field(CENTURY)) * 100 + i32::from(field(YEAR));
        let guest = Month::try_from(field(MONTH))
            .and_then(|month| Date::from_calendar_date(year, month, field(DAY)))
            .and_then(|date| {
                let time = Time::from_hms(field(HOURS), field(MINUTES), field(SECONDS))?;
                Ok(PrimitiveDateTime::new(date, time).assume_utc())
            });
        if let Ok(guest) = guest {
            self.offset = (guest - host).whole_seconds();
        }
    }
}

impl Cmos {
    /// A clock that shows the host's UTC.
    pub fn new() -> Self {
        Self::with_time(OffsetDateTime::now_utc)
    }

    fn with_time(now: fn() -> OffsetDateTime) -> Self {
        Self {
            registers: Mutex::new(Registers::power_on()),
            now,
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

fn is_time(register: usize) -> bool {
    matches!(
        register,
        SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY
    )
}

impl PortDevice for Cmos {
    fn name(&self) -> &'static str {
        NAME
    }

    fn ports(&self) -> RangeInclusive<u16> {
        INDEX..=INDEX + 1
    }

    fn read(&self, port: u16) -> u8 {
        if port == INDEX {
            // The index register is write-only.
            return 0xff;
        }
        let mut registers = self.registers();
        let index = usize::from(registers.index);
        if is_time(index) && !registers.halted() {
            registers.latch((self.now)());
        }
        match index {
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            _ => registers.ram[index],
        }
    }

    fn write(&self, port: u16, value: u8) -> Option<MachineRequest> {
        let mut registers = self.registers();
        if port == INDEX {
            // Bit 7 masks NMIs on a PC; this machine has none from its chipset.
            registers.index = value & 0x7f;
            return None;
        }
        let index = usize::from(registers.index);
        match index {
            STATUS_C | STATUS_D => {}
            STATUS_A => registers.ram[STATUS_A] = value & 0x7f,
            STATUS_B => {
                let halted = registers.halted();
                if !halted {
                    registers.latch((self.now)());
                } else if value & STATUS_B_SET == 0 {
                    registers.set((self.now)());
                }
                registers.ram[STATUS_B] =
                    value & (STATUS_B_SET | STATUS_B_BINARY) | STATUS_B_24_HOUR;
            }
            _ if is_time(index) && !registers.halted() => {
                registers.latch((self.now)());
                registers.ram[index] = value;
                registers.set((self.now)());
            }
            _ => registers.ram[index] = value,
        }
        None
    }

    /// The clock has a battery: a reset changes only what is selected.
    fn reset(&self) {
        self.registers().index = 0;
    }

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        Some(self)
    }
}

/// Version 1 of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedCmos {
    index: u8,
    offset_seconds: i64,
    ram: Vec<u8>,
}

impl SaveRestore for Cmos {
    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let registers = self.registers();
        let Registers { index, offset, ram } = &*registers;
        encode(
            NAME,
            &SavedCmos {
                index: *index,
                offset_seconds: *offset,
                ram: ram.to_vec(),
            },
        )
    }

    fn restore(&self, _version: u32, body: &[u8]) -> Result<(), StateError> {
        let SavedCmos {
            index,
            offset_seconds,
            ram,
        } = decode(NAME, body)?;
        let field = |field, value, expected| StateError::field(NAME, field, value, expected);
        if usize::from(index) >= RAM {
            return Err(field("index", index.into(), "less than 128"));
        }
        if offset_seconds.unsigned_abs() > MAX_OFFSET.unsigned_abs() {
            return Err(field(
                "offset_seconds",
                offset_seconds as u64,
                "at most 10,000 years either way",
            ));
        }
        let length = ram.len() as u64;
        let ram = <[u8; RAM]>::try_from(ram).map_err(|_| field("ram", length, "128 bytes"))?;
        if ram[STATUS_B] & !(STATUS_B_SET | STATUS_B_BINARY) != STATUS_B_24_HOUR {
            return Err(field(
                "ram[0x0b]",
                ram[STATUS_B].into(),
                "24-hour mode without interrupts",
            ));
        }
        *self.registers() = Registers {
            index,
            offset: offset_seconds,
            ram,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noon() -> OffsetDateTime {
        PrimitiveDateTime::new(
            Date::from_calendar_date(2031, Month::July, 9).unwrap(),
            Time::from_hms(12, 34, 56).unwrap(),
        )
        .assume_utc()
    }

    fn read(cmos: &Cmos, register: usize) -> u8 {
        cmos.write(0x70, register as u8);
        cmos.read(0x71)
    }

    fn write(cmos: &Cmos, register: usize, value: u8) {
        cmos.write(0x70, register as u8 | 0x80);
        cmos.write(0x71, value);
    }

    fn time_of(cmos: &Cmos) -> Vec<u8> {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS]
            .map(|register| read(cmos, register))
            .to_vec()
    }

    #[test]
    fn shows_the_time_in_bcd_and_binary() {
        let cmos = Cmos::with_time(noon);
        assert_eq!(time_of(&cmos), [0x20, 0x31, 0x07, 0x09, 0x12, 0x34, 0x56]);
        assert_eq!(read(&cmos, WEEKDAY), 4);
        write(&cmos, STATUS_B, STATUS_B_BINARY);
        assert_eq!(time_of(&cmos), [20, 31, 7, 9, 12, 34, 56]);
        assert_eq!(read(&cmos, STATUS_D), STATUS_D_VALID);
        assert_eq!(read(&cmos, STATUS_A) & 0x80, 0);
    }

    #[test]
    fn a_guest_sets_it_and_the_setting_survives_a_restore() {
        let cmos = Cmos::with_time(noon);
        write(&cmos, STATUS_B, STATUS_B_SET | STATUS_B_24_HOUR);
        write(&cmos, YEAR, 0x30);
        write(&cmos, HOURS, 0x01);
        write(&cmos, STATUS_B, STATUS_B_24_HOUR);
        write(&cmos, 0x40, 0xab);
        let expected = [0x20, 0x30, 0x07, 0x09, 0x01, 0x34, 0x56];
        assert_eq!(time_of(&cmos), expected);

        let body = cmos.save().unwrap();
        let other = Cmos::with_time(noon);
        other.restore(1, &body).unwrap();
        assert_eq!(time_of(&other), expected);
        assert_eq!(read(&other, 0x40), 0xab);
    }

    #[test]
    fn a_time_that_is_no_date_changes_nothing() {
        let cmos = Cmos::with_time(noon);
        write(&cmos, MONTH, 0x13);
        write(&cmos, HOURS, 0xff);
        assert_eq!(time_of(&cmos), [0x20, 0x31, 0x07, 0x09, 0x12, 0x34, 0x56]);
    }

    #[test]
    fn a_state_that_cannot_be_is_refused() {
        let cmos = Cmos::with_time(noon);
        let good = SavedCmos {
            index: 3,
            offset_seconds: 5,
            ram: Registers::power_on().ram.to_vec(),
        };
        let refused = |change: &dyn Fn(&mut SavedCmos)| {
            let mut bad = good.clone();
            change(&mut bad);
            let body = encode(NAME, &bad).unwrap();
            cmos.restore(1, &body).unwrap_err().to_string()
        };
        assert!(refused(&|s| s.index = 128).contains("'index' is 128"));
        assert!(refused(&|s| s.offset_seconds = i64::MIN).contains("offset_seconds"));
        assert!(refused(&|s| s.ram.truncate(127)).contains("'ram' is 127"));
        assert!(refused(&|s| s.ram[STATUS_B] = 0).contains("ram[0x0b]"));
        cmos.restore(1, &encode(NAME, &good).unwrap()).unwrap();
    }
}
