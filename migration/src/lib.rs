//! Live migration of a virtual machine: the wire protocol, the rounds of pre-copy, the decision
//! to switch over, and the hand-over of the guest.
//!
//! The crate knows neither KVM nor any device: it sees the two machines through the traits of
//! [`vm`]. Read that first, then [`source`] and [`destination`], which tell the story.
//!
//! - What the machines and the engine share: [`vm`], [`disk`], [`layout`], [`section`],
//!   [`bitmap`], [`clock`].
//! - What users see and set: [`uri`], [`parameters`], [`progress`], [`cancel`].
//! - The source: [`source`], with its passes over memory (`rounds`, `page_sender`, `outgoing`,
//!   [`pagemap`], `holes`, `zero`), what it does to pages on their way ([`compression`], [`xbzrle`]), its passes over
//!   disks (`blocks`, `read_ahead`), its side of the connection (`session`, `send_buffer`), and arithmetic
//!   ([`convergence`], [`pacing`], [`throttle`]); `timeout` ends what takes too long.
//! - The destination: [`listener`], [`destination`], its further connections
//!   (`destination::channels`), and the arriving memory: `placement` before the switch,
//!   [`destination::late`] with [`userfault`] after it.
//! - A guest in a file: [`snapshot`], described in docs/snapshot.md.
//! - The wire, described in docs/protocol.md: [`protocol`], [`frame`], [`message`], [`codec`],
//!   `channel`, [`link`], `low_water`, [`zero_copy`], [`connect`], and [`guest_io`], which numbers the pages of
//!   memory and moves them.

pub mod bitmap;
mod blocks;
pub mod cancel;
pub mod channel;
pub mod clock;
pub mod codec;
pub mod compression;
pub mod connect;
pub mod convergence;
pub mod destination;
pub mod disk;
pub mod frame;
pub mod guest_io;
mod holes;
pub mod layout;
pub mod link;
pub mod listener;
mod low_water;
mod memory_frames;
pub mod message;
mod outgoing;
pub mod pacing;
mod page_sender;
pub mod pagemap;
pub mod parameters;
mod placement;
pub mod postcopy;
mod priority;
pub mod progress;
pub mod protocol;
pub mod read_ahead;
mod rounds;
pub mod section;
mod send_buffer;
mod session;
pub mod snapshot;
pub mod source;
pub mod throttle;
mod timeout;
pub mod uri;
pub mod userfault;
pub mod vm;
pub mod xbzrle;
mod zero;
pub mod zero_copy;
