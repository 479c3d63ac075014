//! The file or block device on the host that holds an image.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::{
    Advice, AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags, fadvise, fallocate, fdatasync,
    seek, statx,
};
use rustix::io::{Errno, preadv, pwritev, retry_on_intr};

use super::{Cache, Error, Result};

/// The most buffers that one system call takes (`IOV_MAX`).
const MAX_BUFFERS: usize = 1024;
/// The alignment for `O_DIRECT` where the kernel does not say (before Linux 6.1): a page suffices
/// for all file systems and disks that Linux knows.
const SAFE_ALIGNMENT: usize = 4096;

/// Nobody looks for a hole in data of up to this size: where a file system walks through all the
/// data that follows to find one, a copy piece by piece would take the square of the time.
const SHORT: u64 = 4 << 20;

/// An open file. All positions are given with the request, so that threads do not disturb each
/// other.
#[derive(Debug)]
pub(super) struct HostFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) align: Alignment,
    /// The file's length in bytes. Only this process may change it while the image is locked.
    size: AtomicU64,
    /// Whether imago is not to see a dirty bit now.
    hides_dirty: AtomicBool,
    /// What imago needs to keep unaligned writes to one block apart.
    pub(super) helper: CommonStorageHelper,
}

/// What requests and buffers must be multiples of; 1 without `O_DIRECT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) request: usize,
    pub(super) memory: usize,
}

