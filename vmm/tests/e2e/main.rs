//! End-to-end tests: real `ferry` processes with real guests, which check their own memory and
//! state and fail the test if they noticed anything.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub,
    reason = "tests: a failure is a panic"
)]

mod affinity;
mod balloon;
mod bench;
mod boot;
mod bridge;
mod console;
mod control;
mod convergence;
mod dirty_limit;
mod disk;
mod encoded;
mod failure;
mod frames;
mod guests;
mod handover;
mod harness;
mod hints;
mod instructions;
mod lifecycle;
mod linux;
mod memory;
mod migrate;
mod multifd;
mod mutation;
mod net;
mod ping;
mod postcopy;
mod proxy;
mod shuttle;
mod snapshot;
mod terminal;
mod unchecked;
