//! Writes virtio-blk disks and verifies what it wrote, or measures them. See `guests::disk`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "memory that devices write")]

extern crate alloc;

mod bench;
mod buffer;
mod device;
mod verifier;

use alloc::vec::Vec;

use guests::bare::boot::Boot;
use guests::bare::console::{Console, Timing};
use guests::bare::waiter::Waiter;
use guests::bare::{give_up, heap, power, serial, tsc, virtio};
use guests::disk::{Bench, Options, Report, command};
use guests::mmio::Wait;
use virtio_drivers::transport::DeviceType;

use crate::device::Disk;
use crate::verifier::Verifier;

guests::guest!(pvh, main);

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
    let devices = virtio::devices(boot, &[DeviceType::Block]);
    if devices.is_empty() {
        give_up(&"the command line names no virtio-blk device");
    }
    let pins: Vec<u8> = devices.iter().map(|device| device.window.irq).collect();
    let mut disks: Vec<Verifier> = Vec::new();
    for device in devices {
        let address = device.window.base;
        let disk = match Disk::start(device, &options) {
            Ok(disk) => disk,
            Err(reason) => give_up(&reason),
        };
        let limits = disk.limits;
        let register_ns = disk.register_cycles() * 1_000_000 / khz;
        let index = disks.len() as u64;
        let mut verifier = Verifier::new(index, disk, options, khz);
        if options.wait == Wait::Poll {
            verifier.disk().refuse_interrupts();
        }
        let (first, sectors) = verifier.area();
        disks.push(verifier);
        serial::line(&Report::Disk {
            device: index,
            address,
            capacity: limits.capacity,
            readonly: limits.readonly,
            flush: limits.flush,
            max_discard: limits.max_discard.into(),
            max_zeroes: limits.max_zeroes.into(),
            unit: limits.unit.into(),
            first,
            sectors,
            features: guests::Hex(limits.features),
            register_ns,
        });
    }
    let mut waiter = Waiter::new(options.wait, pins.into_iter());
    serial::line(&Report::Ready {
        devices: disks.len() as u64,
        wait: options.wait,
        tsc_khz: khz,
    });
    if options.bench != Bench::None {
        for (index, disk) in disks.iter_mut().enumerate() {
            let area = disk.area();
            bench::measure(index, disk.disk(), area, &options, khz, &mut waiter);
        }
        power::off();
    }
    run(&options, khz, &mut disks, &mut waiter)
}

fn run(options: &Options, khz: u64, disks: &mut [Verifier], waiter: &mut Waiter) -> ! {
    let mut console = Console::new(Timing {
        khz,
        heartbeat_us: options.heartbeat,
        interval_ms: options.interval,
    });
    let mut finishing = false;
    loop {
        let now = tsc::now();
        let (status, byte) = console.turn(now);
        match byte {
            Some(command::VERIFY) => disks.iter_mut().for_each(Verifier::verify),
            Some(command::FINISH) => {
                finishing = true;
                disks.iter_mut().for_each(Verifier::verify);
            }
            Some(command::QUIT) => power::off(),
            Some(command::RESET) => power::reset(),
            _ => {}
        }
        if status || byte == Some(command::STATUS) {
            disks.iter_mut().for_each(Verifier::report_status);
        }
        let mut active = false;
        let news: Vec<bool> = (0..disks.len())
            .map(|index| waiter.has_news(index))
            .collect();
        waiter.take_news();
        for (index, disk) in disks.iter_mut().enumerate() {
            if news[index] && options.wait == Wait::Irq {
                disk.disk().acknowledge();
            }
            active |= disk.turn(now, news[index], waiter.interrupts(index));
        }
        if finishing && !disks.iter().any(Verifier::is_busy) {
            power::off();
        }
        if !active {
            waiter.wait();
        }
    }
}
