//! The VMM.

pub mod console;
pub mod control;
