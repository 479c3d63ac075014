//! Frames: what every message on the wire is wrapped in. See docs/protocol.md.

use crate::compression::BLOCK_PAGES;
use crate::layout::PAGE_SIZE;
use crate::xbzrle::delta;

/// The length of a frame's header in bytes.
pub const HEADER_LEN: usize = 24;

/// The first two bytes of each frame: `FY`.
pub const FRAME_MAGIC: [u8; 2] = *b"FY";

/// The most pages in one [`Kind::Pages`] frame: 2 MiB of data.
pub const MAX_PAGES: u64 = 512;

/// The most blocks in one [`Kind::Compressed`] frame.
pub const MAX_COMPRESSED_BLOCKS: usize = (MAX_PAGES / BLOCK_PAGES) as usize;

/// The most connections that carry pages beside the first one, as in QEMU.
pub const MAX_CHANNELS: usize = 255;

/// The most runs in one [`Kind::Zero`] frame.
pub const MAX_ZERO_RUNS: usize = 4096;

/// The most runs in one [`Kind::Blocks`] frame.
pub const MAX_BLOCK_RUNS: usize = 512;

/// The most bytes of data in one [`Kind::Blocks`] frame: 1 MiB.
pub const MAX_BLOCK_DATA: usize = 1 << 20;

/// The most bytes of a blob in one [`Kind::Blob`] frame: 1 MiB.
pub const MAX_CHUNK: usize = 1 << 20;

/// The most bytes in the body of one state section: 16 MiB.
pub const MAX_SECTION: usize = 16 << 20;

/// The most bytes in the body of a SYNC, whose padding shows how fast the link is.
pub const MAX_SYNC: usize = 512 << 10;

/// The most bytes of UTF-8 in the reason of a REFUSE, FAILED, CANCEL or GONE.
pub const MAX_REASON: usize = 16 << 10;

/// The most bytes of a bitmap of pages in one frame: 128 MiB of RAM.
pub const MAX_BITS: usize = 4096;

