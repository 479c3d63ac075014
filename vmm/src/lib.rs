//! The VMM.

pub mod control;
