//! The header of a qcow2 image, checked before anything believes it.

use imago::StorageExt;

use super::probe::QCOW2_MAGIC;
use super::storage::FileStorage;
use super::{Error, Result};

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

/// Where something is in the file, in an entry of a table.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Why an image with one of these incompatible features can't be used, by bit from 1 on.
const INCOMPATIBLE: [&str; 4] = [
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
        // The dirty bit is looked at when the image is locked: see `dirty`.
        if let Some(bit) = (1..64).find(|bit| features & (1 << bit) != 0) {
            return Err(match INCOMPATIBLE.get(bit - 1) {
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
    if bytes == 0 {
        return Ok(());
    }
    if !offset.is_multiple_of(cluster_size) || offset == 0 {
        let reason = format!("broken qcow2 image: {name} at offset {offset}");
        return Err(Error::format(&file.path, reason));
    }
    let entries = read(file, offset, bytes as usize)?;
    // After the entries: a process that still writes the image makes the file longer first.
    let size = file
        .refresh_size()
        .map_err(|source| Error::whole(&file.path, "ask for the file's size", source))?;
    let truncated = |what: &str, at: u64| {
        let reason = format!(
            "broken qcow2 image: {what} is at {at}, but the file ends at {size}; was it truncated?"
        );
        Err(Error::format(&file.path, reason))
    };
    if offset.saturating_add(present) > size {
        return truncated(name, offset);
    }
    let targets = entries
        .chunks_exact(8)
        .map(|entry| be64(entry, 0) & OFFSET_MASK);
    match targets.max().filter(|target| *target >= size) {
        Some(target) => truncated(&format!("a table that {name} points to"), target),
        None => Ok(()),
    }
}

/// Where the last cluster in use begins, if the file ends before: it was truncated, or the host
/// stopped before all was on its disk. The lost data reads as zeroes. Only for images with
/// reference counts of 16 bits, which are the usual ones, and whose header has been checked.
pub(super) fn lost_cluster(file: &FileStorage) -> Result<Option<u64>> {
    let start = read(file, 0, 104)?;
    let cluster_size = 1u64 << be32(&start, 20).min(21);
    let table_bytes = u64::from(be32(&start, 56)) * cluster_size;
    if (be32(&start, 4) == 3 && be32(&start, 96) != 4) || table_bytes > MAX_REFCOUNT_TABLE_BYTES {
        return Ok(None);
    }
    let table = read(file, be64(&start, 48), table_bytes as usize)?;
    let used = |entry: &[u8]| be64(entry, 0) & OFFSET_MASK != 0;
    let Some(last) = table.chunks_exact(8).rposition(used) else {
        return Ok(None);
    };
    let block = be64(&table, last * 8) & OFFSET_MASK;
    let counts = read(file, block, cluster_size as usize)?;
    let counts = counts.chunks_exact(2);
    let per_block = counts.len() as u64;
    let Some(cluster) = counts.into_iter().rposition(|count| count != [0, 0]) else {
        return Ok(None);
    };
    let offset = (last as u64 * per_block + cluster as u64).saturating_mul(cluster_size);
    Ok(Some(offset).filter(|offset| *offset >= file.size()))
}

/// Reads a piece whose length has been checked; beyond the end of the file it is zero.
pub(super) fn read(file: &FileStorage, offset: u64, len: usize) -> Result<Vec<u8>> {
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

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    let piece = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u16::from_be_bytes(piece.copied().unwrap_or_default())
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    let piece = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u32::from_be_bytes(piece.copied().unwrap_or_default())
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    let piece = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u64::from_be_bytes(piece.copied().unwrap_or_default())
}
