//! The assembly of entry and traps, and the first Rust code after it.
#![allow(unsafe_code, reason = "defines and is called by assembly")]

use core::arch::global_asm;

use super::boot::{Boot, Protocol};
use super::cpu::Cpu;
use super::{memory, power, serial};
use crate::Hex;
use crate::fault::Fault;

// One piece: traps.s uses the symbols that entry.s sets.
global_asm!(
    include_str!("entry.s"),
    include_str!("traps.s"),
    options(raw)
);

/// Second vCPUs come with this instead of a protocol.
const ENTRY_SECOND: u64 = 2;

/// Called at CPL 3 by `entry.s`, through the bin's `user_start`.
pub fn start(info: u64, entry: u64, block: u64, main: fn(&Boot) -> !) -> ! {
    let cpu = Cpu::at(block);
    if entry == ENTRY_SECOND {
        super::smp::second(cpu);
    }
    memory::install_traps();
    serial::initialize();
    let protocol = if entry == 0 {
        Protocol::Pvh
    } else {
        Protocol::Linux64
    };
    match Boot::read(protocol, info) {
        Ok(boot) => main(&boot),
        Err(reason) => super::give_up(&reason),
    }
}

/// Called at CPL 3 by `traps.s`, with what it noted down.
// SAFETY: nothing else has this name.
#[unsafe(no_mangle)]
extern "C" fn fault_start(_record: u64, _: u64, block: u64) -> ! {
    let cpu = Cpu::at(block);
    let record = cpu.fault();
    serial::line_at_any_cost(&Fault::Exception {
        vector: record.vector,
        error: Hex(record.error),
        rip: Hex(record.rip),
        cpl: record.cs & 3,
        cr2: Hex(record.cr2),
        cpu: cpu.index() as u64,
    });
    power::off()
}
