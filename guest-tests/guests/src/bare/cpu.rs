//! A vCPU's block: the counters of its interrupts, the stack for traps, its task state, and the
//! stack for CPL 3. `entry.s` lays it out.
#![allow(unsafe_code, reason = "reads what the trap handlers write")]

// SAFETY: `entry.s` defines it. Only its address is used.
unsafe extern "C" {
    static vcpu_blocks: u8;
}

/// As many vCPUs as have a block.
pub const MAX: usize = 32;
/// Bytes of a block.
const BYTES: usize = 1 << 16;
/// Where in a block `traps.s` notes down a fault.
const FAULT: usize = 9216;

/// What `traps.s` notes down of a fault.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FaultRecord {
    /// Its vector.
    pub vector: u64,
    /// Its error code, or 0.
    pub error: u64,
    /// Where it happened.
    pub rip: u64,
    /// The code segment there.
    pub cs: u64,
    /// CR2.
    pub cr2: u64,
}

/// One of the vCPUs.
#[derive(Clone, Copy)]
pub struct Cpu {
    block: usize,
}

impl Cpu {
    /// The vCPU with the block at `address`, as `entry.s` passes it.
    #[must_use]
    pub(crate) fn at(address: u64) -> Self {
        Self {
            block: address as usize,
        }
    }

    /// The vCPU that was the `index`th to start; 0 is the first.
    #[must_use]
    pub fn nth(index: usize) -> Self {
        assert!(index < MAX, "no such vCPU");
        Self {
            block: &raw const vcpu_blocks as usize + index * BYTES,
        }
    }

    /// In the order in which they started.
    #[must_use]
    pub fn index(self) -> usize {
        (self.block - &raw const vcpu_blocks as usize) / BYTES
    }

    /// Where the interrupts of a vector are counted.
    #[must_use]
    pub fn counter(self, vector: u8) -> *const u64 {
        (self.block + usize::from(vector) * 8) as *const u64
    }

    /// How many interrupts of a vector it took.
    #[must_use]
    pub fn count(self, vector: u8) -> u64 {
        // SAFETY: inside the block; the handlers write it in one piece.
        unsafe { self.counter(vector).read_volatile() }
    }

    /// The last fault, or of a breakpoint the address after it.
    #[must_use]
    pub fn fault(self) -> FaultRecord {
        // SAFETY: inside the block, plain numbers.
        unsafe { ((self.block + FAULT) as *const FaultRecord).read_volatile() }
    }
}
