//! Random numbers that a seed repeats.

/// xorshift64 (Marsaglia 2003).
#[derive(Clone, Copy)]
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // Any state but 0 is good.
        Self((0x2545_f491_4f6c_dd1d ^ seed.rotate_left(20)).max(1))
    }

    /// The next number below `below`; 0 if that is 0.
    pub fn below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(below)) >> 64) as u64
    }
}
