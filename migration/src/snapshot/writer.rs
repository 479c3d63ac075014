//! A snapshot's file while it is written: under another name until it is whole.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use tempfile::NamedTempFile;

use super::error::SnapshotError;
use super::format::{CHUNK_PAGES, Description, ENTRY_LEN, Header, encode_entry, page_at};
use crate::bitmap::{PageBitmap, PageRun};
use crate::layout::{Layout, PAGE_SIZE};
use crate::message::{AddressRun, BlobChunk, Hello};
use crate::placement::Incomplete;
use crate::section::Section;

/// With this much that may not be on the disk yet, what was written is synchronized before it is
/// acknowledged: so the bandwidth that the source measures is the disk's, and little is left for
/// the time in which the guest is stopped.
const MAX_UNSYNCED: u64 = 16 << 20;

/// How many entries of the table are written at once.
const ENTRIES: u64 = 512;

/// A snapshot that is not whole yet. Dropped before it is, its file is gone.
pub(super) struct Writer {
    path: PathBuf,
    file: NamedTempFile,
    layout: Layout,
    header: Header,
    hello: Vec<u8>,
    /// Of each blob its length, and the checksum of what has come.
    blobs: Vec<(u64, crc32fast::Hasher)>,
    /// Pages that never came.
    missing: PageBitmap,
    /// Pages that are not zero.
    data: PageBitmap,
    /// Pages that the guest wrote to while they were sent: they come again.
    suspect: PageBitmap,
    /// Of the pages in `data`.
    crcs: Vec<u32>,
    unsynced: u64,
}

impl Writer {
    /// Begins a snapshot that is to be at `path`, of the guest that `hello`, decoded from `body`,
    /// offers. What is at `path` is not touched until [`publish`](Self::publish).
    pub(super) fn create(path: &Path, hello: &Hello, body: &[u8]) -> Result<Self, SnapshotError> {
        if !hello.offer.disks.is_empty() {
            return Err(SnapshotError::Unfit {
                path: path.to_owned(),
                reason: "the contents of disks can't travel in a file: migrate without -b and -i, \
                         and keep the images unchanged until the guest is loaded"
                    .to_owned(),
            });
        }
        let failed = |error| SnapshotError::Create {
            path: path.to_owned(),
            error,
        };
        let path = match path.canonicalize() {
            Ok(target) if !target.is_file() => {
                return Err(SnapshotError::NotAFile(path.to_owned()));
            }
            // Where a symbolic link leads: it shall stay one.
            Ok(target) => target,
            Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(error) => return Err(failed(error)),
        };
        let mut name = OsString::from(".");
        name.push(
            path.file_name()
                .ok_or_else(|| SnapshotError::NotAFile(path.clone()))?,
        );
        name.push(".");
        // It holds the guest's memory: for nobody else to read.
        let file = tempfile::Builder::new()
            .prefix(&name)
            .suffix(".tmp")
            .tempfile_in(directory(&path))
            .map_err(failed)?;
        let layout = hello.offer.layout.clone();
        let pages = layout.pages();
        let lengths = hello.offer.blobs.iter().map(|blob| blob.len);
        Ok(Self {
            path,
            file,
            header: Header {
                ram: layout.bytes(),
                blobs: lengths.clone().sum(),
                ..Header::default()
            },
            layout,
            hello: body.to_vec(),
            blobs: lengths.map(|len| (len, crc32fast::Hasher::new())).collect(),
            missing: PageBitmap::full(pages),
            data: PageBitmap::new(pages),
            suspect: PageBitmap::new(pages),
            crcs: vec![0; pages as usize],
            unsynced: 0,
        })
    }

    /// Writes a piece of a blob.
    pub(super) fn blob(&mut self, chunk: BlobChunk, data: &[u8]) -> Result<(), SnapshotError> {
        let index = usize::from(chunk.index);
        let before: u64 = self.blobs.iter().take(index).map(|(len, _)| len).sum();
        if let Some((_, hasher)) = self.blobs.get_mut(index) {
            hasher.update(data);
        }
        self.write(data, self.header.blobs_at() + before + chunk.offset)
    }

    /// Writes pages: `data` has them all, `crcs` is the source's checksum of each.
    pub(super) fn pages(
        &mut self,
        runs: &[AddressRun],
        crcs: &[u32],
        mut data: &[u8],
    ) -> Result<(), SnapshotError> {
        let mut crcs = crcs.iter();
        for &run in runs {
            let run = self.resolve(run)?;
            let (now, later) = data
                .split_at_checked((run.count * PAGE_SIZE) as usize)
                .unwrap_or((data, &[]));
            data = later;
            self.write(now, page_at(run.first))?;
            let pages = now.chunks(PAGE_SIZE as usize);
            for ((page, data), &crc) in (run.first..run.end()).zip(pages).zip(crcs.by_ref()) {
                if crc32fast::hash(data) == crc {
                    self.suspect.clear(page);
                } else {
                    self.suspect.set(page);
                }
                if let Some(known) = self.crcs.get_mut(page as usize) {
                    *known = crc;
                }
            }
            self.missing.clear_range(run.first, run.count);
            self.data.set_range(run.first, run.count);
        }
        Ok(())
    }

