//! A virtio-rng device (virtio 1.2, 5.4): is asked for bytes at an interval.

use guests::bare::dma::Dma;
use guests::bare::timer::Timer;
use guests::bare::virtio::{Device, Queue, Transport, negotiate};
use guests::virtio::Options;
use virtio_drivers::transport::Transport as _;

use crate::{Errors, dma, set_up};

/// Lies where the device has not written.
const UNTOUCHED: u8 = 0xa5;

pub(crate) struct Rng {
    pub(crate) transport: Transport,
    queue: Queue<8>,
    memory: Dma,
    bytes: usize,
    /// The request that the device has.
    token: Option<u16>,
    timer: Timer,
    pub(crate) requests: u64,
    pub(crate) total: u64,
    pub(crate) checksum: u64,
}

impl Rng {
    pub(crate) fn start(device: Device, options: &Options, khz: u64) -> Result<Self, &'static str> {
        let mut transport = device.transport;
        let features = negotiate(&mut transport, set_up(options))?;
        let queue =
            Queue::new(&mut transport, 0, features).map_err(|_| "virtio-rng has no queue")?;
        transport.finish_init();
        let bytes = options.bytes.clamp(16, 64 << 10) as usize;
        Ok(Self {
            transport,
            queue,
            memory: dma(bytes),
            bytes,
            token: None,
            timer: Timer::new(options.every.max(1) * khz / 1000),
            requests: 0,
            total: 0,
            checksum: 0,
        })
    }

    pub(crate) fn is_done(&self) -> bool {
        self.token.is_some() && self.queue.done().is_some()
    }

    pub(crate) fn turn(&mut self, now: u64, news: bool, errors: &mut Errors) {
        if news && self.is_done() {
            self.finish(errors);
        }
        if self.token.is_none() && self.timer.fires(now, self.timer.interval) {
            let buffer = &mut self.memory.bytes()[..self.bytes];
            buffer.fill(UNTOUCHED);
            // SAFETY: the memory stays, and is left alone until the device is done with it.
            self.token = unsafe { self.queue.add(&[], &mut [buffer]) };
            self.queue.notify(&mut self.transport);
        }
    }

    fn finish(&mut self, errors: &mut Errors) {
        let Some(token) = self.token.take() else {
            return;
        };
        let buffer = &mut self.memory.bytes()[..self.bytes];
        // SAFETY: the same memory as was added with this token.
        let Ok(length) = (unsafe { self.queue.take(token, &[], &mut [buffer]) }) else {
            errors.report("rng", "other_descriptor", token.into());
            return;
        };
        let length = length as usize;
        if length == 0 || length > self.bytes {
            errors.report("rng", "length", length as u64);
            return;
        }
        let (random, rest) = self.memory.bytes()[..self.bytes].split_at(length);
        if length >= 16 && random.iter().all(|byte| *byte == random[0]) {
            errors.report("rng", "all_equal", random[0].into());
        }
        if let Some(byte) = rest.iter().find(|byte| **byte != UNTOUCHED) {
            errors.report("rng", "written_beyond_length", (*byte).into());
        }
        // FNV-1a (Fowler, Noll and Vo).
        let checksum = random.iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
        if length >= 16 && checksum == self.checksum {
            errors.report("rng", "same_as_before", checksum);
        }
        self.checksum = checksum;
        self.requests += 1;
        self.total += length as u64;
    }
}
