//! A virtio-balloon (virtio 1.2, 5.5): gives the device as many pages as it wants, and takes them
//! back when it wants fewer. [`Hints`] does the rest.

use alloc::vec::Vec;

use guests::bare::dma::Dma;
use guests::bare::timer::Timer;
use guests::bare::virtio::{Device, Queue, Transport, negotiate};
use guests::virtio::Options;
use virtio_drivers::transport::Transport as _;

use crate::hints::{self, Hints};
use crate::{Errors, dma, set_up};

/// Pages of a request.
const BATCH: usize = 256;
/// µs between two looks at how many pages are wanted, besides the interrupt for it.
const LOOK_US: u64 = 50_000;

/// A request that the device has.
#[derive(Clone, Copy)]
struct Pending {
    token: u16,
    pages: usize,
    inflate: bool,
}

pub(crate) struct Balloon {
    pub(crate) transport: Transport,
    inflate: Queue,
    deflate: Queue,
    pub(crate) hints: Hints,
    /// The page numbers of a request, and the pages it is about.
    numbers: Dma,
    moving: Vec<Dma>,
    given: Vec<Dma>,
    pending: Option<Pending>,
    look: Timer,
    /// No more pages can be had, until fewer are wanted.
    exhausted: bool,
    pub(crate) target: u64,
    pub(crate) inflated: u64,
    pub(crate) deflated: u64,
}

impl Balloon {
    pub(crate) fn start(device: Device, options: &Options, khz: u64) -> Result<Self, &'static str> {
        /// Pages must be asked for before they are used again.
        const MUST_TELL_HOST: u64 = 1;
        let mut transport = device.transport;
        let mut wanted = set_up(options) | MUST_TELL_HOST;
        if options.hold.0 > 0 {
            wanted |= hints::FEATURE;
        }
        let features = negotiate(&mut transport, wanted)?;
        let no_queue = |_| "virtio-balloon has no queue of 128 descriptors";
        let inflate = Queue::new(&mut transport, 0, features).map_err(no_queue)?;
        let deflate = Queue::new(&mut transport, 1, features).map_err(no_queue)?;
        let hints = Hints::start(&mut transport, features, options.hold.0, khz)?;
        transport.finish_init();
        Ok(Self {
            transport,
            inflate,
            deflate,
            hints,
            numbers: dma(BATCH * 4),
            moving: Vec::new(),
            given: Vec::new(),
            pending: None,
            look: Timer::new(LOOK_US * khz / 1000),
            exhausted: false,
            target: 0,
            inflated: 0,
            deflated: 0,
        })
    }

    pub(crate) fn actual(&self) -> u64 {
        // What is being taken back is in the balloon until the device has said that it is not.
        let moving = match self.pending {
            Some(Pending { inflate: false, .. }) => self.moving.len(),
            _ => 0,
        };
        (self.given.len() + moving) as u64
    }

    pub(crate) fn is_done(&self) -> bool {
        self.has_moved() || self.hints.is_done()
    }

    /// Whether the device has taken or given what it was asked to.
    fn has_moved(&self) -> bool {
        self.pending.is_some() && (self.inflate.done().is_some() || self.deflate.done().is_some())
    }

    pub(crate) fn turn(&mut self, now: u64, news: bool, changed: bool, errors: &mut Errors) {
        if news && self.has_moved() {
            self.finish(errors);
        }
        let look = changed || self.look.fires(now, 0);
        self.hints
            .turn(&mut self.transport, now, (news, look), errors);
        if look {
            match self.transport.read_config_space::<u32>(0) {
                Ok(target) => {
                    self.exhausted &= u64::from(target) == self.target;
                    self.target = target.into();
                }
                Err(_) => errors.report("balloon", "short_configuration", 0),
            }
        }
        if self.pending.is_none() {
            if self.actual() < self.target && !self.exhausted {
                self.give();
            } else if self.actual() > self.target {
                self.take_back();
            }
        }
    }

    fn give(&mut self) {
        let wanted = (self.target - self.actual()).min(BATCH as u64) as usize;
        for _ in 0..wanted {
            match Dma::new(4096) {
                Some(page) => self.moving.push(page),
                None => self.exhausted = true,
            }
        }
        self.submit(true);
    }

    fn take_back(&mut self) {
        let wanted = (self.actual() - self.target).min(BATCH as u64) as usize;
        self.moving = self.given.split_off(self.given.len() - wanted);
        self.submit(false);
    }

    fn submit(&mut self, inflate: bool) {
        let pages = self.moving.len();
        if pages == 0 {
            return;
        }
        let bytes = &mut self.numbers.bytes()[..pages * 4];
        for (number, page) in bytes.as_chunks_mut().0.iter_mut().zip(&self.moving) {
            *number = ((page.address() >> 12) as u32).to_le_bytes();
        }
        let queue = if inflate {
            &mut self.inflate
        } else {
            &mut self.deflate
        };
        // SAFETY: the numbers stay, and are left alone until the device is done with them.
        let token = unsafe { queue.add(&[bytes], &mut []) };
        queue.notify(&mut self.transport);
        self.pending = token.map(|token| Pending {
            token,
            pages,
            inflate,
        });
    }

    fn finish(&mut self, errors: &mut Errors) {
        let Some(Pending {
            token,
            pages,
            inflate,
        }) = self.pending.take()
        else {
            return;
        };
        let bytes = &self.numbers.bytes()[..pages * 4];
        let queue = if inflate {
            &mut self.inflate
        } else {
            &mut self.deflate
        };
        // SAFETY: the same memory as was added with this token.
        if unsafe { queue.take(token, &[bytes], &mut []) }.is_err() {
            errors.give_up("balloon", "other_descriptor", token.into());
        }
        if inflate {
            self.inflated += pages as u64;
            self.given.append(&mut self.moving);
        } else {
            self.deflated += pages as u64;
            for mut page in self.moving.drain(..) {
                check(&mut page, errors);
            }
        }
        let actual = self.given.len() as u32;
        if self.transport.write_config_space(4, actual).is_err() {
            errors.report("balloon", "short_configuration", 4);
        }
    }
}

/// Whether a page that came back holds what is written to it.
fn check(page: &mut Dma, errors: &mut Errors) {
    let address = page.address();
    let value = |index: usize| (address >> 12) as u8 ^ index as u8;
    let bytes = page.bytes();
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = value(index);
    }
    let bytes = core::hint::black_box(bytes);
    if bytes
        .iter()
        .enumerate()
        .any(|(index, byte)| *byte != value(index))
    {
        errors.report("balloon", "page_forgets", address);
    }
}
