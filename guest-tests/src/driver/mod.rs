//! Driving real VMM processes from outside, as an operator would: start them, talk QMP to them,
//! and watch what their guest says. The demo, the end-to-end tests and the benchmarks share it.

pub mod hugepages;
pub mod namespace;
pub mod process;
pub mod qmp;
pub mod serial;
mod skip;

pub use skip::skip;
