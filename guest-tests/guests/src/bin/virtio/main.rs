//! Uses whatever there is of virtio-rng, virtio-console and virtio-balloon. See `guests::virtio`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "memory that devices write")]

extern crate alloc;

mod balloon;
mod console;
mod hints;
mod rng;

use alloc::vec::Vec;

use guests::bare::boot::Boot;
use guests::bare::console::{Console as Port, Timing};
use guests::bare::dma::Dma;
use guests::bare::virtio::{Device, Transport, acknowledge, devices, feature};
use guests::bare::waiter::{Waiter, Watchdog};
use guests::bare::{give_up, heap, power, serial, tsc};
use guests::mmio::Wait;
use guests::virtio::{Options, Report, command};
use guests::{Hex, Name};
use virtio_drivers::transport::{DeviceType, Transport as _};

use crate::balloon::Balloon;
use crate::console::Console;
use crate::hints::Verified;
use crate::rng::Rng;

guests::guest!(pvh, main);

/// Errors that are reported; all are counted.
const REPORTED: u64 = 100;

/// What was wrong.
#[derive(Default)]
struct Errors(u64);

impl Errors {
    fn report(&mut self, device: &str, what: &str, value: u64) {
        self.0 += 1;
        if self.0 <= REPORTED {
            serial::line(&Report::Error {
                device: Name::of(format_args!("{device}")),
                what: Name::of(format_args!("{what}")),
                value,
            });
        }
    }

    /// Reports what can't be gone on with.
    fn give_up(&mut self, device: &str, what: &str, value: u64) -> ! {
        self.report(device, what, value);
        give_up(&"a device breaks its queue")
    }
}

fn dma(bytes: usize) -> Dma {
    match Dma::new(bytes) {
        Some(memory) => memory,
        None => give_up(&"not enough free memory for the devices"),
    }
}

/// The features that the options ask for.
fn set_up(options: &Options) -> u64 {
    let indirect = if options.indirect {
        feature::INDIRECT
    } else {
        0
    };
    let event_idx = if options.event_idx {
        feature::EVENT_IDX
    } else {
        0
    };
    indirect | event_idx
}

fn main(boot: &Boot) -> ! {
    heap::start(boot, begin)
}

extern "C" fn begin(boot: &Boot) -> ! {
    let options = match Options::parse(boot.command_line()) {
        Ok(options) => options,
        Err(reason) => give_up(&reason),
    };
    let Some(khz) = tsc::frequency(options.tsc_khz) else {
        give_up(&"no source for the TSC's frequency: give tsc_khz=");
    };
    let wanted = [
        DeviceType::EntropySource,
        DeviceType::Console,
        DeviceType::MemoryBalloon,
    ];
    let mut used = Used::default();
    let mut pins = Vec::new();
    for device in devices(boot, &wanted) {
        let pin = device.window.irq;
        if let Err(reason) = used.add(device, &options, khz) {
            give_up(&reason);
        }
        pins.push(pin);
    }
    let waiter = Waiter::new(options.wait, pins.into_iter());
    serial::line(&Report::Ready {
        rng: used.rng.is_some(),
        console: used.console.is_some(),
        balloon: used.balloon.is_some(),
        wait: options.wait,
        tsc_khz: khz,
    });
    used.run(&options, khz, waiter)
}

/// The devices, with their places in the waiter's order.
#[derive(Default)]
struct Used {
    rng: Option<(usize, Rng)>,
    console: Option<(usize, Console)>,
    balloon: Option<(usize, Balloon)>,
    count: usize,
    watchdogs: [Watchdog; 3],
    errors: Errors,
}

impl Used {
    fn add(&mut self, device: Device, options: &Options, khz: u64) -> Result<(), &'static str> {
        let place = self.count;
        let taken = match device.transport.device_type() {
            DeviceType::EntropySource => {
                let rng = Rng::start(device, options, khz)?;
                self.rng.replace((place, rng)).is_some()
            }
            DeviceType::Console => {
                let console = Console::start(device, options, khz)?;
                self.console.replace((place, console)).is_some()
            }
            _ => {
                let balloon = Balloon::start(device, options, khz)?;
                self.balloon.replace((place, balloon)).is_some()
            }
        };
        if taken {
            return Err("more than one device of a type");
        }
        self.count += 1;
        Ok(())
    }

    fn run(&mut self, options: &Options, khz: u64, mut waiter: Waiter) -> ! {
        let mut port = Port::new(Timing {
            khz,
            heartbeat_us: options.heartbeat,
            interval_ms: options.interval,
        });
        let irq = options.wait == Wait::Irq;
        loop {
            let now = tsc::now();
            let (status, byte) = port.turn(now);
            match byte {
                Some(command::QUIT) => power::off(),
                Some(command::RESET) => power::reset(),
                Some(command::VERIFY) => self.verify(),
                _ => {}
            }
            if status || byte == Some(command::STATUS) {
                self.report();
            }
            let news = [0, 1, 2].map(|place| waiter.has_news(place));
            waiter.take_news();
            let watchdogs = &mut self.watchdogs;
            let mut look = |place: usize, done: bool, transport: &mut Transport| {
                let news = news[place];
                let missed = watchdogs[place].misses(now, khz, news, done);
                let changed = irq && (news || missed) && acknowledge(transport);
                (news || missed, changed)
            };
            if let Some((place, rng)) = &mut self.rng {
                let (news, _) = look(*place, rng.is_done(), &mut rng.transport);
                rng.turn(now, news, &mut self.errors);
            }
            if let Some((place, console)) = &mut self.console {
                let (news, _) = look(*place, console.is_done(), &mut console.transport);
                console.turn(now, news, &mut self.errors);
            }
            if let Some((place, balloon)) = &mut self.balloon {
                let (news, changed) = look(*place, balloon.is_done(), &mut balloon.transport);
                balloon.turn(now, news, changed, &mut self.errors);
            }
            waiter.wait();
        }
    }

    fn verify(&mut self) {
        let verified = self
            .balloon
            .as_mut()
            .map(|(_, balloon)| balloon.hints.verify(&mut self.errors));
        let Verified {
            pages,
            hinted,
            rewritten,
        } = verified.unwrap_or_default();
        serial::line(&Report::Verified {
            pages,
            hinted,
            rewritten,
            errors: self.errors.0,
        });
    }

    fn report(&self) {
        let (rng, console, balloon) = (&self.rng, &self.console, &self.balloon);
        let rng = |field: fn(&Rng) -> u64| rng.as_ref().map_or(0, |(_, rng)| field(rng));
        let console = |field: fn(&Console) -> u64| {
            let console = console.as_ref();
            console.map_or(0, |(_, console)| field(console))
        };
        let balloon = |field: fn(&Balloon) -> u64| {
            let balloon = balloon.as_ref();
            balloon.map_or(0, |(_, balloon)| field(balloon))
        };
        serial::line(&Report::Status {
            rng_requests: rng(|rng| rng.requests),
            rng_bytes: rng(|rng| rng.total),
            rng_checksum: Hex(rng(|rng| rng.checksum)),
            console_received: console(|console| console.received),
            console_sent: console(|console| console.sent),
            ticks: console(|console| console.ticks),
            balloon_target: balloon(|balloon| balloon.target),
            balloon_actual: balloon(Balloon::actual),
            inflated: balloon(|balloon| balloon.inflated),
            deflated: balloon(|balloon| balloon.deflated),
            errors: self.errors.0,
            lost_interrupts: self.watchdogs.iter().map(|watchdog| watchdog.lost).sum(),
        });
    }
}
