//! The guests with virtio drivers, in QEMU's microvm: that they work with devices that are not
//! Ferry's, and that they find what is wrong.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests: a failure is a panic"
)]

mod disk;
mod machine;
mod net;
mod virtio;
