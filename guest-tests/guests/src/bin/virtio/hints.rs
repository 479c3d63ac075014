//! Free page hints (virtio 1.2, 5.5.6): memory with known contents, of which three MiB of each four
//! are free whenever the device asks for free pages; and some of those are soon used again.
//!
//! A page that the device has been told of holds anything, until the guest writes to it; from then on
//! it must keep what was written, whenever that was:
//! - at once, before the device is told that there is a hint;
//! - later, one by one, while the device still listens;
//! - at the end, when it does no longer.

use alloc::vec::Vec;
use core::ops::Range;

use guests::bare::dma::Dma;
use guests::bare::timer::Timer;
use guests::bare::virtio::{Queue, Transport};
use guests::dirtier::Data;
use guests::page::{self, Page};
use virtio_drivers::transport::Transport as _;

use crate::{Errors, dma};

/// VIRTIO_BALLOON_F_FREE_PAGE_HINT.
pub(crate) const FEATURE: u64 = 1 << 3;

const QUEUE: u16 = 3;
/// Where the configuration says what the device wants.
const COMMAND: usize = 8;
/// What the driver says after the last hint.
const STOP: u32 = 0;
/// The lowest number of a request; below it are STOP and DONE.
const FIRST: u32 = 2;

const BLOCK_PAGES: usize = 256;
/// Blocks that are named in one request, at most.
const BATCH: usize = 16;
/// Of so many blocks the first is never free.
const KEPT: usize = 4;
/// Of so many pages of a free block one each is written at once, later, and at the end.
const REUSED: usize = 32;
/// µs from one page that is written later to the next.
const LATER_US: u64 = 1_000;

/// A MiB, and which generation each of its pages holds; 0: anything.
struct Block {
    memory: Dma,
    generations: [u32; BLOCK_PAGES],
}

/// What the device has been given.
enum Sent {
    /// The number of a request, or STOP.
    Number,
    /// These blocks, if they are free, as hints.
    Blocks(Range<usize>),
}

/// What is to be done about the device's last request.
enum Step {
    /// Nothing: it has ended.
    Idle,
    /// Blocks are named; this is the next one.
    Naming(usize),
    /// All are named, and the device still listens.
    Named,
}

pub(crate) struct Hints {
    /// If the device asks for hints.
    queue: Option<Queue>,
    number: Dma,
    blocks: Vec<Block>,
    generation: u32,
    /// What the device said last, and what of it was answered.
    command: u32,
    answered: u32,
    step: Step,
    pending: Option<(u16, Sent)>,
    timer: Timer,
    later: Vec<(usize, usize)>,
    at_end: Vec<(usize, usize)>,
    hinted: u64,
    rewritten: u64,
}

