//! The devices of the machine: local APIC, PIT, PICs, I/O APIC, serial port.

use guests::bare::cpu::Cpu;
use guests::bare::{interrupts, lapic, port, tsc};

use crate::Log;

/// Ticks a second of the local APIC's timer and of the PIT.
const LAPIC_HERTZ: u64 = 100;
const PIT_HERTZ: u64 = 50;
const PIT_COUNT: u16 = (1_193_182 / PIT_HERTZ) as u16;
/// Rate generator, both bytes.
const PIT_MODE: u8 = 0x34;
const LAPIC_VECTOR: u8 = interrupts::APIC_VECTORS;
const PIT_VECTOR: u8 = interrupts::PIC_VECTORS;
/// Only the PIT's line is open, and an odd set of the others is closed for good.
const PIC_LINES: u16 = 1;
const SERIAL_SCRATCH: u16 = 0x3ff;
const SCRATCH: u8 = 0x5a;

const ID: u32 = 0x20;
const TASK_PRIORITY: u32 = 0x80;
const LOGICAL_DESTINATION: u32 = 0xd0;
const DESTINATION_FORMAT: u32 = 0xe0;
const SPURIOUS: u32 = 0xf0;
const LVT_TIMER: u32 = 0x320;
const LVT_PERFORMANCE: u32 = 0x340;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const LVT_ERROR: u32 = 0x370;
const INITIAL_COUNT: u32 = 0x380;
const CURRENT_COUNT: u32 = 0x390;
const DIVIDE: u32 = 0x3e0;
const PERIODIC: u32 = 1 << 17;
const MASKED: u32 = 1 << 16;

const LAPIC: [(&str, u32); 12] = [
    ("lapic_id", ID),
    ("lapic_tpr", TASK_PRIORITY),
    ("lapic_ldr", LOGICAL_DESTINATION),
    ("lapic_dfr", DESTINATION_FORMAT),
    ("lapic_svr", SPURIOUS),
    ("lapic_lvt_timer", LVT_TIMER),
    ("lapic_lvt_performance", LVT_PERFORMANCE),
    ("lapic_lvt_lint0", LVT_LINT0),
    ("lapic_lvt_lint1", LVT_LINT1),
    ("lapic_lvt_error", LVT_ERROR),
    ("lapic_initial_count", INITIAL_COUNT),
    ("lapic_divide", DIVIDE),
];
/// Pins of the I/O APIC that get masked entries.
const PINS: core::ops::Range<u8> = 5..24;

/// Ports of the serial port whose values are to stay, and of the PICs.
const PORTS: [(&str, u16); 7] = [
    ("serial_ier", 0x3f9),
    ("serial_lcr", 0x3fb),
    ("serial_mcr", 0x3fc),
    ("serial_scratch", SERIAL_SCRATCH),
    ("pic1_mask", 0x21),
    ("pic2_mask", 0xa1),
    ("elcr1", 0x4d0),
];

/// What is expected of a vCPU's local APIC.
pub(crate) struct Lapic {
    registers: [u32; LAPIC.len()],
    ticks: Ticks,
}

impl Lapic {
    /// Sets it, with its timer running.
    pub(crate) fn set(cpu: Cpu, khz: u64) -> Self {
        let number = cpu.index() as u32;
        lapic::enable();
        lapic::write(DESTINATION_FORMAT, 0xffff_ffff);
        lapic::write(LOGICAL_DESTINATION, 1 << (24 + number % 8));
        lapic::write(LVT_PERFORMANCE, MASKED | (0x41 + number));
        lapic::write(LVT_LINT1, MASKED | (0x42 + number));
        lapic::write(LVT_ERROR, MASKED | (0x43 + number));
        // Blocks vectors below 0x20 only: there are none.
        lapic::write(TASK_PRIORITY, 0x10 + number);
        // Divided by 4. Its frequency is found by letting it run down for 10 ms.
        lapic::write(DIVIDE, 1);
        lapic::write(LVT_TIMER, MASKED | u32::from(LAPIC_VECTOR));
        lapic::write(INITIAL_COUNT, u32::MAX);
        let begin = tsc::now();
        tsc::sleep_us(khz, 10_000);
        let counted = u64::from(u32::MAX - lapic::read(CURRENT_COUNT));
        let cycles = (tsc::now() - begin).max(1);
        let count = counted * khz * 1000 / cycles / LAPIC_HERTZ;
        lapic::write(LVT_TIMER, PERIODIC | u32::from(LAPIC_VECTOR));
        lapic::write(INITIAL_COUNT, count.max(1) as u32);
        Self {
            registers: LAPIC.map(|(_, register)| lapic::read(register)),
            ticks: Ticks::new(cpu, LAPIC_VECTOR, LAPIC_HERTZ, khz),
        }
    }

    /// Compares it. `stopped`: the vCPU has stood still since the last time.
    pub(crate) fn compare(&mut self, stopped: bool, log: &mut Log) {
        for ((name, register), expected) in LAPIC.into_iter().zip(self.registers) {
            log.compare(
                format_args!("{name}"),
                expected.into(),
                lapic::read(register).into(),
            );
        }
        let current = lapic::read(CURRENT_COUNT);
        let [.., initial, _] = self.registers;
        if current > initial {
            log.compare(
                format_args!("lapic_current_count"),
                initial.into(),
                current.into(),
            );
        }
        self.ticks.compare("lapic_ticks", stopped, log);
    }

