//! A request of a driver: a chain of descriptors, checked.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::GuestRam;

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
    /// No descriptor at all, one that is not in RAM, a loop, or a bad indirect table.
    #[error("the descriptor chain {head} is broken after {descriptors} descriptors")]
    Descriptors {
        /// The first descriptor.
        head: u16,
        /// How many of it make sense.
        descriptors: usize,
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

impl Chain {
    /// Follows the chain that begins at `descriptors` and checks all of it.
    pub(super) fn collect(
        descriptors: virtio_queue::DescriptorChain<&GuestRam>,
    ) -> Result<Self, ChainError> {
        let head = descriptors.head_index();
        let memory = descriptors.memory();
        let mut chain = Self {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        // The iterator ends without a word where the chain doesn't go on as it should.
        let mut more = true;
        for descriptor in descriptors.clone() {
            more = descriptor.has_next();
            let (address, len) = (descriptor.addr(), descriptor.len());
            if len == 0 {
                continue;
            }
            if !memory.check_range(address, len as usize) {
                return Err(ChainError::NotRam {
                    head,
                    address: address.0,
                    len,
                });
            }
            if descriptor.is_write_only() {
                chain.writable.push(Buffer { address, len });
            } else if chain.writable.is_empty() {
                chain.readable.push(Buffer { address, len });
            } else {
                return Err(ChainError::Order { head });
            }
        }
        if more {
            return Err(ChainError::Descriptors {
                head,
                descriptors: chain.readable.len() + chain.writable.len(),
            });
        }
        Ok(chain)
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
