//! The configuration space (section 5.5.4).

/// The fields, little-endian, in this order. A guest writes `actual` and `poison`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Space {
    /// How many pages the balloon should have (`num_pages`).
    pub(super) target: u32,
    /// How many it has, says the guest: at most those of its RAM.
    pub(super) actual: u32,
    /// What the guest should do about hints: see [`hints`](super::hints).
    pub(super) hint_command: u32,
    /// What free pages are filled with (`poison_val`).
    pub(super) poison: u32,
}

const LEN: usize = 16;

impl Space {
    pub(super) fn to_bytes(self) -> [u8; LEN] {
        let fields = [self.target, self.actual, self.hint_command, self.poison];
        let mut bytes = [0; LEN];
        for (bytes, field) in bytes.as_chunks_mut().0.iter_mut().zip(fields) {
            *bytes = field.to_le_bytes();
        }
        bytes
    }

    /// A write by a guest with so many pages of RAM.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], ram_pages: u64) {
        let mut bytes = self.to_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in bytes.iter_mut().skip(from).zip(data) {
            *to = *from;
        }
        let (fields, _) = bytes.as_chunks();
        if let [_, actual, _, poison] = fields {
            let most = u32::try_from(ram_pages).unwrap_or(u32::MAX);
            self.actual = u32::from_le_bytes(*actual).min(most);
            self.poison = u32::from_le_bytes(*poison);
        }
    }

    /// The driver is gone.
    pub(super) fn reset(&mut self) {
        *self = Self {
            target: self.target,
            ..Self::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_writes_what_is_its_own() {
        let mut space = Space {
            target: 7,
            ..Space::default()
        };
        space.write(0, &[0xff; 40], 0x1_0000);
        assert_eq!(
            space,
            Space {
                target: 7,
                actual: 0x1_0000,
                hint_command: 0,
                poison: u32::MAX
            }
        );
        space.write(5, &[2], 0x1_0000);
        assert_eq!(space.actual, 0x1_0000, "0x1_0200 is more than there is");
        space.write(4, &[1, 0, 0, 0], 0x1_0000);
        space.write(5, &[2], 0x1_0000);
        assert_eq!(space.actual, 0x201);
        space.write(u64::MAX, &[1], 0x1_0000);
        space.write(16, &[1], 0x1_0000);
        assert_eq!(space.actual, 0x201);
        assert_eq!(space.to_bytes()[..8], [7, 0, 0, 0, 1, 2, 0, 0]);
    }
}
