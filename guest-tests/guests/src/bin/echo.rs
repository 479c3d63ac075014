//! Sends back every byte that it receives, by interrupt. See `guests::echo`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the entry point has a fixed symbol")]

use guests::bare::boot::Boot;
use guests::bare::cpu::Cpu;
use guests::bare::{give_up, interrupts, power, privileged, serial};
use guests::echo::{Controller, Options, Report, command};

guests::guest!(pvh, main);

fn main(boot: &Boot) -> ! {
    let options = match Options::parse(boot.command_line()) {
        Ok(options) => options,
        Err(reason) => give_up(&reason),
    };
    let vector = match options.via {
        Controller::Pic => {
            interrupts::open_pic(1 << interrupts::SERIAL_LINE);
            interrupts::PIC_VECTORS + interrupts::SERIAL_LINE
        }
        Controller::IoApic => {
            interrupts::close_pic();
            interrupts::open_ioapic(interrupts::SERIAL_LINE, interrupts::APIC_VECTORS);
            interrupts::APIC_VECTORS
        }
    };
    serial::line(&Report::Ready { via: options.via });
    serial::enable_receive_interrupt();

    let cpu = Cpu::nth(0);
    let mut bytes = 0;
    let mut seen = 0;
    loop {
        privileged::wait(cpu.counter(vector), seen);
        // Before the port is emptied: an interrupt for a byte that comes meanwhile is not missed.
        seen = cpu.count(vector);
        while let Some(byte) = serial::receive() {
            bytes += 1;
            match byte {
                command::COUNT => serial::line(&Report::Count {
                    bytes,
                    interrupts: seen,
                }),
                command::QUIT => power::off(),
                _ => serial::send(byte),
            }
        }
    }
}