impl Hints {
    /// Fills so many bytes of memory. The queue is set up if `features` say so.
    pub(crate) fn start(
        transport: &mut Transport,
        features: u64,
        hold: u64,
        khz: u64,
    ) -> Result<Self, &'static str> {
        let queue = (features & FEATURE != 0).then(|| Queue::new(transport, QUEUE, features));
        let count = hold / (BLOCK_PAGES as u64 * page::BYTES);
        let mut hints = Self {
            queue: queue
                .transpose()
                .map_err(|_| "virtio-balloon has no queue for hints")?,
            number: dma(4),
            blocks: (0..count)
                .map(|_| Block {
                    memory: dma(BLOCK_PAGES * page::BYTES as usize),
                    generations: [0; BLOCK_PAGES],
                })
                .collect(),
            generation: 1,
            command: STOP,
            answered: STOP,
            step: Step::Idle,
            pending: None,
            timer: Timer::new(LATER_US * khz / 1000),
            later: Vec::new(),
            at_end: Vec::new(),
            hinted: 0,
            rewritten: 0,
        };
        for block in 0..hints.blocks.len() {
            for index in 0..BLOCK_PAGES {
                hints.write(block, index);
            }
        }
        Ok(hints)
    }

    pub(crate) fn is_done(&self) -> bool {
        let done = |queue: &Queue| queue.done().is_some();
        self.pending.is_some() && self.queue.as_ref().is_some_and(done)
    }

    /// `look`: whether to look what the device wants.
    pub(crate) fn turn(
        &mut self,
        transport: &mut Transport,
        now: u64,
        (news, look): (bool, bool),
        errors: &mut Errors,
    ) {
        if self.queue.is_none() {
            return;
        }
        if news && self.is_done() {
            self.finish(errors);
        }
        if look {
            match transport.read_config_space(COMMAND) {
                Ok(command) => self.command = command,
                Err(_) => errors.report("balloon", "short_configuration", COMMAND as u64),
            }
        }
        if self.timer.fires(now, 0)
            && let Some((block, index)) = self.later.pop()
        {
            self.rewrite(block, index);
        }
        if self.pending.is_none() {
            self.go_on(transport);
        }
    }

    fn go_on(&mut self, transport: &mut Transport) {
        match self.step {
            Step::Idle if self.command >= FIRST && self.command != self.answered => {
                self.answered = self.command;
                self.generation += 1;
                self.step = Step::Naming(0);
                self.say(transport, self.answered);
            }
            Step::Idle => {}
            Step::Naming(_) | Step::Named if self.command != self.answered => {
                self.step = Step::Idle;
                let left = [self.later.split_off(0), self.at_end.split_off(0)].concat();
                for (block, index) in left {
                    self.rewrite(block, index);
                }
            }
            Step::Naming(next) if next >= self.blocks.len() => {
                self.step = Step::Named;
                self.say(transport, STOP);
            }
            Step::Naming(next) => {
                let end = (next + BATCH).min(self.blocks.len());
                self.step = Step::Naming(end);
                self.name(transport, next..end);
            }
            Step::Named => {}
        }
    }

    fn say(&mut self, transport: &mut Transport, number: u32) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        let bytes = &mut self.number.bytes()[..4];
        bytes.copy_from_slice(&number.to_le_bytes());
        // SAFETY: the number stays, and is left alone until the device is done with it.
        let token = unsafe { queue.add(&[bytes], &mut []) };
        queue.notify(transport);
        self.pending = token.map(|token| (token, Sent::Number));
    }

    /// Tells the device which of these blocks are free.
    fn name(&mut self, transport: &mut Transport, range: Range<usize>) {
        for number in free(&range) {
            self.blocks[number].generations = [0; BLOCK_PAGES];
        }
        let Some(queue) = &mut self.queue else {
            return;
        };
        // SAFETY: the blocks stay. The guest writes to them before the device is done, as it may with
        // what is only a hint: the device doesn't.
        let token = unsafe { queue.add(&[], &mut memory(&mut self.blocks, &range)) };
        for number in free(&range) {
            for index in (0..BLOCK_PAGES).step_by(REUSED) {
                self.rewrite(number, index);
            }
        }
        self.pending = token.map(|token| (token, Sent::Blocks(range)));
        if let Some(queue) = &mut self.queue {
            queue.notify(transport);
        }
    }

    fn finish(&mut self, errors: &mut Errors) {
        let (Some(queue), Some((token, sent))) = (&mut self.queue, self.pending.take()) else {
            return;
        };
        let taken = match sent {
            // SAFETY: the same memory as was added with this token.
            Sent::Number => unsafe { queue.take(token, &[&self.number.bytes()[..4]], &mut []) },
            Sent::Blocks(range) => {
                for number in free(&range) {
                    self.hinted += BLOCK_PAGES as u64;
                    for index in (0..BLOCK_PAGES).step_by(REUSED) {
                        self.later.push((number, index + 1));
                        self.at_end.push((number, index + 2));
                    }
                }
                // SAFETY: as above.
                unsafe { queue.take(token, &[], &mut memory(&mut self.blocks, &range)) }
            }
        };
        if taken.is_err() {
            errors.give_up("balloon", "other_descriptor", token.into());
        }
    }

    fn rewrite(&mut self, block: usize, index: usize) {
        self.rewritten += 1;
        self.write(block, index);
    }

    fn write(&mut self, block: usize, index: usize) {
        let number = number(block, index);
        let generation = self.generation;
        let block = &mut self.blocks[block];
        block.generations[index] = generation;
        page::write(block.page(index), Data::Random, number, generation);
    }

    /// Compares all that holds something.
    pub(crate) fn verify(&mut self, errors: &mut Errors) -> Verified {
        let mut pages = 0;
        for (place, block) in self.blocks.iter_mut().enumerate() {
            for index in 0..BLOCK_PAGES {
                let generation = block.generations[index];
                if generation == 0 {
                    continue;
                }
                pages += 1;
                let number = number(place, index);
                if !page::matches(block.page(index), Data::Random, number, generation) {
                    let address = block.memory.address() + index as u64 * page::BYTES;
                    errors.report("balloon", "page_lost", address);
                }
            }
        }
        Verified {
            pages,
            hinted: self.hinted,
            rewritten: self.rewritten,
        }
    }
}

/// What was compared, and what there was of hints until then: pages.
#[derive(Default)]
pub(crate) struct Verified {
    pub(crate) pages: u64,
    pub(crate) hinted: u64,
    pub(crate) rewritten: u64,
}

/// Those blocks that are free when the device asks.
fn free(range: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
    range.clone().filter(|number| number % KEPT != 0)
}

/// The memory of the [`free`] blocks.
fn memory<'a>(blocks: &'a mut [Block], range: &Range<usize>) -> Vec<&'a mut [u8]> {
    let blocks = blocks.iter_mut().enumerate();
    let free = blocks.filter(|(number, _)| range.contains(number) && number % KEPT != 0);
    free.map(|(_, block)| block.memory.bytes()).collect()
}

/// The number of a page, from which its contents follow.
fn number(block: usize, index: usize) -> u64 {
    (block * BLOCK_PAGES + index) as u64
}

impl Block {
    fn page(&mut self, index: usize) -> &mut Page {
        let (pages, _) = self
            .memory
            .bytes()
            .as_chunks_mut::<{ page::BYTES as usize }>();
        // SAFETY: a page's worth of memory, aligned as all of `Dma` is, and borrowed as long as
        // `self`.
        unsafe { &mut *pages[index].as_mut_ptr().cast() }
    }
}
