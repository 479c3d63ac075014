//! The bodies of a fixed size.

use super::Id;
use crate::codec::{DecodeError, Reader};

/// A fixed-size body: its fields in order, little-endian.
macro_rules! fixed {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident: $type:ident),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)+
        }

        impl $name {
            /// Writes the body, replacing what is in `out`.
            pub fn encode(&self, out: &mut Vec<u8>) {
                out.clear();
                $(<$type as Field>::put(self.$field, out);)+
            }

            /// Decodes and checks a body.
            pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
                let mut reader = Reader::new(body);
                let message = Self { $($field: <$type as Field>::take(&mut reader)?,)+ };
                reader.end()?;
                Ok(message)
            }
        }
    };
}

trait Field: Sized {
    fn put(self, out: &mut Vec<u8>);
    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError>;
}

macro_rules! field {
    ($($type:ident => $take:ident),+) => {
        $(impl Field for $type {
            fn put(self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
            fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
                reader.$take()
            }
        })+
    };
}

field!(u16 => u16, u32 => u32, u64 => u64);

impl Field for bool {
    fn put(self, out: &mut Vec<u8>) {
        out.push(self.into());
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        reader.bool()
    }
}

impl Field for Id {
    fn put(self, out: &mut Vec<u8>) {
        out.extend(self.0);
    }
    fn take(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self(reader.array()?))
    }
}

fixed! {
    /// ACCEPT.
    Accept {
        /// The migration accepted.
        id: Id,
        /// The version that is spoken from here on.
        version: u16,
        /// The optional capabilities that the destination picked.
        capabilities: u32,
    }
}

fixed! {
    /// The beginning of a SYNC; padding follows up to the body's end.
    Sync {
        /// Counts the SYNCs of this migration, from 1.
        mark: u64,
        /// The round that the next page belongs to or, at its end, that it ends; for the log.
        round: u64,
    }
}

impl Sync {
    /// The length of a SYNC without padding.
    pub const LEN: usize = 16;

    /// Decodes the beginning of a body, whatever the padding.
    pub fn decode_padded(body: &[u8]) -> Result<Self, DecodeError> {
        Self::decode(body.get(..Self::LEN).unwrap_or(body))
    }
}

fixed! {
    /// SYNC-ACK.
    SyncAck {
        /// The mark of the SYNC that this answers.
        mark: u64,
    }
}

fixed! {
    /// FLUSH.
    Flush {
        /// The round that it ends; for the log.
        round: u64,
    }
}

fixed! {
    /// FLUSHED.
    Flushed {
        /// How long flushing all disks took, in nanoseconds.
        flush_ns: u64,
    }
}

fixed! {
    /// END.
    End {
        /// How many STATE frames came.
        sections: u32,
        /// Whether the guest ran at the source before it was stopped.
        was_running: bool,
    }
}

fixed! {
    /// READY.
    Ready {
        /// How long checking completeness, flushing the disks and loading the state took, in
        /// nanoseconds.
        load_ns: u64,
    }
}

fixed! {
    /// GO.
    Go {
        /// The migration: a GO of another one is no GO.
        id: Id,
        /// Whether to run the guest; otherwise it stays paused.
        run: bool,
        /// How long the guest has been stopped when this is sent, in nanoseconds; 0 if it was
        /// paused before the migration.
        stopped_ns: u64,
        /// The shortest round trip that the source measured, in nanoseconds.
        round_trip_ns: u64,
    }
}

fixed! {
    /// RUNNING.
    Running {
        /// The time from GO's arrival to the first vCPU about to enter the guest, in nanoseconds.
        start_ns: u64,
    }
}

fixed! {
    /// LATE, LEFT and CONTINUE.
    Missing {
        /// How many pages the destination does not have.
        pages: u64,
    }
}

fixed! {
    /// JOIN, CHANNEL and RESUME: which migration the connection belongs to.
    Return {
        /// The migration.
        id: Id,
        /// JOIN and RESUME: counts the attempts to recover, 0 being the first connection. CHANNEL:
        /// which one it is, counting from 0.
        attempt: u32,
    }
}

impl Return {
    /// The length of the body.
    pub const LEN: usize = 20;
}

fixed! {
    /// REQUEST.
    Request {
        /// The guest physical address of the first page.
        address: u64,
        /// How many pages.
        pages: u32,
    }
}