    pub(crate) fn ticks(&self) -> u64 {
        self.ticks.count()
    }
}

/// What is expected of the devices that there is one of.
pub(crate) struct Board {
    ports: [u8; PORTS.len()],
    pins: [u64; PINS.end as usize],
    /// None without a PIT.
    pit: Option<Ticks>,
}

impl Board {
    /// Sets them, with the PIT running.
    pub(crate) fn set(cpu: Cpu, khz: u64, log: &mut Log) -> Self {
        port::write(SERIAL_SCRATCH, SCRATCH);
        if port::read(SERIAL_SCRATCH) != SCRATCH {
            log.skip(format_args!("serial_scratch"));
        }
        interrupts::open_pic(PIC_LINES);
        port::write(0x43, PIT_MODE);
        port::write(0x40, PIT_COUNT as u8);
        port::write(0x40, (PIT_COUNT >> 8) as u8);
        let pit = pit_state().map(|_| Ticks::new(cpu, PIT_VECTOR, PIT_HERTZ, khz));
        if pit.is_none() {
            log.skip(format_args!("pit"));
        }
        let mut pins = [0; PINS.end as usize];
        for pin in PINS {
            // Masked, logical destination, lowest priority, level-triggered for odd pins.
            let entry =
                0x1_0900 | u64::from(pin % 2) << 15 | u64::from(0x50 + pin) | u64::from(pin) << 56;
            interrupts::set_ioapic_entry(pin, entry);
            pins[usize::from(pin)] = interrupts::ioapic_entry(pin);
            if pins[usize::from(pin)] != entry {
                log.skip(format_args!("ioapic_entry{pin}"));
            }
        }
        Self {
            ports: PORTS.map(|(_, port)| port::read(port)),
            pins,
            pit,
        }
    }

    /// Compares them.
    pub(crate) fn compare(&mut self, stopped: bool, log: &mut Log) {
        for ((name, port), expected) in PORTS.into_iter().zip(self.ports) {
            log.compare(
                format_args!("{name}"),
                expected.into(),
                port::read(port).into(),
            );
        }
        for pin in PINS {
            let expected = self.pins[usize::from(pin)];
            log.compare(
                format_args!("ioapic_entry{pin}"),
                expected,
                interrupts::ioapic_entry(pin),
            );
        }
        if let Some(ticks) = &mut self.pit {
            if let Some((mode, count)) = pit_state() {
                log.compare(format_args!("pit_mode"), PIT_MODE.into(), mode.into());
                if count > PIT_COUNT {
                    log.compare(format_args!("pit_count"), PIT_COUNT.into(), count.into());
                }
            }
            ticks.compare("pit_ticks", stopped, log);
        }
    }

    pub(crate) fn pit_ticks(&self) -> u64 {
        self.pit.as_ref().map_or(0, Ticks::count)
    }
}

/// Mode and count of the PIT's channel 0, by the read-back command (Intel 8254).
fn pit_state() -> Option<(u8, u16)> {
    port::write(0x43, 0xc2);
    let (status, low, high) = (port::read(0x40), port::read(0x40), port::read(0x40));
    // The output and "null count" change all the time.
    let state = (status & 0x3f, u16::from_le_bytes([low, high]));
    (status != 0xff).then_some(state)
}

/// Interrupts that ought to come at a certain rate.
struct Ticks {
    cpu: Cpu,
    vector: u8,
    /// TSC cycles from one to the next.
    interval: u64,
    /// When the count was this.
    begin: (u64, u64),
}

impl Ticks {
    /// Long enough that a busy host makes up for ticks that it could not deliver in time.
    const WINDOW: u64 = 200;

    fn new(cpu: Cpu, vector: u8, hertz: u64, khz: u64) -> Self {
        Self {
            cpu,
            vector,
            interval: khz * 1000 / hertz,
            begin: (tsc::now(), cpu.count(vector)),
        }
    }

    fn count(&self) -> u64 {
        self.cpu.count(self.vector)
    }

    /// Every so many ticks: were there at least a quarter and at most twice of what the TSC makes
    /// expect? KVM drops ticks that come while the vCPU does not run.
    fn compare(&mut self, name: &str, stopped: bool, log: &mut Log) {
        let (now, count) = (tsc::now(), self.count());
        let expected = now.saturating_sub(self.begin.0) / self.interval;
        if expected < Self::WINDOW && now >= self.begin.0 && !stopped {
            return;
        }
        let found = count - self.begin.1;
        self.begin = (now, count);
        if !stopped && expected >= Self::WINDOW && !(expected / 4..=expected * 2).contains(&found) {
            log.compare(format_args!("{name}"), expected, found);
        }
    }
}

/// Stops the local APIC's timer.
pub(crate) fn spoil_lapic() {
    lapic::write(INITIAL_COUNT, 0);
}

/// Lets the PIT stand.
pub(crate) fn spoil_pit() {
    port::write(0x43, 0x30);
}

/// Changes the PICs' masks.
pub(crate) fn spoil_pic() {
    port::write(0xa1, 0x0f);
}

/// Changes an entry of the I/O APIC.
pub(crate) fn spoil_ioapic() {
    interrupts::set_ioapic_entry(7, 0x1_0000);
}

/// Changes the serial port's scratch register.
pub(crate) fn spoil_serial() {
    port::write(SERIAL_SCRATCH, 0);
}
