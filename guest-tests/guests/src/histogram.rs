//! Latencies, counted so that percentiles come out within 1/16 of their value.

/// Counters per power of two.
const PARTS: usize = 16;

/// How often each latency came. The unit is the caller's.
pub struct Histogram {
    counts: [u64; 64 * PARTS],
    total: u64,
    longest: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: [0; 64 * PARTS],
            total: 0,
            longest: 0,
        }
    }
}

impl Histogram {
    fn index(value: u64) -> usize {
        let value = value.max(PARTS as u64);
        let shift = value.ilog2() - PARTS.ilog2();
        shift as usize * PARTS + (value >> shift) as usize - PARTS
    }

    /// Counts one.
    pub fn add(&mut self, value: u64) {
        if let Some(count) = self.counts.get_mut(Self::index(value)) {
            *count += 1;
        }
        self.total += 1;
        self.longest = self.longest.max(value);
    }

    /// How many were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The highest one, exactly.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.longest
    }

    /// What so many of 1000 don't exceed: an upper bound, 0 if there were none.
    #[must_use]
    pub fn per_mille(&self, per_mille: u64) -> u64 {
        let wanted = (self.total * per_mille).div_ceil(1000);
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += count;
            if count > 0 && seen >= wanted {
                let shift = index / PARTS;
                let above = (PARTS + index % PARTS + 1) as u64;
                return (above << shift).wrapping_sub(1).min(self.longest);
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_close_from_above() {
        let mut histogram = Histogram::default();
        (1..=10_000).for_each(|value| histogram.add(value));
        for (per_mille, exact) in [(500, 5_000), (900, 9_000), (990, 9_900), (999, 9_990)] {
            let found = histogram.per_mille(per_mille);
            assert!((exact..=exact + exact / 16).contains(&found), "{found}");
        }
        assert_eq!(histogram.per_mille(1000), 10_000);
        assert_eq!((histogram.total(), histogram.longest()), (10_000, 10_000));
    }

    #[test]
    fn any_value_can_be_counted() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.per_mille(500), 0);
        for value in [0, 15, 16, 17, u64::MAX] {
            histogram.add(value);
        }
        assert_eq!(histogram.total(), 5);
        assert_eq!(histogram.per_mille(1000), u64::MAX);
    }
}
