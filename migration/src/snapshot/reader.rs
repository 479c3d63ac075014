//! A snapshot's file, to be loaded. Nothing in it is used before its checksum was right, and
//! nothing is allocated on its word beyond fixed limits. It is read, not mapped: a file that
//! shrinks meanwhile is an error, not a signal.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::error::{SnapshotError, looks_like};
use super::format::{
    CHUNK_PAGES, Description, ENTRY_LEN, HEADER_LEN, Header, HeaderError, decode_entry, page_at,
};
use crate::bitmap::PageRun;
use crate::layout::PAGE_SIZE;
use crate::message::Hello;
use crate::section::Section;

/// A snapshot whose header and description are whole.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    file: File,
    header: Header,
    hello: Hello,
    description: Description,
}

/// Pages that are alike: all zero, or with data, whose checksums are these.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pages {
    Zero(PageRun),
    Data(PageRun, Vec<u32>),
}

impl Snapshot {
    /// Opens the file and checks all of it but RAM, its table and the blobs, which are checked as
    /// they are read.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let failed = |error| SnapshotError::Read {
            path: path.to_owned(),
            error,
        };
        let file = File::options()
            .read(true)
            // A named pipe would otherwise wait for somebody to write.
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(SnapshotError::NotAFile(path.to_owned()));
        }
        let len = metadata.len();
        let mut bytes = [0; HEADER_LEN as usize];
        let there = len.min(HEADER_LEN) as usize;
        let start = bytes.get_mut(..there).unwrap_or_default();
        file.read_exact_at(start, 0).map_err(failed)?;
        let header = Header::decode(&bytes).map_err(|error| match error {
            HeaderError::Foreign => SnapshotError::Foreign {
                path: path.to_owned(),
                looks: looks_like(bytes.get(..there).unwrap_or_default()),
            },
            HeaderError::Version(found) => SnapshotError::Version {
                path: path.to_owned(),
                found,
            },
            HeaderError::Damaged if len < HEADER_LEN => SnapshotError::Length {
                path: path.to_owned(),
                len,
                stated: HEADER_LEN,
            },
            HeaderError::Damaged => corrupted(path, "its header doesn't match its checksum"),
        })?;
        if len != header.file_len() {
            return Err(SnapshotError::Length {
                path: path.to_owned(),
                len,
                stated: header.file_len(),
            });
        }
        let mut bytes = vec![0; header.description as usize];
        file.read_exact_at(&mut bytes, header.description_at())
            .map_err(failed)?;
        if crc32fast::hash(&bytes) != header.description_crc {
            return Err(corrupted(
                path,
                "its description doesn't match its checksum",
            ));
        }
        let (description, hello) = Description::decode(&bytes)
            .map_err(|error| corrupted(path, &format!("its description is malformed: {error}")))?;
        let offer = &hello.offer;
        let blobs: u64 = offer.blobs.iter().map(|blob| blob.len).sum();
        if offer.layout.bytes() != header.ram || blobs != header.blobs || !offer.disks.is_empty() {
            return Err(corrupted(
                path,
                "its header and its description contradict each other",
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            header,
            hello,
            description,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest ran when it was saved.
    pub fn was_running(&self) -> bool {
        self.header.was_running
    }

    pub(super) fn hello(&self) -> &Hello {
        &self.hello
    }

    pub(super) fn sections(&self) -> &[Section] {
        &self.description.sections
    }

    /// How many times [`pages`](Self::pages) is to be asked.
    pub(super) fn chunks(&self) -> u64 {
        self.header.chunks()
    }

    /// What the pages of chunk `number` are: ascending, all of them, each run within one region.
    pub(super) fn pages(&self, number: u64) -> Result<Vec<Pages>, SnapshotError> {
        let mut entry = [0; ENTRY_LEN];
        let at = self.header.table_at() + number * ENTRY_LEN as u64;
        self.read(&mut entry, at)?;
        let crcs = decode_entry(number, &entry).ok_or_else(|| {
            corrupted(
                &self.path,
                &format!("entry {number} of its table doesn't match its checksum"),
            )
        })?;
        let layout = &self.hello.offer.layout;
        let mut found: Vec<Pages> = Vec::new();
        let first = number * CHUNK_PAGES;
        for (page, crc) in (first..layout.pages()).zip(crcs) {
            let here = PageRun {
                first: page,
                count: 1,
            };
            let begins = layout.begins_region(page);
            match (found.last_mut(), crc) {
                (Some(Pages::Zero(run)), None) if !begins => run.count += 1,
                (Some(Pages::Data(run, crcs)), Some(crc)) if !begins => {
                    run.count += 1;
                    crcs.push(crc);
                }
                (_, None) => found.push(Pages::Zero(here)),
                (_, Some(crc)) => found.push(Pages::Data(here, vec![crc])),
            }
        }
        Ok(found)
    }

    /// Reads the data of a run, which is at most a chunk, into `data`, and checks it.
    pub(super) fn read_pages(
        &self,
        run: PageRun,
        crcs: &[u32],
        data: &mut Vec<u8>,
    ) -> Result<(), SnapshotError> {
        data.resize((run.count * PAGE_SIZE) as usize, 0);
        self.read(data, page_at(run.first))?;
        let pages = data.chunks(PAGE_SIZE as usize).zip(crcs);
        for (page, (data, crc)) in (run.first..).zip(pages) {
            if crc32fast::hash(data) != *crc {
                let address = self.hello.offer.layout.addresses(PageRun {
                    first: page,
                    count: 1,
                });
                let address = address.map_or(0, |run| run.address);
                return Err(corrupted(
                    &self.path,
                    &format!("the page of memory at {address:#x} doesn't match its checksum"),
                ));
            }
        }
        Ok(())
    }

    /// Calls `piece` with each piece of the blob of that index, of at most `longest` bytes, and
    /// its offset; with one empty piece for an empty blob. With the last one all is checked.
    pub(super) fn blob<E: From<SnapshotError>>(
        &self,
        index: usize,
        longest: usize,
        mut piece: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let blobs = &self.hello.offer.blobs;
        let before: u64 = blobs.iter().take(index).map(|blob| blob.len).sum();
        let (Some(blob), Some(crc)) = (blobs.get(index), self.description.blobs.get(index)) else {
            return Ok(());
        };
        let mut hasher = crc32fast::Hasher::new();
        let mut data = Vec::new();
        let mut offset = 0;
        loop {
            data.resize((blob.len - offset).min(longest as u64) as usize, 0);
            self.read(&mut data, self.header.blobs_at() + before + offset)?;
            hasher.update(&data);
            let end = offset + data.len() as u64;
            if end == blob.len && hasher.clone().finalize() != *crc {
                let what = format!("the file {:?} in it doesn't match its checksum", blob.name);
                return Err(corrupted(&self.path, &what).into());
            }
            piece(offset, &data)?;
            offset = end;
            if offset == blob.len {
                return Ok(());
            }
        }
    }

    fn read(&self, data: &mut [u8], at: u64) -> Result<(), SnapshotError> {
        self.file
            .read_exact_at(data, at)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    corrupted(&self.path, "it was cut off while it was being read")
                }
                _ => SnapshotError::Read {
                    path: self.path.clone(),
                    error,
                },
            })
    }
}

fn corrupted(path: &Path, what: &str) -> SnapshotError {
    SnapshotError::Corrupted {
        path: path.to_owned(),
        what: what.to_owned(),
    }
}
