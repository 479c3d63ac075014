//! Live migration of a virtual machine: the wire protocol, the rounds of pre-copy, the decision
//! to switch over, and the hand-over of the guest.
//!
//! The crate knows neither KVM nor any device: it sees the two machines through the traits of
//! [`vm`]. Read that first.

pub mod bitmap;
pub mod clock;
pub mod layout;
pub mod section;
pub mod vm;
