//! The bare-metal guests, and what they share with the host that runs them.
//!
//! - One module per guest ([`dirtier`], …) holds its options and its reports: the host writes the
//!   options into a command line and reads the reports, the guest does the reverse, with the same
//!   code, so the two can't drift apart.
//! - `fields` is what those modules are made with, [`fault`] what any guest says when it breaks.
//! - [`mmio`] is where virtio devices are, [`block`] what the sectors of a disk hold.
//! - `bare` (feature `bare-metal`) is the machine under the guests in `src/bin`: entry, traps,
//!   memory, serial port, timers, virtio. All Rust code runs at CPL 3; see `bare::privileged`.
#![no_std]

#[cfg(feature = "bare-metal")]
extern crate alloc;

#[cfg(feature = "bare-metal")]
pub mod bare;
pub mod block;
pub mod boot;
pub mod clock;
pub mod dirtier;
pub mod disk;
pub mod echo;
pub mod fault;
mod fields;
pub mod histogram;
pub mod mmio;
pub mod net;
pub mod page;
pub mod state;
pub mod virtio;

pub use fields::{Hex, Malformed, Maybe, Name, Size};
