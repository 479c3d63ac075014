//! A virtio-console's first port (virtio 1.2, 5.3): sends back what it receives, and ticks.

use alloc::vec::Vec;
use core::fmt::Write;

use guests::bare::dma::Dma;
use guests::bare::timer::Timer;
use guests::bare::virtio::{DESCRIPTORS, Device, Queue, Transport, negotiate};
use guests::virtio::Options;
use virtio_drivers::transport::Transport as _;

use crate::{Errors, dma, set_up};

/// Buffers that the device may have, each way.
const BUFFERS: usize = 8;
const BYTES: usize = 4096;

pub(crate) struct Console {
    pub(crate) transport: Transport,
    receive: Queue<16>,
    receiving: Vec<Option<Dma>>,
    send: Queue<16>,
    /// With the bytes of each.
    sending: Vec<Option<(Dma, usize)>>,
    spare: Vec<Dma>,
    /// A buffer that came and waits for room to be sent back.
    waiting: Option<(Dma, usize)>,
    timer: Timer,
    pub(crate) received: u64,
    pub(crate) sent: u64,
    pub(crate) ticks: u64,
}

impl Console {
    pub(crate) fn start(device: Device, options: &Options, khz: u64) -> Result<Self, &'static str> {
        let mut transport = device.transport;
        let features = negotiate(&mut transport, set_up(options))?;
        let no_queue = |_| "virtio-console has no queue of 16 descriptors";
        let receive = Queue::new(&mut transport, 0, features).map_err(no_queue)?;
        let send = Queue::new(&mut transport, 1, features).map_err(no_queue)?;
        transport.finish_init();
        let mut console = Self {
            transport,
            receive,
            receiving: (0..DESCRIPTORS).map(|_| None).collect(),
            send,
            sending: (0..DESCRIPTORS).map(|_| None).collect(),
            // One for what is being sent back, the rest for ticks.
            spare: (0..BUFFERS).map(|_| dma(BYTES)).collect(),
            waiting: None,
            timer: Timer::new(options.tick * khz / 1000),
            received: 0,
            sent: 0,
            ticks: 0,
        };
        for _ in 0..BUFFERS {
            console.offer(dma(BYTES));
        }
        Ok(console)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.waiting.is_none() && self.receive.done().is_some() || self.send.done().is_some()
    }

    fn offer(&mut self, mut memory: Dma) {
        // SAFETY: the memory stays in `receiving` until the device gives it back.
        let token = unsafe { self.receive.add(&[], &mut [memory.bytes()]) };
        if let Some(slot) = token.and_then(|token| self.receiving.get_mut(usize::from(token))) {
            *slot = Some(memory);
        }
        self.receive.notify(&mut self.transport);
    }

    pub(crate) fn turn(&mut self, now: u64, news: bool, errors: &mut Errors) {
        if news {
            self.reap(errors);
            self.echo(errors);
        }
        if self.timer.fires(now, self.timer.interval)
            && let Some(memory) = self.spare.pop()
        {
            self.ticks += 1;
            self.tick(memory);
        }
    }

    fn tick(&mut self, mut memory: Dma) {
        let mut line = Text {
            bytes: memory.bytes(),
            length: 0,
        };
        // It fits.
        let _ = writeln!(line, "tick {}", self.ticks);
        let length = line.length;
        self.transmit(memory, length);
    }

    fn transmit(&mut self, mut memory: Dma, length: usize) {
        // SAFETY: the memory stays in `sending` until the device gives it back.
        let token = unsafe { self.send.add(&[&memory.bytes()[..length]], &mut []) };
        if let Some(slot) = token.and_then(|token| self.sending.get_mut(usize::from(token))) {
            *slot = Some((memory, length));
        }
        self.send.notify(&mut self.transport);
    }

    /// Takes back what was sent.
    fn reap(&mut self, errors: &mut Errors) {
        while let Some(token) = self.send.done() {
            let slot = self.sending.get_mut(usize::from(token));
            let Some((mut memory, length)) = slot.and_then(Option::take) else {
                errors.give_up("console", "other_descriptor", token.into());
            };
            // SAFETY: the same memory as was added with this token.
            let _ = unsafe { self.send.take(token, &[&memory.bytes()[..length]], &mut []) };
            self.sent += length as u64;
            self.spare.push(memory);
        }
    }

    /// Sends back what has come, as far as there is room.
    fn echo(&mut self, errors: &mut Errors) {
        loop {
            if let Some((mut from, length)) = self.waiting.take() {
                let Some(mut to) = self.spare.pop() else {
                    self.waiting = Some((from, length));
                    return;
                };
                to.bytes()[..length].copy_from_slice(&from.bytes()[..length]);
                self.transmit(to, length);
                self.offer(from);
            }
            let Some(token) = self.receive.done() else {
                return;
            };
            let slot = self.receiving.get_mut(usize::from(token));
            let Some(mut memory) = slot.and_then(Option::take) else {
                errors.give_up("console", "other_descriptor", token.into());
            };
            // SAFETY: the same memory as was added with this token.
            let length = unsafe { self.receive.take(token, &[], &mut [memory.bytes()]) };
            let length = length.unwrap_or(0) as usize;
            if length == 0 || length > BYTES {
                errors.report("console", "length", length as u64);
                self.offer(memory);
                continue;
            }
            self.received += length as u64;
            self.waiting = Some((memory, length));
        }
    }
}

struct Text<'a> {
    bytes: &'a mut [u8],
    length: usize,
}

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let place = self.bytes.get_mut(self.length..self.length + text.len());
        place
            .ok_or(core::fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.length += text.len();
        Ok(())
    }
}