    /// Makes runs of pages zero: holes.
    pub(super) fn zero(&mut self, runs: &[AddressRun]) -> Result<(), SnapshotError> {
        for &run in runs {
            let run = self.resolve(run)?;
            for written in self.data.runs(run.first, run.count, u64::MAX) {
                // Where that can't be done the data stays, unused: the table knows better.
                let _ = fallocate(
                    self.file.as_file(),
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    page_at(written.first),
                    written.count * PAGE_SIZE,
                );
            }
            self.data.clear_range(run.first, run.count);
            self.suspect.clear_range(run.first, run.count);
            self.missing.clear_range(run.first, run.count);
        }
        Ok(())
    }

    /// Before what came is acknowledged; see [`MAX_UNSYNCED`].
    pub(super) fn settle(&mut self) -> Result<(), SnapshotError> {
        if self.unsynced >= MAX_UNSYNCED {
            self.sync()?;
        }
        Ok(())
    }

    /// Whether every page has come, with the data that its source meant.
    pub(super) fn check_complete(&self) -> Result<(), Incomplete> {
        let first = |set: &PageBitmap| {
            let page = set.next_set(0)?;
            let run = self.layout.addresses(PageRun {
                first: page,
                count: 1,
            })?;
            Some((set.count(), run.address))
        };
        if let Some((count, address)) = first(&self.missing) {
            return Err(Incomplete::Missing { count, address });
        }
        if let Some((count, address)) = first(&self.suspect) {
            return Err(Incomplete::Damaged { count, address });
        }
        Ok(())
    }

    /// Writes all but the header; it is on the disk when this returns.
    pub(super) fn finish(&mut self, sections: Vec<Section>) -> Result<(), SnapshotError> {
        let mut entries = Vec::new();
        let mut at = self.header.table_at();
        for number in 0..self.header.chunks() {
            let first = number * CHUNK_PAGES;
            let end = (first + CHUNK_PAGES).min(self.layout.pages());
            let crcs = self.crcs.get(first as usize..end as usize);
            let crcs = crcs.unwrap_or_default();
            let pages = (first..end)
                .zip(crcs)
                .map(|(page, crc)| self.data.test(page).then_some(*crc));
            entries.extend(encode_entry(number, pages));
            if number % ENTRIES == ENTRIES - 1 || number + 1 == self.header.chunks() {
                self.write(&entries, at)?;
                at += entries.len() as u64;
                entries.clear();
            }
        }
        debug_assert_eq!(
            at,
            self.header.table_at() + self.header.chunks() * ENTRY_LEN as u64
        );
        let blobs = self
            .blobs
            .iter()
            .map(|(_, hasher)| hasher.clone().finalize());
        let description = Description {
            hello: std::mem::take(&mut self.hello),
            blobs: blobs.collect(),
            sections,
        }
        .encode()
        .map_err(|error| self.unfit(error.to_string()))?;
        self.header.description = description.len() as u64;
        self.header.description_crc = crc32fast::hash(&description);
        self.write(&description, self.header.description_at())?;
        self.sync()
    }

    /// Writes the header and gives the file its name, in place of what had it: only from here on
    /// there is a snapshot.
    pub(super) fn publish(mut self, was_running: bool) -> Result<(), SnapshotError> {
        self.header.was_running = was_running;
        self.write(&self.header.encode(), 0)?;
        self.sync()?;
        let Self { path, file, .. } = self;
        let failed = |error| SnapshotError::Write {
            path: path.clone(),
            error,
        };
        file.persist(&path).map_err(|error| failed(error.error))?;
        // The name is to survive a crash too.
        File::open(directory(&path))
            .and_then(|directory| directory.sync_all())
            .map_err(failed)
    }

    fn resolve(&self, run: AddressRun) -> Result<PageRun, SnapshotError> {
        self.layout
            .page_run(run)
            .ok_or_else(|| self.unfit(format!("{run:?} is not within one region of RAM")))
    }

    fn unfit(&self, reason: String) -> SnapshotError {
        SnapshotError::Unfit {
            path: self.path.clone(),
            reason,
        }
    }

    fn write(&mut self, bytes: &[u8], at: u64) -> Result<(), SnapshotError> {
        self.unsynced += bytes.len() as u64;
        self.file
            .as_file()
            .write_all_at(bytes, at)
            .map_err(|error| self.failed(error))
    }

    fn sync(&mut self) -> Result<(), SnapshotError> {
        self.unsynced = 0;
        self.file
            .as_file()
            .sync_data()
            .map_err(|error| self.failed(error))
    }

    fn failed(&self, error: io::Error) -> SnapshotError {
        SnapshotError::Write {
            path: self.path.clone(),
            error,
        }
    }
}

/// The directory that a file is in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
