//! Free page hints (section 5.5.6.6): at the beginning of a migration the guest names pages that
//! need not be sent.
//!
//! The host writes a new number into the configuration space. The driver answers with that number
//! in a buffer of its own, then names free pages, as buffers that the device could write, and ends
//! with [`STOP`]. With [`DONE`] the host says that it listens no more.
//!
//! A hint says that a page was free at *some time* after the driver had seen the number. By the
//! time that it is read here, the page may be in use again, and hold data. So hints are safe only
//! if every write from before the number was sent is logged: first the log is armed for all of
//! the RAM, then [`start_hints`](super::Balloon::start_hints) is called. What is written into a
//! page after its hint is then in the log, and the page is sent in a later round. And a hint only
//! ever takes a page off the list of the first round, never out of the log; from the first harvest
//! on no hint is taken, for it could be older than the write that the harvest found.
//!
//! Nobody waits for hints, and what a migration does about them is bounded: in answer to one request
//! as many pages are listened to as the guest has, as if each were named once.

use super::PAGE;

/// The driver, or the host, ends the hints. The driver keeps the pages that it took.
pub(super) const STOP: u32 = 0;
/// The host has done with them: the driver lets its pages go.
pub(super) const DONE: u32 = 1;
/// The first number of a request.
pub(super) const FIRST: u32 = 0x8000_0000;

/// How many ranges are kept for a migration that is slow to take them; others are forgotten.
const MOST: usize = 1 << 16;

/// Free pages: whole pages of 4 KiB, in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreePages {
    /// The guest physical address in bytes.
    pub address: u64,
    /// The length in bytes.
    pub len: u64,
}

/// A request for hints, and what has come.
#[derive(Debug)]
pub(super) struct Hints {
    /// The number of the request under way.
    wanted: Option<u32>,
    /// Whether the driver has begun to answer it.
    answering: bool,
    /// The number of the last request.
    last: u32,
    /// How many more bytes are listened to.
    left: u64,
    pages: Vec<FreePages>,
}

impl Default for Hints {
    fn default() -> Self {
        Self {
            wanted: None,
            answering: false,
            last: FIRST,
            left: 0,
            pages: Vec::new(),
        }
    }
}

impl Hints {
    /// Begins a request to a guest with `ram` bytes; returns its number.
    pub(super) fn begin(&mut self, ram: u64) -> u32 {
        // Another one than the last, which the driver knows.
        self.last = self.last.checked_add(1).unwrap_or(FIRST);
        self.wanted = Some(self.last);
        self.answering = false;
        self.left = ram;
        self.pages.clear();
        self.last
    }

    /// Ends the request, if there is one; whether there was.
    pub(super) fn end(&mut self) -> bool {
        self.answering = false;
        self.pages = Vec::new();
        self.wanted.take().is_some()
    }

    /// The driver has sent a number.
    pub(super) fn command(&mut self, number: u32) {
        self.answering = self.wanted == Some(number);
    }

    /// The driver has named `len` bytes at `address`, which are in RAM.
    pub(super) fn add(&mut self, address: u64, len: u64) {
        let end = address.saturating_add(len) / PAGE * PAGE;
        let address = address.next_multiple_of(PAGE);
        let len = end.saturating_sub(address);
        if self.answering && (1..=self.left).contains(&len) && self.pages.len() < MOST {
            self.left -= len;
            self.pages.push(FreePages { address, len });
        }
    }

    pub(super) fn take(&mut self) -> Vec<FreePages> {
        std::mem::take(&mut self.pages)
    }

    /// The number of the last request.
    pub(super) fn last(&self) -> u32 {
        self.last
    }

    /// Takes on the number of another device's last request.
    pub(super) fn restore(&mut self, last: u32) {
        *self = Self {
            last,
            ..Self::default()
        };
    }
}