/// What a frame says. Those that the source sends are below 0x80.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Source: what comes, and how it is configured.
    Hello = 0x01,
    /// Source: a piece of a file that goes with the guest.
    Blob = 0x02,
    /// Source: pages, with their data behind the body.
    Pages = 0x03,
    /// Source: runs of pages that are all zero.
    Zero = 0x04,
    /// Source: asks for a SYNC-ACK once all before it has been placed.
    Sync = 0x05,
    /// Source: a state section.
    State = 0x06,
    /// Source: everything has been sent.
    End = 0x07,
    /// Source: the guest is the destination's.
    Go = 0x08,
    /// Source: the migration is over, and the guest stays.
    Cancel = 0x09,
    /// Source: parts of a disk, with their data behind the body.
    Blocks = 0x0a,
    /// Source: asks for what was written to the disks to be flushed.
    Flush = 0x0b,
    /// Source: pages that the destination does not have, or that are stale there. From here on
    /// nothing of memory comes before the guest runs at the destination.
    Missing = 0x0c,
    /// Source: the guest is stopped, and all that is missing has been told.
    Late = 0x0d,
    /// Source: everything that was missing has been sent.
    Pushed = 0x0e,
    /// Source, at the beginning of a connection: the fault channel of a migration.
    Join = 0x0f,
    /// Source, at the beginning of a connection: goes on with a migration in post-copy.
    Resume = 0x10,
    /// Source: agrees on what has arrived.
    Continue = 0x11,
    /// Source: knows that all has arrived, and forgets the guest.
    Done = 0x12,
    /// Source: pages, compressed.
    Compressed = 0x13,
    /// Source: pages, as differences to what was sent before.
    Xbzrle = 0x14,
    /// Source, at the beginning of a connection: carries pages beside the first connection.
    Channel = 0x15,
    /// Source: what follows has to wait for what was sent on all connections before.
    Barrier = 0x16,
    /// Destination: the offer is accepted.
    Accept = 0x81,
    /// Destination: the offer is not accepted.
    Refuse = 0x82,
    /// Destination: all before that SYNC has been placed.
    SyncAck = 0x83,
    /// Destination: all is here and loaded; the guest could run.
    Ready = 0x84,
    /// Destination: the guest runs (or stays paused, as it was).
    Running = 0x85,
    /// Destination: the migration is over; the guest has not run here and never will.
    Failed = 0x86,
    /// Destination: the disks are flushed.
    Flushed = 0x87,
    /// Destination, on the fault channel: pages that the guest waits for.
    Request = 0x88,
    /// Destination: all of the guest's memory has arrived.
    Complete = 0x89,
    /// Destination: the guest has ended there or is lost, and needs no more memory.
    Gone = 0x8a,
    /// Destination: what has arrived.
    Arrived = 0x8b,
    /// Destination: that was all of it, and so much is missing.
    Left = 0x8c,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 34] = [
        Self::Hello,
        Self::Blob,
        Self::Pages,
        Self::Zero,
        Self::Sync,
        Self::State,
        Self::End,
        Self::Go,
        Self::Cancel,
        Self::Blocks,
        Self::Flush,
        Self::Missing,
        Self::Late,
        Self::Pushed,
        Self::Join,
        Self::Resume,
        Self::Continue,
        Self::Done,
        Self::Compressed,
        Self::Xbzrle,
        Self::Channel,
        Self::Barrier,
        Self::Accept,
        Self::Refuse,
        Self::SyncAck,
        Self::Ready,
        Self::Running,
        Self::Failed,
        Self::Flushed,
        Self::Request,
        Self::Complete,
        Self::Gone,
        Self::Arrived,
        Self::Left,
    ];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == code)
    }

    /// Its name in docs/protocol.md and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "HELLO",
            Self::Blob => "BLOB",
            Self::Pages => "PAGES",
            Self::Zero => "ZERO",
            Self::Sync => "SYNC",
            Self::State => "STATE",
            Self::End => "END",
            Self::Go => "GO",
            Self::Cancel => "CANCEL",
            Self::Blocks => "BLOCKS",
            Self::Flush => "FLUSH",
            Self::Accept => "ACCEPT",
            Self::Refuse => "REFUSE",
            Self::SyncAck => "SYNC-ACK",
            Self::Ready => "READY",
            Self::Running => "RUNNING",
            Self::Failed => "FAILED",
            Self::Flushed => "FLUSHED",
            Self::Missing => "MISSING",
            Self::Late => "LATE",
            Self::Pushed => "PUSHED",
            Self::Join => "JOIN",
            Self::Resume => "RESUME",
            Self::Continue => "CONTINUE",
            Self::Done => "DONE",
            Self::Compressed => "COMPRESSED",
            Self::Xbzrle => "XBZRLE",
            Self::Channel => "CHANNEL",
            Self::Barrier => "BARRIER",
            Self::Request => "REQUEST",
            Self::Complete => "COMPLETE",
            Self::Gone => "GONE",
            Self::Arrived => "ARRIVED",
            Self::Left => "LEFT",
        }
    }

    /// The most bytes that its body may have.
    pub const fn max_body(self) -> usize {
        match self {
            Self::Hello => 1 << 20,
            Self::Blob => 10 + MAX_CHUNK,
            Self::Pages => 4 + 16 * MAX_PAGES as usize,
            Self::Compressed => 5 + 16 * MAX_PAGES as usize + 4 * MAX_COMPRESSED_BLOCKS,
            Self::Xbzrle => 4 + 18 * MAX_PAGES as usize,
            Self::Zero => 4 + 16 * MAX_ZERO_RUNS,
            Self::Blocks => 6 + 21 * MAX_BLOCK_RUNS,
            Self::State => 128 + MAX_SECTION,
            Self::Refuse | Self::Failed | Self::Cancel => MAX_REASON,
            Self::Gone => 1 + MAX_REASON,
            Self::Missing | Self::Arrived => 8 + MAX_BITS,
            Self::Sync => MAX_SYNC,
            Self::Barrier => 2 + 8 * (1 + MAX_CHANNELS),
            Self::End
            | Self::Go
            | Self::Flush
            | Self::Accept
            | Self::SyncAck
            | Self::Ready
            | Self::Running
            | Self::Flushed
            | Self::Late
            | Self::Pushed
            | Self::Join
            | Self::Channel
            | Self::Resume
            | Self::Continue
            | Self::Done
            | Self::Request
            | Self::Complete
            | Self::Left => 64,
        }
    }

    /// The most bytes that may follow its body.
    pub fn max_payload(self) -> usize {
        match self {
            // A block that would be longer than its pages is not compressed.
            Self::Pages | Self::Compressed => (MAX_PAGES * PAGE_SIZE) as usize,
            Self::Xbzrle => MAX_PAGES as usize * delta::MAX_LEN,
            Self::Blocks => MAX_BLOCK_DATA,
            _ => 0,
        }
    }
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame says.
    pub kind: Kind,
    /// Counts the frames of one direction, from 0; wraps. So a frame that was lost, doubled or
    /// moved on the way is noticed.
    pub sequence: u32,
    /// The length of the body in bytes.
    pub body_len: u32,
    /// The length of what follows the body, in bytes: data of pages or blocks, which has checksums
    /// of its own inside the body.
    pub payload_len: u32,
    /// The CRC32 of the body.
    pub body_crc: u32,
}

