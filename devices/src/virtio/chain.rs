//! A request of a driver: a chain of descriptors, checked.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::GuestRam;

/// The most descriptors that a chain has here, also in an indirect table: the longest queue's.
const MOST_DESCRIPTORS: u32 = 32768;

/// A piece of guest memory that lies in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it is.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
}

/// What a driver made available in one go: buffers that the device reads, then such that it
/// writes. All of them lie in RAM, and have at most 2^32 bytes together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The index of its first descriptor, by which it is given back.
    pub head: u16,
    /// What the device reads.
    pub readable: Vec<Buffer>,
    /// What the device writes.
    pub writable: Vec<Buffer>,
}

/// Why a driver's queue or request can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A ring that doesn't make sense, or isn't in RAM.
    #[error("the ring is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// More requests than descriptors: some descriptor begins two.
    #[error("{0} requests are under way in a queue of {0} descriptors, and there is another")]
    TooMany(u16),
    /// No descriptor at all, one that is not in RAM, a loop, or a bad indirect table.
    #[error("the descriptor chain {head} is broken after {descriptors} descriptors")]
    Descriptors {
        /// The first descriptor.
        head: u16,
        /// How many of it make sense.
        descriptors: u32,
    },
    /// A buffer outside the guest's memory.
    #[error(
        "the descriptor chain {head} has a buffer of {len} bytes at {address:#x}, which is not RAM"
    )]
    NotRam {
        /// The first descriptor of the chain.
        head: u16,
        /// Where the buffer is.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A readable buffer after a writable one (section 2.7.4.2).
    #[error("the descriptor chain {head} has a readable buffer after a writable one")]
    Order {
        /// The first descriptor of the chain.
        head: u16,
    },
}

/// Descriptors of a queue, to follow chains through.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    /// Where it is.
    pub(super) address: GuestAddress,
    /// How many descriptors it has.
    pub(super) len: u32,
}

impl Table {
    fn get(&self, memory: &GuestRam, index: u32) -> Option<Descriptor> {
        let offset = u64::from(index) * size_of::<Descriptor>() as u64;
        let address = self.address.checked_add(offset)?;
        (index < self.len)
            .then(|| memory.read_obj(address).ok())
            .flatten()
    }
}

impl Chain {
    /// Follows the chain that begins at descriptor `head`, and checks all of it.
    pub(super) fn follow(memory: &GuestRam, table: Table, head: u16) -> Result<Self, ChainError> {
        let mut chain = Self {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let (mut table, mut next) = (table, u32::from(head));
        let (mut seen, mut bytes, mut is_indirect) = (0, 0u64, false);
        loop {
            let broken = ChainError::Descriptors {
                head,
                descriptors: seen,
            };
            let Some(descriptor) = table.get(memory, next) else {
                return Err(broken);
            };
            if descriptor.refers_to_indirect_table() {
                // One level, at the end of the chain (section 2.7.5.3.1).
                let len = descriptor.len() / size_of::<Descriptor>() as u32;
                let whole = descriptor
                    .len()
                    .is_multiple_of(size_of::<Descriptor>() as u32);
                if is_indirect || descriptor.has_next() || !whole {
                    return Err(broken);
                }
                is_indirect = true;
                table = Table {
                    address: descriptor.addr(),
                    len: len.min(MOST_DESCRIPTORS),
                };
                (next, seen) = (0, 0);
                continue;
            }
            chain.add(memory, &descriptor)?;
            seen += 1;
            bytes += u64::from(descriptor.len());
            if !descriptor.has_next() {
                return Ok(chain);
            }
            // A chain with more than there are has a loop; one of 2^32 bytes is not allowed.
            if seen >= table.len || bytes > u64::from(u32::MAX) {
                return Err(broken);
            }
            next = descriptor.next().into();
        }
    }

    fn add(&mut self, memory: &GuestRam, descriptor: &Descriptor) -> Result<(), ChainError> {
        let head = self.head;
        let (address, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return Ok(());
        }
        if !memory.check_range(address, len as usize) {
            return Err(ChainError::NotRam {
                head,
                address: address.0,
                len,
            });
        }
        if descriptor.is_write_only() {
            self.writable.push(Buffer { address, len });
        } else if self.writable.is_empty() {
            self.readable.push(Buffer { address, len });
        } else {
            return Err(ChainError::Order { head });
        }
        Ok(())
    }

    /// The number of bytes for the device to read.
    pub fn readable_len(&self) -> u64 {
        len(&self.readable)
    }

    /// The number of bytes for the device to write.
    pub fn writable_len(&self) -> u64 {
        len(&self.writable)
    }

    /// Copies what the device reads, from `offset` bytes on; returns how many bytes there were,
    /// at most as many as `data` has.
    pub fn read(&self, memory: &GuestRam, offset: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in pieces(&self.readable, offset, data.len() as u64) {
            let Some(to) = data.get_mut(done..done + piece.len as usize) else {
                break;
            };
            if memory.read_slice(to, piece.address).is_err() {
                break;
            }
            done += piece.len as usize;
        }
        done
    }

    /// Copies `data` to what the device writes, from `offset` bytes on; returns how many bytes
    /// found room.
    pub fn write(&self, memory: &GuestRam, offset: u64, data: &[u8]) -> usize {
        let mut done = 0;
        for piece in pieces(&self.writable, offset, data.len() as u64) {
            let Some(from) = data.get(done..done + piece.len as usize) else {
                break;
            };
            if memory.write_slice(from, piece.address).is_err() {
                break;
            }
            done += piece.len as usize;
        }
        done
    }
}

fn len(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}

/// The parts of `buffers` that hold the bytes from `offset` for `len`, or up to their end.
pub fn pieces(buffers: &[Buffer], offset: u64, len: u64) -> impl Iterator<Item = Buffer> + '_ {
    let (mut skip, mut left) = (offset, len);
    buffers.iter().filter_map(move |buffer| {
        let all = u64::from(buffer.len);
        if skip >= all {
            skip -= all;
            return None;
        }
        let take = (all - skip).min(left);
        let address = GuestAddress(buffer.address.0 + skip);
        skip = 0;
        left -= take;
        (take > 0).then_some(Buffer {
            address,
            len: take as u32,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_cut_at_buffers_and_at_both_ends() {
        let buffer = |address, len| Buffer {
            address: GuestAddress(address),
            len,
        };
        let buffers = [buffer(0x1000, 16), buffer(0x3000, 512), buffer(0x2000, 1)];
        let cut = |offset, len| pieces(&buffers, offset, len).collect::<Vec<_>>();
        assert_eq!(cut(0, 529), buffers);
        assert_eq!(cut(0, u64::MAX), buffers);
        assert_eq!(cut(15, 2), [buffer(0x100f, 1), buffer(0x3000, 1)]);
        assert_eq!(cut(16, 512), [buffer(0x3000, 512)]);
        assert_eq!(cut(528, 9), [buffer(0x2000, 1)]);
        assert_eq!(cut(529, 9), []);
        assert_eq!(cut(3, 0), []);
    }
}
