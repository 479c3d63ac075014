//! The refcount blocks of a qcow2 image, and what is wrong in them.

use imago::StorageExt;

use super::super::Error;
use super::super::header::{OFFSET_MASK, be16, read};
use super::super::storage::FileStorage;
use super::layout::{Area, Layout};
use super::references::{MAX_TABLE_BYTES, References, Usage, entries};
use super::{Refusal, unmendable};

/// A block that has wrong counts.
struct Block {
    /// Where it is in the file, in bytes.
    offset: u64,
    /// The cluster of its first count.
    first: u64,
}

/// The blocks that have wrong counts.
pub(super) struct Blocks {
    size: u64,
    too_low: Vec<Block>,
    too_high: Vec<Block>,
    /// How many counts are too low.
    pub(super) raised: u64,
    /// How many are too high.
    pub(super) lowered: u64,
}

impl Blocks {
    /// Counts the blocks themselves, and compares what is in them with the counts.
    pub(super) fn compare(
        file: &FileStorage,
        layout: &Layout,
        references: &mut References,
    ) -> Result<Self, Refusal> {
        let size = layout.cluster_size();
        let per_block = size / 2;
        let table = layout.refcount_table;
        let mut blocks = Vec::new();
        for (number, entry) in entries(&read(file, table.offset, table.len as usize)?) {
            let area = Area {
                offset: entry & OFFSET_MASK,
                len: size,
            };
            if entry & !OFFSET_MASK != 0 {
                return unmendable(format!(
                    "the refcount table's entry {entry:#x} has bits that are not known"
                ));
            }
            layout.check(area)?;
            references.add(Usage::Fixed, area, 1)?;
            blocks.push(Block {
                offset: area.offset,
                first: number as u64 * per_block,
            });
        }
        if blocks.len() as u64 * size > MAX_TABLE_BYTES {
            return unmendable(format!("{} refcount blocks", blocks.len()));
        }

        // A new block would have to go where nothing is, and be counted by one.
        let mut covered = 0;
        let missing = |from, to| match references.first_used(from, to) {
            None => Ok(()),
            Some(cluster) => unmendable(format!(
                "there is no refcount block for the cluster at {}",
                cluster * size
            )),
        };
        for block in &blocks {
            missing(covered, block.first)?;
            covered = block.first + per_block;
        }
        missing(covered, u64::MAX)?;

        let mut found = Blocks {
            size,
            too_low: Vec::new(),
            too_high: Vec::new(),
            raised: 0,
            lowered: 0,
        };
        for Block { offset, first } in blocks {
            let counts = read(file, offset, size as usize)?;
            let (mut low, mut high) = (0, 0);
            for (cluster, count) in (first..).zip(counts.chunks_exact(2)) {
                let (is, wanted) = (be16(count, 0), references.of(cluster));
                low += u64::from(is < wanted);
                high += u64::from(is > wanted);
            }
            if low > 0 {
                found.too_low.push(Block { offset, first });
            }
            if high > 0 {
                found.too_high.push(Block { offset, first });
            }
            found.raised += low;
            found.lowered += high;
        }
        Ok(found)
    }

    /// Raises the counts that are too low.
    pub(super) fn raise(&self, file: &FileStorage, references: &References) -> Result<(), Error> {
        self.write(file, &self.too_low, |cluster, count| {
            count.max(references.of(cluster))
        })
    }

    /// Lowers the counts that are too high.
    pub(super) fn lower(&self, file: &FileStorage, references: &References) -> Result<(), Error> {
        self.write(file, &self.too_high, |cluster, count| {
            count.min(references.of(cluster))
        })
    }

    fn write(
        &self,
        file: &FileStorage,
        blocks: &[Block],
        change: impl Fn(u64, u16) -> u16,
    ) -> Result<(), Error> {
        for block in blocks {
            let mut counts = read(file, block.offset, self.size as usize)?;
            for (cluster, count) in (block.first..).zip(counts.chunks_exact_mut(2)) {
                let changed = change(cluster, be16(count, 0));
                count.copy_from_slice(&changed.to_be_bytes());
            }
            StorageExt::write(file, counts.as_slice(), block.offset)
                .map_err(|source| Error::whole(&file.path, "repair reference counts", source))?;
        }
        Ok(())
    }
}
