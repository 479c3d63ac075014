//! `boot`, entered by PVH. See `guests::boot`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "reads all of the machine's memory")]

mod tell;

guests::guest!(pvh, tell::main);
