//! A [`HostFile`] as imago's storage.
//!
//! imago comes with a file driver of its own. This one differs where a disk of a running guest
//! needs it: `fdatasync` does not stop all other requests to the file, nothing is written to find
//! out the alignment that `O_DIRECT` needs, and lists of more buffers than a system call takes
//! are split.

// imago's trait has unsafe methods: their callers promise aligned requests. Nothing here relies
// on that for memory safety; the kernel refuses what is not aligned.
#![allow(unsafe_code)]

use std::fmt::{self, Display, Formatter};
use std::io;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use super::dirty;
use super::file::HostFile;

/// A shared handle of a file.
#[derive(Clone, Debug)]
pub(super) struct FileStorage(pub(super) Arc<HostFile>);

impl Deref for FileStorage {
    type Target = HostFile;

    fn deref(&self) -> &HostFile {
        &self.0
    }
}

impl Display for FileStorage {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.path.display().fmt(f)
    }
}

impl Storage for FileStorage {
    fn mem_align(&self) -> usize {
        self.0.align.memory
    }

    fn req_align(&self) -> usize {
        self.0.align.request
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.size())
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.0.path.clone())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut bufs = bufv.into_inner();
        self.0.read(&mut bufs, offset)?;
        if self.0.hides_dirty() {
            dirty::hide(&mut bufs, offset);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.0.write(&bufv.into_inner(), offset)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.zero(offset, length)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.zero(offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.punch_hole(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        // Nothing is buffered here.
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }
}
