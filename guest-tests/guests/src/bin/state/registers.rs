//! The registers that CPL 3 can write.
#![allow(unsafe_code, reason = "runs the assembly of registers.s")]

use core::arch::global_asm;

use guests::state::Vectors;

use crate::Log;

global_asm!(include_str!("registers.s"), options(raw));

// SAFETY: `registers.s` defines them, with these arguments and the layout of `Registers`.
unsafe extern "C" {
    fn round_sse(load: *const Registers, store: *mut Registers, keep: u64);
    fn round_avx(load: *const Registers, store: *mut Registers, keep: u64);
    fn round_avx512(load: *const Registers, store: *mut Registers, keep: u64);
}

const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const RSP: usize = 4;
/// The flags that survive the loop, and are changed by nothing else: CF, DF, AC, ID.
const KEPT_FLAGS: u64 = 1 | 1 << 10 | 1 << 18 | 1 << 21;

/// What a round loads or stores; `registers.s` knows the layout.
#[repr(C, align(64))]
#[derive(Clone)]
pub(crate) struct Registers {
    /// As FXSAVE64 has it: x87, MXCSR, XMM0 to XMM15.
    fx: [u64; 64],
    vectors: [[u64; 8]; 32],
    masks: [u64; 8],
    general: [u64; 16],
    flags: u64,
    /// The words that FS and GS point to.
    segments: [u64; 2],
}

impl Registers {
    pub(crate) const fn zero() -> Self {
        Self {
            fx: [0; 64],
            vectors: [[0; 8]; 32],
            masks: [0; 8],
            general: [0; 16],
            flags: 0,
            segments: [0; 2],
        }
    }

    /// Values of which no two are equal, and which change from round to round: what was loaded
    /// earlier, or on another vCPU, is not right.
    pub(crate) fn fill(&mut self, cpu: u64, round: u64, segments: [u64; 2]) {
        let mut seed = cpu << 56 ^ round << 16;
        let mut next = || {
            seed += 1;
            let mixed = (seed ^ seed >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
        };
        let rounding = round & 3;
        // FCW: all masked, extended precision; FSW: a top of stack; FTW: nothing empty.
        let top = round >> 2 & 7;
        self.fx[0] = 0x037f | rounding << 10 | top << 11 << 16 | 0xff << 32;
        // MXCSR: all masked, flush to zero in every other round. Its mask is not loaded.
        self.fx[3] = 0x1f80 | rounding << 13 | (round & 4) << 13;
        for st in self.fx[4..20].as_chunks_mut::<2>().0 {
            // A normal number: the top bit of the significand is set.
            *st = [next() | 1 << 63, 0x3000 + (next() & 0x1fff)];
        }
        for (index, vector) in self.vectors.iter_mut().enumerate() {
            *vector = core::array::from_fn(|_| next());
            if let Some(xmm) = self.fx[20..52].get_mut(index * 2..index * 2 + 2) {
                xmm.copy_from_slice(&vector[..2]);
            }
        }
        self.masks = core::array::from_fn(|_| next());
        self.general = core::array::from_fn(|_| next());
        self.flags = 2 | (next() & KEPT_FLAGS);
        self.segments = segments;
    }

    /// Loads `self`, keeps it for so many turns of a loop, and stores what is there then.
    pub(crate) fn keep(&self, vectors: Vectors, turns: u64, stored: &mut Self) {
        // SAFETY: the routines change what a C function may, and write to `stored`. XCR0 allows
        // the vectors.
        unsafe {
            match vectors {
                Vectors::Sse => round_sse(self, stored, turns),
                Vectors::Avx => round_avx(self, stored, turns),
                Vectors::Avx512 => round_avx512(self, stored, turns),
            }
        }
    }

    /// Compares what was stored with what was loaded.
    pub(crate) fn compare(&self, stored: &Self, vectors: Vectors, log: &mut Log) {
        for (index, name) in GENERAL
            .into_iter()
            .enumerate()
            .filter(|&(index, _)| index != RSP)
        {
            log.compare(
                format_args!("{name}"),
                self.general[index],
                stored.general[index],
            );
        }
        log.compare(
            format_args!("rflags"),
            self.flags & KEPT_FLAGS,
            stored.flags & KEPT_FLAGS,
        );
        for (index, name) in ["fs:0", "gs:0"].into_iter().enumerate() {
            log.compare(
                format_args!("{name}"),
                self.segments[index],
                stored.segments[index],
            );
        }
        // The last x87 instruction (FOP) is not kept by all processors.
        log.compare(
            format_args!("x87_control"),
            self.fx[0] & 0xff_ffff_ffff,
            stored.fx[0] & 0xff_ffff_ffff,
        );
        log.compare(
            format_args!("mxcsr"),
            self.fx[3] & 0xffff_ffff,
            stored.fx[3] & 0xffff_ffff,
        );
        for st in 0..8 {
            log.compare(
                format_args!("st{st}.0"),
                self.fx[4 + 2 * st],
                stored.fx[4 + 2 * st],
            );
            log.compare(
                format_args!("st{st}.1"),
                self.fx[5 + 2 * st] & 0xffff,
                stored.fx[5 + 2 * st] & 0xffff,
            );
        }
        for (index, (expected, found)) in self.fx[20..52]
            .chunks(2)
            .zip(stored.fx[20..52].chunks(2))
            .enumerate()
        {
            log.compare_lanes(format_args!("xmm{index}"), expected, found);
        }
        let (prefix, count, lanes) = match vectors {
            Vectors::Sse => return,
            Vectors::Avx => ("ymm", 16, 4),
            Vectors::Avx512 => ("zmm", 32, 8),
        };
        for (index, (expected, found)) in self
            .vectors
            .iter()
            .zip(&stored.vectors)
            .take(count)
            .enumerate()
        {
            log.compare_lanes(
                format_args!("{prefix}{index}"),
                &expected[..lanes],
                &found[..lanes],
            );
        }
        if vectors == Vectors::Avx512 {
            for (index, (&expected, &found)) in self.masks.iter().zip(&stored.masks).enumerate() {
                log.compare(format_args!("k{index}"), expected, found);
            }
        }
    }

    /// Changes a general register's stored value.
    pub(crate) fn spoil_general(&mut self) {
        self.general[12] ^= 1 << 40;
    }

    /// Changes a vector register's stored value.
    pub(crate) fn spoil_vector(&mut self) {
        self.fx[21] ^= 1;
    }
}