impl HostFile {
    /// Opens what is at `path`, and creates an empty file if `create` and there is none.
    pub(super) fn open(path: &Path, writable: bool, cache: Cache, create: bool) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(writable).create(create);
        // Opening a FIFO must not wait for its other end.
        let mut flags = OFlags::NONBLOCK;
        if cache == Cache::None {
            flags |= OFlags::DIRECT;
        }
        options.custom_flags(flags.bits().cast_signed());
        let file = options.open(path).map_err(|source| {
            let kind = source.kind();
            if kind == io::ErrorKind::IsADirectory {
                return Error::FileType {
                    path: path.to_owned(),
                    kind: "a directory",
                };
            }
            if cache == Cache::None && kind == io::ErrorKind::InvalidInput {
                let reason = "the file system refuses it".to_owned();
                return Error::Direct {
                    path: path.to_owned(),
                    reason,
                };
            }
            Error::Open {
                path: path.to_owned(),
                source,
            }
        })?;
        Self::new(file, path, cache)
    }

    fn new(file: File, path: &Path, cache: Cache) -> Result<Self> {
        let cannot_open = |source: io::Error| Error::Open {
            path: path.to_owned(),
            source,
        };
        let kind = file.metadata().map_err(cannot_open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let kind = if kind.is_dir() {
                "a directory"
            } else if kind.is_char_device() {
                "a character device"
            } else if kind.is_fifo() {
                "a FIFO"
            } else {
                "something else"
            };
            return Err(Error::FileType {
                path: path.to_owned(),
                kind,
            });
        }
        let align = match cache {
            Cache::Writeback => Alignment {
                request: 1,
                memory: 1,
            },
            Cache::None => direct_alignment(&file),
        };
        let file = HostFile {
            file,
            path: path.to_owned(),
            align,
            size: AtomicU64::new(0),
            hides_dirty: AtomicBool::new(false),
            helper: CommonStorageHelper::default(),
        };
        file.refresh_size().map_err(cannot_open)?;
        Ok(file)
    }

    /// Whether readers from here on see no dirty bit.
    pub(super) fn hide_dirty(&self, hide: bool) {
        self.hides_dirty.store(hide, Ordering::Relaxed);
    }

    /// See [`hide_dirty`](Self::hide_dirty).
    pub(super) fn hides_dirty(&self) -> bool {
        self.hides_dirty.load(Ordering::Relaxed)
    }

    /// The length in bytes; a block device's size.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Asks the host for the length again: another process may have changed it.
    pub(super) fn refresh_size(&self) -> io::Result<u64> {
        // Unlike `stat`, this knows the size of block devices too.
        let size = seek(&self.file, SeekFrom::End(0))?;
        self.size.store(size, Ordering::Release);
        Ok(size)
    }

    /// Bytes that the file takes on its file system.
    pub(super) fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    /// Fills `bufs` from `offset`; beyond the end of the file with zeroes. A file that has become
    /// shorter by somebody else's hand is an error: what is lost must not read as zeroes.
    pub(super) fn read(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let len = total(bufs);
        let first = if bufs.len() <= MAX_BUFFERS {
            self.read_some(bufs, offset)?
        } else {
            0
        };
        if first as u64 == len {
            return Ok(());
        }
        // The rest, of a copy of the list: the caller's stays as it is.
        let mut rest: Vec<_> = bufs.iter_mut().map(|buf| IoSliceMut::new(buf)).collect();
        let mut rest = rest.as_mut_slice();
        let mut at = offset.saturating_add(first as u64);
        IoSliceMut::advance_slices(&mut rest, first);
        while !rest.is_empty() {
            let count = rest.len().min(MAX_BUFFERS);
            if at >= self.size() {
                rest.iter_mut().for_each(|buf| buf.fill(0));
                return Ok(());
            }
            let done = self.read_some(rest.get_mut(..count).unwrap_or_default(), at)?;
            if done == 0 {
                let reason = format!("the file ends before {at}: was it truncated?");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
            }
            at = at.saturating_add(done as u64);
            IoSliceMut::advance_slices(&mut rest, done);
        }
        Ok(())
    }

    fn read_some(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        Ok(retry_on_intr(|| preadv(&self.file, bufs, offset))?)
    }

    /// Writes all of `bufs` at `offset`.
    pub(super) fn write(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let len = total(bufs);
        let first = if bufs.len() <= MAX_BUFFERS {
            self.write_some(bufs, offset)?
        } else {
            0
        };
        if first as u64 == len {
            return Ok(());
        }
        let mut rest = bufs.to_vec();
        let mut rest = rest.as_mut_slice();
        let mut at = offset.saturating_add(first as u64);
        IoSlice::advance_slices(&mut rest, first);
        while !rest.is_empty() {
            let count = rest.len().min(MAX_BUFFERS);
            match self.write_some(rest.get(..count).unwrap_or_default(), at)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                done => {
                    at = at.saturating_add(done as u64);
                    IoSlice::advance_slices(&mut rest, done);
                }
            }
        }
        Ok(())
    }

    fn write_some(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let done = retry_on_intr(|| pwritev(&self.file, bufs, offset))?;
        self.grown(offset, done as u64);
        Ok(done)
    }

    fn grown(&self, offset: u64, len: u64) {
        self.size
            .fetch_max(offset.saturating_add(len), Ordering::AcqRel);
    }

    /// Makes the range read as zeroes and keeps its space; grows the file if need be.
    /// [`io::ErrorKind::Unsupported`] if the file system can't.
    pub(super) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::ZERO_RANGE, offset, len)?;
        self.grown(offset, len);
        Ok(())
    }

    /// Makes the range read as zeroes and gives its space back to the file system.
    /// [`io::ErrorKind::Unsupported`] if the file system can't.
    pub(super) fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match retry_on_intr(|| fallocate(&self.file, flags, offset, len)) {
            // A block device says the latter of ranges that are not aligned to its sectors.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            result => Ok(result?),
        }
    }

    /// Waits until everything written is on the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| fdatasync(&self.file))?)
    }

    /// Asks the kernel to forget what it has cached of the file: on a network file system it may
    /// be older than what another host has written.
    pub(super) fn drop_page_cache(&self) -> io::Result<()> {
        if self.is_local()? {
            return Ok(());
        }
        Ok(fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    /// Whether the file system is one that only this host can have mounted: then its page cache is
    /// that of every process that may have written.
    fn is_local(&self) -> io::Result<bool> {
        const EXT: i64 = 0xef53;
        const XFS: i64 = 0x5846_5342;
        const BTRFS: i64 = 0x9123_683e;
        const TMPFS: i64 = 0x0102_1994;
        const F2FS: i64 = 0xf2f5_2010;
        const ZFS: i64 = 0x2fc1_2fc1;
        let kind = rustix::fs::fstatfs(&self.file)?.f_type;
        Ok([EXT, XFS, BTRFS, TMPFS, F2FS, ZFS].contains(&kind) && self.file.metadata()?.is_file())
    }

    /// Whether the file has data at `offset`, and for how many bytes at least that is so; a hole
    /// reads as zeroes. Block devices and file systems that can't tell have data everywhere.
    pub(super) fn is_data(&self, offset: u64, max: u64) -> io::Result<(bool, u64)> {
        let end = offset.saturating_add(max);
        let until = |next: u64| next.min(end).saturating_sub(offset);
        // Two questions at most. The file's own position moves, but nothing here uses it.
        match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((false, until(data))),
            Ok(_) if max <= SHORT => Ok((true, max)),
            Ok(_) => match seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok((true, until(hole))),
                // Changed in between by another thread; data is never wrong.
                Ok(_) | Err(Errno::NXIO) => Ok((true, max)),
                Err(error) => Err(error.into()),
            },
            // No data from here to the end of the file.
            Err(Errno::NXIO) => Ok((false, max)),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::SPIPE) => Ok((true, max)),
            Err(error) => Err(error.into()),
        }
    }
}

/// Total length of a list of buffers.
pub(super) fn total<B: std::ops::Deref<Target = [u8]>>(bufs: &[B]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

/// Asks the kernel, and only asks: a trial write, which is how it is often found out, could hit
/// an image that another process is writing.
fn direct_alignment(file: &File) -> Alignment {
    let known = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let known = known.filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let usable = |align: u32| Some(align as usize).filter(|align| align.is_power_of_two());
    Alignment {
        request: known
            .and_then(|s| usable(s.stx_dio_offset_align))
            .unwrap_or(SAFE_ALIGNMENT),
        memory: known
            .and_then(|s| usable(s.stx_dio_mem_align))
            .unwrap_or(SAFE_ALIGNMENT),
    }
}
