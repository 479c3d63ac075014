//! What the first bytes of an image say, checked before anything believes them.

use imago::StorageExt;

use super::storage::FileStorage;
use super::{Error, Format, Result};

/// How much of the beginning tells the format.
pub(super) const PROBED: usize = 512;

const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Formats that QEMU recognises by their beginning: offset, magic and name.
const MAGICS: [(usize, &[u8], &str); 11] = [
    (0, QCOW2_MAGIC, "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
];

/// The format that the beginning of a file says it has, none for a raw image.
pub(super) fn recognise(start: &[u8]) -> Option<&'static str> {
    let known = MAGICS.iter().find(|(offset, magic, _)| {
        start
            .get(*offset..)
            .is_some_and(|bytes| bytes.starts_with(magic))
    });
    known.map(|(_, _, name)| *name)
}

/// [`recognise`] for an open file.
pub(super) fn recognise_file(file: &FileStorage) -> Result<Option<&'static str>> {
    Ok(recognise(&read(file, 0, PROBED)?))
}

/// The format of a file of which nobody has said it: raw or qcow2. Other formats are refused: a
/// guest that took one for a raw disk would destroy it.
pub(super) fn probe(file: &FileStorage) -> Result<Format> {
    match recognise_file(file)? {
        None => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some(other) => Err(Error::format(
            &file.path,
            format!(
                "is a {other} image; Ferry knows raw and qcow2: convert it, or give format=raw to use its \
                 bytes as a disk"
            ),
        )),
    }
}

/// What Ferry needs to know of a qcow2 header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Qcow2Header {
    /// Size of the disk in bytes.
    pub(super) capacity: u64,
    pub(super) cluster_size: u64,
    /// Name of the backing file as recorded.
    pub(super) backing: Option<String>,
    /// The recorded format of the backing file.
    pub(super) backing_format: Option<String>,
}

/// Largest tables, as in QEMU: 32 MiB of L1 entries, 8 MiB of refcount table.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Why an image with one of these incompatible features can't be used, by bit.
const INCOMPATIBLE: [&str; 5] = [
    "was not closed properly and its reference counts may be wrong (dirty); repair it with `qemu-img \
     check -r all`",
    "is marked as corrupt; try to repair it with `qemu-img check -r all`",
    "keeps its data in an external data file, which is not supported; convert it with `qemu-img convert`",
    "is compressed with another method than deflate, which is not supported; convert it with `qemu-img \
     convert`",
    "has extended L2 entries, which are not supported; convert it with `qemu-img convert`",
];

impl Qcow2Header {
    /// Reads and checks the header, and that the tables it points to are in the file.
    pub(super) fn read(file: &FileStorage) -> Result<Self> {
        let broken =
            |reason: String| Error::format(&file.path, format!("broken qcow2 image: {reason}"));
        let unusable =
            |reason: &str| Error::format(&file.path, format!("the qcow2 image {reason}"));

        let start = read(file, 0, 104)?;
        if !start.starts_with(QCOW2_MAGIC) {
            return Err(Error::format(
                &file.path,
                "not a qcow2 image; give format=raw for a raw one",
            ));
        }
        let u32_at = |at: usize| be32(&start, at);
        let u64_at = |at: usize| be64(&start, at);
        let version = u32_at(4);
        if version != 2 && version != 3 {
            return Err(unusable(&format!(
                "has version {version}; 2 and 3 are supported"
            )));
        }
        let (features, header_len) = if version == 3 {
            (u64_at(72), u32_at(100))
        } else {
            (0, 72)
        };
        if let Some(bit) = (0..64).find(|bit| features & (1 << bit) != 0) {
            return Err(match INCOMPATIBLE.get(bit) {
                Some(reason) => unusable(reason),
                None => unusable(&format!("needs feature {bit}, which is not known")),
            });
        }
        match u32_at(32) {
            0 => {}
            _ => return Err(unusable("is encrypted, which is not supported")),
        }
        let cluster_bits = u32_at(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(broken(format!(
                "clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are valid"
            )));
        }
        let cluster_size = 1u64 << cluster_bits;
        if version == 3 && (header_len < 104 || u64::from(header_len) > cluster_size) {
            return Err(broken(format!("a header of {header_len} bytes")));
        }
        let capacity = u64_at(24);
        if !capacity.is_multiple_of(512) {
            return Err(unusable(&format!(
                "has a disk of {capacity} bytes, not a multiple of 512"
            )));
        }

        // L1: every entry covers a cluster full of L2 entries of 8 bytes.
        let (l1_entries, l1_offset) = (u64::from(u32_at(36)), u64_at(40));
        let needed = capacity.div_ceil(cluster_size << (cluster_bits - 3));
        if l1_entries < needed || l1_entries * 8 > MAX_L1_BYTES {
            return Err(broken(format!(
                "an L1 table of {l1_entries} entries for a disk of {capacity} bytes (at least {needed})"
            )));
        }
        let (table_offset, table_clusters) = (u64_at(48), u64::from(u32_at(56)));
        let table_bytes = table_clusters * cluster_size;
        if table_bytes == 0 || table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(broken(format!(
                "a refcount table of {table_clusters} clusters"
            )));
        }
        check_table(
            file,
            "the L1 table",
            l1_offset,
            l1_entries * 8,
            l1_entries * 8,
            cluster_size,
        )?;
        // Its last cluster need not be there: what the file does not have is zero.
        check_table(
            file,
            "the refcount table",
            table_offset,
            table_bytes,
            8,
            cluster_size,
        )?;

