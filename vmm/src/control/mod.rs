//! The control plane: what a user or a program may ask of a running machine, and who asks.
//!
//! [`command`] is the one typed layer: the [`Control`](command::Control) trait, which the machine
//! implements, with the types that it speaks in (named, shaped and valued as in QEMU's QAPI
//! schema), and their checks. Start reading there. [`qmp`] is its face for programs, [`monitor`] the
//! one for people.

pub mod address;
pub mod balloon;
pub mod block;
pub mod capability;
pub mod command;
pub mod compression;
pub mod convergence;
pub mod dirty_rate;
pub mod event;
pub mod forecast;
pub mod migrate_request;
pub mod migration;
pub mod monitor;
pub mod network;
pub mod parameters;
pub mod postcopy;
pub mod qmp;
pub mod run_state;
pub mod size;
pub mod snapshot;
pub mod socket;
pub mod vcpu_dirty_limit;

#[cfg(test)]
pub(crate) mod fake;