/// What is wrong with a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a frame at all.
    #[error("no Ferry frame begins here (found {0:02x?}): the peer speaks another protocol")]
    Magic([u8; 2]),
    /// The header was damaged.
    #[error(
        "a frame header has checksum {computed:#010x} but says {stated:#010x}: the stream is damaged"
    )]
    HeaderCrc {
        /// What the header says.
        stated: u32,
        /// What it should say.
        computed: u32,
    },
    /// The body was damaged.
    #[error(
        "a {} frame's body has checksum {computed:#010x} but its header says {stated:#010x}: the stream is damaged", .kind.name()
    )]
    BodyCrc {
        /// The kind of frame.
        kind: Kind,
        /// What the header says.
        stated: u32,
        /// What it should say.
        computed: u32,
    },
    /// A kind that this version doesn't have.
    #[error("unknown frame type {0:#04x}")]
    UnknownKind(u8),
    /// Flags that this version doesn't have.
    #[error("a {} frame has unknown flags {flags:#04x}", .kind.name())]
    Flags {
        /// The kind of frame.
        kind: Kind,
        /// The flags.
        flags: u8,
    },
    /// Too long.
    #[error(
        "a {} frame says that its {part} has {len} bytes; at most {limit} are allowed", .kind.name()
    )]
    TooLong {
        /// The kind of frame.
        kind: Kind,
        /// The body or the payload.
        part: &'static str,
        /// The length that it says.
        len: u32,
        /// The most that is allowed.
        limit: usize,
    },
    /// Not the next frame.
    #[error(
        "frame {found} came where frame {expected} was due: a part of the stream is missing or came twice"
    )]
    Sequence {
        /// The sequence number that came.
        found: u32,
        /// The one that was due.
        expected: u32,
    },
}

impl Header {
    /// The header as it goes on the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..2].copy_from_slice(&FRAME_MAGIC);
        bytes[2] = self.kind as u8;
        bytes[3] = 0;
        bytes[4..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..20]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Checks a header that arrived: nothing in it is used before its checksum is right, and its
    /// lengths are within the limits of its kind.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let magic = [bytes[0], bytes[1]];
        if magic != FRAME_MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let (stated, computed) = (word(20), crc32fast::hash(&bytes[..20]));
        if stated != computed {
            return Err(FrameError::HeaderCrc { stated, computed });
        }
        let kind = Kind::from_code(bytes[2]).ok_or(FrameError::UnknownKind(bytes[2]))?;
        if bytes[3] != 0 {
            return Err(FrameError::Flags {
                kind,
                flags: bytes[3],
            });
        }
        let header = Self {
            kind,
            sequence: word(4),
            body_len: word(8),
            payload_len: word(12),
            body_crc: word(16),
        };
        for (part, len, limit) in [
            ("body", header.body_len, kind.max_body()),
            ("payload", header.payload_len, kind.max_payload()),
        ] {
            if len as usize > limit {
                return Err(FrameError::TooLong {
                    kind,
                    part,
                    len,
                    limit,
                });
            }
        }
        Ok(header)
    }

    /// Checks the body that came with this header.
    pub fn check_body(&self, body: &[u8]) -> Result<(), FrameError> {
        let computed = crc32fast::hash(body);
        if computed == self.body_crc {
            Ok(())
        } else {
            Err(FrameError::BodyCrc {
                kind: self.kind,
                stated: self.body_crc,
                computed,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            kind: Kind::Pages,
            sequence: 7,
            body_len: 20,
            payload_len: 4096,
            body_crc: 0x1234_5678,
        }
    }

    #[test]
    fn the_format_is_fixed() {
        assert_eq!(
            header().encode(),
            [
                b'F', b'Y', 3, 0, 7, 0, 0, 0, 20, 0, 0, 0, 0, 16, 0, 0, 0x78, 0x56, 0x34, 0x12,
                0x25, 0xdb, 0x91, 0xcf
            ]
        );
        assert_eq!(Header::decode(&header().encode()), Ok(header()));
    }

    #[test]
    fn damage_to_any_bit_is_noticed() {
        for bit in 0..HEADER_LEN * 8 {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
        }
        assert!(header().check_body(b"other").is_err());
    }

    #[test]
    fn lengths_are_limited_by_kind() {
        for kind in Kind::ALL {
            for (body_len, payload_len) in [
                (kind.max_body() as u32 + 1, 0),
                (0, kind.max_payload() as u32 + 1),
                (u32::MAX, 0),
            ] {
                let header = Header {
                    kind,
                    body_len,
                    payload_len,
                    ..header()
                };
                assert!(
                    matches!(
                        Header::decode(&header.encode()),
                        Err(FrameError::TooLong { .. })
                    ),
                    "{kind:?}"
                );
            }
        }
    }
}