        let (backing, backing_format) = match u64_at(8) {
            0 => (None, None),
            at => {
                let len = u32_at(16);
                let end = at.saturating_add(u64::from(len));
                if len > 1023 || end > cluster_size {
                    return Err(broken(format!(
                        "the backing file's name at {at}, {len} bytes"
                    )));
                }
                let name = String::from_utf8(read(file, at, len as usize)?)
                    .map_err(|_| broken("the backing file's name is not UTF-8".to_owned()))?;
                // QEMU leaves extensions out in version 2 unless there is room before the name.
                (
                    Some(name),
                    backing_format(file, u64::from(header_len), at.min(cluster_size))?,
                )
            }
        };
        Ok(Qcow2Header {
            capacity,
            cluster_size,
            backing,
            backing_format,
        })
    }
}

/// Looks for the backing format among the header extensions between `at` and `end`.
fn backing_format(file: &FileStorage, mut at: u64, end: u64) -> Result<Option<String>> {
    while at.saturating_add(8) <= end {
        let head = read(file, at, 8)?;
        let (kind, len) = (be32(&head, 0), u64::from(be32(&head, 4)));
        at = at.saturating_add(8);
        if kind == 0 || at.saturating_add(len) > end {
            break;
        }
        if kind == BACKING_FORMAT {
            let name = String::from_utf8_lossy(&read(file, at, len.min(64) as usize)?).into_owned();
            return Ok(Some(name));
        }
        at = at.saturating_add(len.next_multiple_of(8));
    }
    Ok(None)
}

/// Checks that a table of `bytes` at `offset` begins at a cluster, that the file has `present`
/// bytes of it, and that what it points to is in the file.
fn check_table(
    file: &FileStorage,
    name: &str,
    offset: u64,
    bytes: u64,
    present: u64,
    cluster_size: u64,
) -> Result<()> {
    let size = file.size();
    let truncated = |what: &str, at: u64| {
        let reason = format!(
            "broken qcow2 image: {what} is at {at}, but the file ends at {size}; was it truncated?"
        );
        Error::format(&file.path, reason)
    };
    if bytes == 0 {
        return Ok(());
    }
    if !offset.is_multiple_of(cluster_size) || offset == 0 {
        return Err(Error::format(
            &file.path,
            format!("broken qcow2 image: {name} at offset {offset}"),
        ));
    }
    if offset.saturating_add(present) > size {
        return Err(truncated(name, offset));
    }
    let entries = read(file, offset, bytes as usize)?;
    for entry in entries.chunks_exact(8) {
        let target = be64(entry, 0) & OFFSET_MASK;
        if target >= size {
            return Err(truncated(&format!("a table that {name} points to"), target));
        }
    }
    Ok(())
}

/// Reads a piece whose length has been checked; beyond the end of the file it is zero.
fn read(file: &FileStorage, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let io = |source| Error::Io {
        path: file.path.clone(),
        op: "read",
        offset,
        len: len as u64,
        source,
    };
    // With O_DIRECT this goes through an aligned buffer.
    StorageExt::read(file, bytes.as_mut_slice(), offset).map_err(io)?;
    Ok(bytes)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let piece = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u32::from_be_bytes(piece.copied().unwrap_or_default())
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    let piece = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u64::from_be_bytes(piece.copied().unwrap_or_default())
}
