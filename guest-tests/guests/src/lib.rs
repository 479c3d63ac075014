#![no_std]
//! What the bare-metal guests share.
