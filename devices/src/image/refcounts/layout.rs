//! Where the tables of a qcow2 image are.

use super::super::header::{be16, be32, be64, read};
use super::super::storage::FileStorage;
use super::{Refusal, unmendable};

/// Host clusters of the largest image that is counted: 4 TiB with the usual 64 KiB. Each takes
/// three bytes of memory meanwhile.
const MAX_CLUSTERS: u64 = 64 << 20;
/// L1 entries of the disk and all snapshots: a disk of 8 PiB with the usual clusters.
const MAX_L1_ENTRIES: u64 = 16 << 20;
const MAX_SNAPSHOTS: u32 = 65_536;

/// Header extensions that own no clusters: the backing file's format and the names of features.
const KNOWN_EXTENSIONS: [u32; 2] = [0xe279_2aca, 0x6803_f857];

/// A table, or several clusters of something else, in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    /// Bytes from the beginning of the file, a multiple of the cluster size.
    pub(super) offset: u64,
    /// In bytes, at least 1.
    pub(super) len: u64,
}

/// What the header says, and the table of snapshots.
pub(super) struct Layout {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Clusters that the file has, the last one perhaps in part.
    pub(super) clusters: u64,
    pub(super) refcount_table: Area,
    /// None if the disk has no bytes.
    pub(super) l1: Option<Area>,
    /// The L1 tables of internal snapshots.
    pub(super) snapshot_l1: Vec<Area>,
    /// The table of snapshots.
    snapshots: Option<Area>,
}

impl Layout {
    pub(super) fn read(file: &FileStorage) -> Result<Self, Refusal> {
        let start = read(file, 0, 104)?;
        let version = be32(&start, 4);
        let cluster_bits = be32(&start, 20);
        if !(9..=21).contains(&cluster_bits) {
            return unmendable(format!("clusters of 2^{cluster_bits} bytes"));
        }
        let cluster_size = 1u64 << cluster_bits;
        if version >= 3 && be32(&start, 96) != 4 {
            return unmendable("its reference counts are not of 16 bits");
        }
        let clusters = file.size().div_ceil(cluster_size);
        if clusters > MAX_CLUSTERS {
            return unmendable(format!(
                "{clusters} clusters; at most {MAX_CLUSTERS} are counted"
            ));
        }
        let header_len = match version {
            2 => 72,
            _ => u64::from(be32(&start, 100)),
        };
        let end = match be64(&start, 8) {
            0 => cluster_size,
            name => name.min(cluster_size),
        };
        check_extensions(file, header_len, end)?;

        let mut layout = Layout {
            version,
            cluster_bits,
            clusters,
            refcount_table: Area {
                offset: be64(&start, 48),
                len: u64::from(be32(&start, 56)) * cluster_size,
            },
            l1: l1(be64(&start, 40), be32(&start, 36)),
            snapshot_l1: Vec::new(),
            snapshots: None,
        };
        layout.read_snapshots(file, be64(&start, 64), be32(&start, 60))?;
        let tables = layout.snapshot_l1.iter().chain(&layout.l1);
        let entries: u64 = tables.map(|table| table.len / 8).sum();
        if entries > MAX_L1_ENTRIES {
            return unmendable(format!(
                "{entries} L1 entries; at most {MAX_L1_ENTRIES} are counted"
            ));
        }
        for area in layout.fixed() {
            layout.check(area)?;
        }
        Ok(layout)
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Everything that belongs to the image once and for itself, without the refcount blocks.
    pub(super) fn fixed(&self) -> impl Iterator<Item = Area> {
        let header = Area {
            offset: 0,
            len: self.cluster_size(),
        };
        [header, self.refcount_table]
            .into_iter()
            .chain(self.l1)
            .chain(self.snapshots)
            .chain(self.snapshot_l1.iter().copied())
    }

    /// Checks that an area begins with a cluster and is in the file.
    pub(super) fn check(&self, area: Area) -> Result<(), Refusal> {
        let Area { offset, len } = area;
        if !offset.is_multiple_of(self.cluster_size()) {
            return unmendable(format!("a table at {offset}, where no cluster begins"));
        }
        let end = self.clusters * self.cluster_size();
        if offset.checked_add(len).is_none_or(|last| last > end) {
            return unmendable(format!(
                "a table of {len} bytes at {offset}, beyond the end of the file"
            ));
        }
        Ok(())
    }

    fn read_snapshots(
        &mut self,
        file: &FileStorage,
        offset: u64,
        count: u32,
    ) -> Result<(), Refusal> {
        if count == 0 {
            return Ok(());
        }
        if count > MAX_SNAPSHOTS {
            return unmendable(format!("{count} snapshots; {MAX_SNAPSHOTS} are possible"));
        }
        let mut at = offset;
        for _ in 0..count {
            if at >= file.size() {
                return unmendable(format!("a snapshot at {at}, beyond the end of the file"));
            }
            // Then come so many extra bytes, and so many of an identity and a name.
            let entry = read(file, at, 40)?;
            let more = u64::from(be32(&entry, 36))
                + u64::from(be16(&entry, 12))
                + u64::from(be16(&entry, 14));
            self.snapshot_l1
                .extend(l1(be64(&entry, 0), be32(&entry, 8)));
            at = at.saturating_add((40 + more).next_multiple_of(8));
        }
        self.snapshots = Some(Area {
            offset,
            len: at.saturating_sub(offset),
        });
        Ok(())
    }
}

fn l1(offset: u64, entries: u32) -> Option<Area> {
    let len = u64::from(entries) * 8;
    (len > 0).then_some(Area { offset, len })
}

/// Some extensions have clusters of their own (bitmaps, encryption), and unknown ones may.
fn check_extensions(file: &FileStorage, mut at: u64, end: u64) -> Result<(), Refusal> {
    while at.saturating_add(8) <= end {
        let head = read(file, at, 8)?;
        let (kind, len) = (be32(&head, 0), u64::from(be32(&head, 4)));
        if kind == 0 {
            break;
        }
        at = at.saturating_add(8).saturating_add(len);
        if !KNOWN_EXTENSIONS.contains(&kind) || at > end {
            return unmendable(format!(
                "the header extension {kind:#x} of {len} bytes is not known"
            ));
        }
        at = at.next_multiple_of(8);
    }
    Ok(())
}
