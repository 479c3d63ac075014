//! How fast a disk is.

use alloc::boxed::Box;
use alloc::vec::Vec;

use guests::bare::random::Random;
use guests::bare::waiter::Waiter;
use guests::bare::{give_up, serial, tsc};
use guests::block::{self, Mark};
use guests::disk::{Bench, Op, Options, Report};
use guests::histogram::Histogram;

use crate::device::{Disk, Request};

/// Measures the disk: an area of so many sectors from `first`.
pub(crate) fn measure(
    index: usize,
    disk: &mut Disk,
    (first, sectors): (u64, u64),
    options: &Options,
    khz: u64,
    waiter: &mut Waiter,
) {
    let unit = u64::from(disk.limits.unit);
    let count = options.bs.0 / block::BYTES as u64;
    if count == 0
        || count > block::MAX_SECTORS.into()
        || !count.is_multiple_of(unit)
        || count > sectors
    {
        give_up(&"bs= must be whole blocks of the disk, and at most 128K");
    }
    let (op, random_order) = match options.bench {
        Bench::None => return,
        Bench::SeqRead => (Op::Read, false),
        Bench::SeqWrite => (Op::Write, false),
        Bench::RandRead => (Op::Read, true),
        Bench::RandWrite => (Op::Write, true),
    };
    let places = sectors / count;
    let mut random = Random::new(options.seed);
    let mut spare: Vec<Request> = (0..options.depth.clamp(1, 64))
        .map(|_| request(options.seed, count as u32))
        .collect();
    let mut latencies = Box::new(Histogram::default());
    let (mut next, mut io_errors) = (0, 0);
    let (mut notifications, mut notifying) = (0u64, 0);
    let begin = tsc::now();
    let end = begin + options.seconds.max(1) * khz * 1000;
    let mut now = begin;
    while now < end || disk.pending > 0 {
        while now < end
            && let Some(mut request) = spare.pop()
        {
            let place = if random_order {
                random.below(places)
            } else {
                next % places
            };
            next += 1;
            (request.op, request.sector, request.sectors) =
                (op, first + place * count, count as u32);
            request.segments = disk.segments(count as u32).0;
            request.begun = tsc::now();
            if let Err(request) = disk.submit(request) {
                spare.push(request);
                break;
            }
        }
        let before = tsc::now();
        if disk.notify() {
            notifications += 1;
            notifying += tsc::now().saturating_sub(before);
        }
        if !disk.is_done() {
            waiter.wait();
            if waiter.has_news(index) {
                waiter.take_news();
                if options.wait == guests::mmio::Wait::Irq {
                    disk.acknowledge();
                }
            }
        }
        while let Ok(Some(done)) = disk.done() {
            now = tsc::now();
            latencies.add(now.saturating_sub(done.request.begun));
            io_errors += u64::from(done.status != 0);
            spare.push(done.request);
        }
        now = tsc::now();
    }
    let cycles = (now - begin).max(1);
    let requests = latencies.total();
    let per_second =
        |amount: u64| (u128::from(amount) * u128::from(khz) * 1000 / u128::from(cycles)) as u64;
    let ns = |cycles: u64| (u128::from(cycles) * 1_000_000 / u128::from(khz)) as u64;
    serial::line(&Report::Bench {
        device: index as u64,
        op: options.bench,
        bs: options.bs,
        depth: options.depth.clamp(1, 64),
        requests,
        took_ms: cycles / khz,
        kib_s: per_second(requests * options.bs.0 / 1024),
        iops: per_second(requests),
        p50_ns: ns(latencies.per_mille(500)),
        p90_ns: ns(latencies.per_mille(900)),
        p99_ns: ns(latencies.per_mille(990)),
        p999_ns: ns(latencies.per_mille(999)),
        max_ns: ns(latencies.longest()),
        notifications,
        notify_ns: ns(notifying).checked_div(notifications).unwrap_or(0),
        io_errors,
    });
}

/// With data that can't be compressed.
fn request(seed: u64, count: u32) -> Request {
    let mut request = Request::new(count);
    for position in 0..count {
        let mark = Mark {
            seed,
            sector: position.into(),
            generation: 1,
            position: position as u16,
            count: count as u16,
        };
        mark.write(request.buffer.sector(position as usize));
    }
    request
}
