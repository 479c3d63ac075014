//! Whole migrations between two machines that are nothing but memory, over real sockets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::field_reassign_with_default,
    reason = "tests, and what only they use"
)]

mod block_errors;
mod blocks;
mod cancelling;
mod channels;
mod convergence;
mod cuts;
mod damage;
mod damaged_encodings;
mod disks;
mod encoded;
mod handover;
mod hints;
mod hostile;
mod machine;
mod multifd;
mod pace;
mod postcopy;
mod proxy;
mod slow_channel;
mod snapshot;
mod unchecked;
mod whole;
mod zero_copy;
