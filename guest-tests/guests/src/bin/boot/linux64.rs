//! `boot`, entered by the 64-bit boot protocol of Linux: without a PVH note. See `guests::boot`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "reads all of the machine's memory")]

mod tell;

guests::guest!(linux64, tell::main);
