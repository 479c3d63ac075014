//! What `boot` says and does, however it was entered.

use guests::Hex;
use guests::bare::boot::{self, Boot, Region};
use guests::bare::cpu::Cpu;
use guests::bare::{memory, port, power, privileged, serial, smp, tsc};
use guests::boot::{COMMAND_LINE, Options, Probe, Protocol, Report, Then, checksum};

/// To wait by if nobody tells the TSC's frequency.
const GUESSED_KHZ: u64 = 3_000_000;

pub(crate) fn main(boot: &Boot) -> ! {
    let options = Options::find(boot.command_line());
    let protocol = match boot.protocol {
        boot::Protocol::Pvh => Protocol::Pvh,
        boot::Protocol::Linux64 => Protocol::Linux64,
    };
    serial::line(&Report::Entered {
        protocol,
        rsdp: Hex(boot.rsdp),
    });
    serial::line(&format_args!("{COMMAND_LINE}{}", boot.command_line()));
    for region in boot.memory() {
        serial::line(&Report::Region {
            base: Hex(region.base),
            size: Hex(region.size),
            kind: region.kind.into(),
            probe: probe(boot, region),
        });
    }
    if let Some((address, size)) = boot.initrd {
        // SAFETY: where the VMM says that the initrd is, mapped like all RAM.
        let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, size as usize) };
        serial::line(&Report::Initrd {
            address: Hex(address),
            size,
            checksum: Hex(checksum(bytes)),
        });
    }
    let khz = tsc::frequency(0).unwrap_or(GUESSED_KHZ);
    serial::line(&Report::Vcpus {
        running: smp::start(khz, options.cpus, rest),
    });
    serial::line(&Report::Done { then: options.then });
    end(options.then)
}

/// What a second vCPU does.
fn rest(_: Cpu) -> ! {
    privileged::stop()
}

/// Writes to the last page of a region that is free, and reads it again.
fn probe(boot: &Boot, region: &Region) -> Probe {
    let mut last = None;
    memory::free(boot, region.base, |base, end| {
        if base >= region.base && end <= region.base.saturating_add(region.size) {
            last = Some(end - 8);
        }
    });
    let (true, Some(address)) = (region.is_ram(), last) else {
        return Probe::Skipped;
    };
    let word = address as *mut u64;
    let pattern = address ^ 0x5555_aaaa_5555_aaaa;
    // SAFETY: free RAM, mapped.
    let read = unsafe {
        word.write_volatile(pattern);
        word.read_volatile()
    };
    if read == pattern {
        Probe::Kept
    } else {
        Probe::Lost
    }
}

fn end(then: Then) -> ! {
    match then {
        Then::Off => {}
        Then::Reset => power::reset(),
        Then::TripleFault => privileged::triple_fault(),
        Then::Halt => privileged::stop(),
        Then::Spin => loop {
            core::hint::spin_loop();
        },
        Then::Spin0 => privileged::spin(),
        Then::Ports => loop {
            port::write(0x80, 0);
        },
        Then::Ports0 => privileged::port_spin(),
        Then::Int3 => {
            let cpu = Cpu::nth(0);
            privileged::breakpoint();
            let returned = cpu.fault().rip == privileged::after_breakpoint();
            serial::line(&Report::Breakpoint {
                count: cpu.count(3),
                returned,
            });
        }
        Then::Popcnt => serial::line(&Report::Popcnt {
            bits: privileged::popcnt(0x1234_0003),
        }),
        Then::Undefined => privileged::undefined(),
    }
    power::off()
}
