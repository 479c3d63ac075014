//! The flag of L1 and L2 entries that nobody else refers to a cluster (COPIED).
//!
//! Only the disk's own tables matter: those that only a snapshot has are gone through anyway when
//! the disk goes back to it.

use imago::StorageExt;

use super::super::Error;
use super::super::header::{OFFSET_MASK, be64, read};
use super::super::storage::FileStorage;
use super::layout::{Area, Layout};
use super::references::{COMPRESSED, COPIED, References, entries};

/// Which entries a table has.
#[derive(Clone, Copy)]
enum Level {
    L1,
    L2,
}

impl Level {
    /// An entry as it has to be.
    fn right(self, entry: u64, references: &References) -> u64 {
        let offset = entry & OFFSET_MASK;
        match self {
            Level::L2 if entry & COMPRESSED != 0 => entry & !COPIED,
            _ if offset == 0 => entry,
            _ if references.at(offset) == 1 => entry | COPIED,
            _ => entry & !COPIED,
        }
    }
}

/// The tables that have wrong flags.
pub(super) struct Flags {
    tables: Vec<(Level, Area)>,
    /// In how many entries.
    pub(super) wrong: u64,
}

impl Flags {
    /// Compares the flags with the counts.
    pub(super) fn compare(
        file: &FileStorage,
        layout: &Layout,
        references: &References,
    ) -> Result<Self, Error> {
        let mut flags = Flags {
            tables: Vec::new(),
            wrong: 0,
        };
        let Some(area) = layout.l1 else {
            return Ok(flags);
        };
        let l1 = read(file, area.offset, area.len as usize)?;
        flags.add(Level::L1, area, &l1, references);
        let mut tables: Vec<u64> = entries(&l1).map(|(_, entry)| entry & OFFSET_MASK).collect();
        tables.sort_unstable();
        tables.dedup();
        for offset in tables.into_iter().filter(|offset| *offset != 0) {
            let len = layout.cluster_size();
            let table = read(file, offset, len as usize)?;
            flags.add(Level::L2, Area { offset, len }, &table, references);
        }
        Ok(flags)
    }

    fn add(&mut self, level: Level, area: Area, table: &[u8], references: &References) {
        let wrong = |(_, entry): &(usize, u64)| level.right(*entry, references) != *entry;
        let wrong = entries(table).filter(wrong).count() as u64;
        if wrong > 0 {
            self.tables.push((level, area));
        }
        self.wrong += wrong;
    }

    /// Puts them right.
    pub(super) fn write(&self, file: &FileStorage, references: &References) -> Result<(), Error> {
        for (level, area) in &self.tables {
            let mut table = read(file, area.offset, area.len as usize)?;
            for entry in table.chunks_exact_mut(8) {
                let right = level.right(be64(entry, 0), references);
                entry.copy_from_slice(&right.to_be_bytes());
            }
            StorageExt::write(file, table.as_slice(), area.offset)
                .map_err(|source| Error::whole(&file.path, "repair the image's tables", source))?;
        }
        Ok(())
    }
}
