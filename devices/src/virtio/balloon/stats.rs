//! What a guest tells of its memory (section 5.5.6.3).

use std::time::Instant;

/// The bytes of a figure: a 16-bit tag, a 64-bit value, with nothing in between.
const ENTRY: usize = 10;

/// The most bytes that are read of a guest's buffer.
pub(super) const MOST: usize = 64 * ENTRY;

/// QEMU's names of the figures, by tag (VIRTIO_BALLOON_S_…).
const NAMES: [&str; 16] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
    "stat-oom-kills",
    "stat-alloc-stalls",
    "stat-async-scans",
    "stat-direct-scans",
    "stat-async-reclaims",
    "stat-direct-reclaims",
];

/// A guest's figures, and when they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestStats {
    values: [Option<u64>; NAMES.len()],
    at: Instant,
}

impl GuestStats {
    /// Reads a guest's buffer. Tags that are not known are left out; the last of several with the
    /// same tag counts.
    pub(super) fn parse(bytes: &[u8], at: Instant) -> Self {
        let mut values = [None; NAMES.len()];
        let (entries, _) = bytes.as_chunks::<ENTRY>();
        for [t0, t1, value @ ..] in entries {
            let tag = usize::from(u16::from_le_bytes([*t0, *t1]));
            if let Some(slot) = values.get_mut(tag) {
                *slot = Some(u64::from_le_bytes(*value));
            }
        }
        Self { values, at }
    }

    /// When they came.
    pub fn at(&self) -> Instant {
        self.at
    }

    /// The figures that the guest told, by QEMU's names; memory in bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        NAMES
            .into_iter()
            .zip(self.values)
            .filter_map(|(name, value)| Some((name, value?)))
    }
}
