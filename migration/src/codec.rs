//! Reading and writing explicit little-endian fields, bounded.

use crate::layout::LayoutError;

/// The most bytes in a name.
pub const MAX_NAME: usize = 64;

/// What is wrong with a message's body.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The body ends inside a field.
    #[error("a message ends {missing} bytes too early")]
    Truncated {
        /// How many bytes of the field are missing.
        missing: usize,
    },
    /// The body goes on after its last field.
    #[error("a message has {0} bytes too many")]
    Trailing(usize),
    /// Too many or too large.
    #[error("{count} {what}; at most {limit} are supported")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// How many.
        count: u64,
        /// The most that are allowed.
        limit: u64,
    },
    /// A name that is empty, too long, or not printable ASCII.
    #[error("a name is not 1 to {MAX_NAME} printable ASCII characters: {0:?}")]
    Name(String),
    /// A truth value other than 0 and 1.
    #[error("a flag is {0}, not 0 or 1")]
    Bool(u8),
    /// A guest that is gone for a reason that is none.
    #[error("{0} says nothing about what became of the guest")]
    GoneCause(u8),
    /// Text that is not UTF-8.
    #[error("a text is not UTF-8")]
    NotText,
    /// A guest with other pages.
    #[error("the page size is {0} bytes; only 4096 is supported")]
    PageSize(u32),
    /// A memory layout that is none.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// None of what there has to be some of.
    #[error("no {0}")]
    None(&'static str),
    /// A run of no pages.
    #[error("an empty run of pages at {0:#x}")]
    EmptyRun(u64),
    /// A piece of a bitmap of pages that is none.
    #[error("a malformed bitmap of {len} bytes for the pages from {first}")]
    Bitmap {
        /// The first page's number.
        first: u64,
        /// How many bytes of bits.
        len: usize,
    },
    /// Disks with other blocks.
    #[error("the block size of the disks is {0} bytes; only 65536 is supported")]
    BlockSize(u32),
    /// A disk that can't be.
    #[error("the disk '{name}' has {capacity} bytes; it must be a multiple of 512 up to 256 TiB")]
    Capacity {
        /// The disk.
        name: String,
        /// Its capacity in bytes.
        capacity: u64,
    },
    /// Two disks of one name.
    #[error("there are two disks named '{0}'")]
    DuplicateDisk(String),
    /// A part of a disk that can't be: its kind, its alignment, or its length.
    #[error("a malformed part of a disk: {len} bytes at {offset}, of kind {kind}")]
    BlockRun {
        /// Its kind on the wire.
        kind: u8,
        /// Where it begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The data of a disk is not as long as the runs say.
    #[error("the parts of the disk have {stated} bytes of data, but {len} follow")]
    BlockPayload {
        /// What the runs say.
        stated: u64,
        /// The length of the data.
        len: u32,
    },
    /// A way of compressing that this version doesn't have.
    #[error("unknown compression method {0}")]
    Method(u8),
    /// What pages are compressed to, or their differences, is not as long as the body says.
    #[error("the pages take {stated} bytes, but {len} follow")]
    EncodedPayload {
        /// What the body says.
        stated: u64,
        /// The length of the data.
        len: u32,
    },
    /// The page data is not as long as the runs say.
    #[error("the runs have {pages} pages, but {len} bytes of data follow")]
    Payload {
        /// The pages in the runs.
        pages: u64,
        /// The length of the data.
        len: u32,
    },
}

impl DecodeError {
    /// An error if `count` is above `limit`.
    pub fn within(what: &'static str, count: u64, limit: u64) -> Result<(), Self> {
        if count <= limit {
            Ok(())
        } else {
            Err(Self::TooMany { what, count, limit })
        }
    }
}

/// Writes a name: its length in one byte, then the bytes.
pub fn put_name(name: &str, out: &mut Vec<u8>) -> Result<(), DecodeError> {
    check_name(name.as_bytes())?;
    out.push(name.len() as u8);
    out.extend(name.as_bytes());
    Ok(())
}

fn check_name(name: &[u8]) -> Result<String, DecodeError> {
    let fits = (1..=MAX_NAME).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
    let name = String::from_utf8_lossy(name);
    if fits {
        Ok(name.into_owned())
    } else {
        Err(DecodeError::Name(name.chars().take(MAX_NAME).collect()))
    }
}

/// Takes fields from the front of a body.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `body` from its start.
    pub fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) =
            self.rest
                .split_at_checked(len)
                .ok_or_else(|| DecodeError::Truncated {
                    missing: len - self.rest.len(),
                })?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// A 16-bit number.
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// A 32-bit number.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// A 64-bit number.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A byte that is 0 or 1.
    pub fn bool(&mut self) -> Result<bool, DecodeError> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(DecodeError::Bool(other)),
        }
    }

    /// A 16-bit count of at most `limit`.
    pub fn count_u16(&mut self, what: &'static str, limit: usize) -> Result<usize, DecodeError> {
        let count = self.u16()?;
        DecodeError::within(what, count.into(), limit as u64)?;
        Ok(count.into())
    }

    /// A 32-bit count of at most `limit`.
    pub fn count_u32(&mut self, what: &'static str, limit: usize) -> Result<usize, DecodeError> {
        let count = self.u32()?;
        DecodeError::within(what, count.into(), limit as u64)?;
        Ok(count as usize)
    }

    /// A name; see [`put_name`].
    pub fn name(&mut self) -> Result<String, DecodeError> {
        let [len] = self.array::<1>()?;
        check_name(self.take(len.into())?)
    }

    /// Everything up to the end.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Ends the reading: bytes left over are an error.
    pub fn end(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::Trailing(self.rest.len()))
        }
    }
}
