//! How often each cluster of a qcow2 image is referred to.

use std::collections::BTreeMap;
use std::fmt;

use super::super::header::{OFFSET_MASK, be64, read};
use super::super::storage::FileStorage;
use super::layout::{Area, Layout};
use super::{Refusal, unmendable};

/// Nobody else refers to the cluster: it is written in place.
pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
/// In an L2 entry from version 3 on: reads as zeroes, though it may have a cluster.
const ZERO: u64 = 1;

/// The most L2 tables, and bytes of them, that are read: 32 TiB of disk with the usual clusters.
/// A file with holes could promise any amount.
const MAX_L2_TABLES: usize = 1 << 20;
pub(super) const MAX_TABLE_BYTES: u64 = 4 << 30;

/// What a cluster is used for: only one thing at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Usage {
    /// The header, and tables that there is one reference to.
    Fixed,
    L2,
    Data,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Usage::Fixed => "metadata",
            Usage::L2 => "an L2 table",
            Usage::Data => "data",
        })
    }
}

/// The counts as they have to be.
pub(super) struct References {
    cluster_bits: u32,
    counts: Vec<u16>,
    /// By cluster; none where nothing refers to it.
    usages: Vec<Option<Usage>>,
}

impl References {
    /// Counts everything but the refcount blocks.
    pub(super) fn count(file: &FileStorage, layout: &Layout) -> Result<Self, Refusal> {
        let mut references = References {
            cluster_bits: layout.cluster_bits,
            counts: vec![0; layout.clusters as usize],
            usages: vec![None; layout.clusters as usize],
        };
        for area in layout.fixed() {
            references.add(Usage::Fixed, area, 1)?;
        }
        // Each with how many L1 entries point to it, of the disk and its snapshots.
        let mut tables: BTreeMap<u64, u16> = BTreeMap::new();
        for l1 in layout.snapshot_l1.iter().chain(&layout.l1) {
            for (_, entry) in entries(&read(file, l1.offset, l1.len as usize)?) {
                let Some(offset) = l2_table(entry)? else {
                    continue;
                };
                let times = tables.entry(offset).or_default();
                *times = more(*times, 1, offset)?;
                if tables.len() > MAX_L2_TABLES {
                    return unmendable(format!("more than {MAX_L2_TABLES} L2 tables"));
                }
            }
        }
        if tables.len() as u64 * layout.cluster_size() > MAX_TABLE_BYTES {
            return unmendable(format!("{} L2 tables", tables.len()));
        }
        for (offset, times) in tables {
            let table = Area {
                offset,
                len: layout.cluster_size(),
            };
            layout.check(table)?;
            references.add(Usage::L2, table, times)?;
            for (_, entry) in entries(&read(file, offset, table.len as usize)?) {
                if let Some(data) = data(entry, layout)? {
                    references.add(Usage::Data, data, times)?;
                }
            }
        }
        Ok(references)
    }

    /// Adds references to all clusters of an area.
    pub(super) fn add(&mut self, usage: Usage, area: Area, times: u16) -> Result<(), Refusal> {
        let Area { offset, len } = area;
        let end = offset.saturating_add(len.saturating_sub(1));
        for cluster in offset >> self.cluster_bits..=end >> self.cluster_bits {
            let at = usize::try_from(cluster).unwrap_or(usize::MAX);
            let offset = cluster << self.cluster_bits;
            let (Some(count), Some(here)) = (self.counts.get_mut(at), self.usages.get_mut(at))
            else {
                return unmendable(format!("{usage} at {offset}, beyond the end of the file"));
            };
            match here.replace(usage) {
                None => {}
                Some(before) if before == usage && usage != Usage::Fixed => {}
                Some(before) => {
                    return unmendable(format!(
                        "the cluster at {offset} is used twice, for {before} and for {usage}"
                    ));
                }
            }
            *count = more(*count, times, offset)?;
        }
        Ok(())
    }

    /// The count of a cluster, by its number; 0 where the file has ended.
    pub(super) fn of(&self, cluster: u64) -> u16 {
        let at = usize::try_from(cluster).unwrap_or(usize::MAX);
        self.counts.get(at).copied().unwrap_or_default()
    }

    /// The count of the cluster at `offset` bytes.
    pub(super) fn at(&self, offset: u64) -> u16 {
        self.of(offset >> self.cluster_bits)
    }

    /// The first cluster from `from` on and before `end` that has references, by number.
    pub(super) fn first_used(&self, from: u64, end: u64) -> Option<u64> {
        let end = end.min(self.counts.len() as u64);
        (from..end).find(|cluster| self.of(*cluster) > 0)
    }
}

fn more(count: u16, times: u16, offset: u64) -> Result<u16, Refusal> {
    match count.checked_add(times) {
        Some(count) => Ok(count),
        None => unmendable(format!("more than 65535 references to what is at {offset}")),
    }
}

/// The entries of a table, with their numbers.
pub(super) fn entries(table: &[u8]) -> impl Iterator<Item = (usize, u64)> {
    let entries = table.chunks_exact(8).map(|entry| be64(entry, 0));
    entries.enumerate().filter(|(_, entry)| *entry != 0)
}

/// Where the L2 table is that an L1 entry points to.
fn l2_table(entry: u64) -> Result<Option<u64>, Refusal> {
    if entry & !(OFFSET_MASK | COPIED) != 0 {
        return unmendable(format!(
            "the L1 entry {entry:#x} has bits that are not known"
        ));
    }
    Ok(Some(entry & OFFSET_MASK).filter(|offset| *offset != 0))
}

/// The bytes of the file that an L2 entry refers to.
fn data(entry: u64, layout: &Layout) -> Result<Option<Area>, Refusal> {
    if entry & COMPRESSED != 0 {
        return Ok(Some(compressed(entry, layout.cluster_bits)));
    }
    let flags = match layout.version {
        2 => COPIED,
        _ => COPIED | ZERO,
    };
    let offset = entry & OFFSET_MASK;
    if entry & !(OFFSET_MASK | flags) != 0 || !offset.is_multiple_of(layout.cluster_size()) {
        return unmendable(format!("the L2 entry {entry:#x} is not valid"));
    }
    let len = layout.cluster_size();
    Ok((offset != 0).then_some(Area { offset, len }))
}

/// Compressed data is in sectors of 512 bytes, and need not begin with one. The larger the
/// clusters, the more bits say how many sectors there are beyond the first.
fn compressed(entry: u64, cluster_bits: u32) -> Area {
    let offset_bits = 62 - (cluster_bits - 8);
    let descriptor = entry & (COMPRESSED - 1);
    let offset = descriptor & ((1 << offset_bits) - 1);
    let sectors = (descriptor >> offset_bits) + 1;
    Area {
        offset: offset & !511,
        len: sectors * 512,
    }
}
