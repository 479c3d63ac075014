//! Mapping guest memory as its [`Backing`] says.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use migration::layout::{GuestRam, Layout};
use rustix::fs::{MemfdFlags, fstatvfs, memfd_create};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::backing::{Backing, Pages};
use super::hole::Hole;
use super::hugetlb::{self, HugePages};
use super::{MemoryError, advice, numa, prealloc};

/// Memory that KVM can map with huge pages begins at a multiple of this on the host, as it does in
/// the guest.
const ALIGN: u64 = 2 << 20;

/// How often another address is tried.
const ATTEMPTS: usize = 8;

/// Maps RAM for `layout`. It reads as zeroes. Unless it is preallocated it takes no space until it
/// is touched; huge pages of the host's pool are reserved at once, so that none is missing later.
pub fn map(layout: &Layout, backing: &Backing) -> Result<GuestRam, MemoryError> {
    let kind = Kind::of(layout, backing)?;
    let mut offset = 0;
    let mut regions = Vec::new();
    for region in layout.regions() {
        let mapping = kind
            .map(offset, region.len)
            .map_err(|reason| kind.failed(layout.bytes(), reason))?;
        offset += region.len;
        // An address and a length that overflow are no layout.
        let mapped = GuestRegionMmap::new(mapping, GuestAddress(region.start));
        regions.push(mapped.ok_or(MemoryError::TooLarge(layout.bytes()))?);
    }
    let ram = GuestRam::from_regions(regions).map_err(|reason| MemoryError::Map {
        bytes: layout.bytes(),
        reason: reason.to_string(),
    })?;
    if let Some(nodes) = &backing.numa {
        // Before any of it is there.
        numa::apply(&ram, nodes)?;
    }
    if backing.pages == Pages::Transparent {
        advice::huge_pages(&ram)?;
    }
    if backing.prealloc {
        let from_host = kind.is_hosts_memory();
        prealloc::populate(&ram, from_host)?;
    }
    Ok(ram)
}

/// How it is mapped.
struct Kind {
    file: Option<Arc<File>>,
    huge: Option<HugePages>,
    /// Begins at a multiple of [`ALIGN`].
    aligned: bool,
}

impl Kind {
    fn of(layout: &Layout, backing: &Backing) -> Result<Self, MemoryError> {
        let mut huge = match backing.pages {
            Pages::Huge(size) => Some(HugePages::of_host(size)?),
            Pages::Host | Pages::Transparent => None,
        };
        let file = match &backing.path {
            Some(path) => {
                let file = tempfile::tempfile_in(path).map_err(|error| MemoryError::Path {
                    path: path.clone(),
                    error,
                })?;
                huge = on_file_system(path, &file, backing.pages)?;
                Some(file)
            }
            None if backing.shared => Some(memfd(huge.as_ref())?),
            None => None,
        };
        if let Some(huge) = &huge {
            huge.check(layout)?;
        }
        if let Some(file) = &file {
            if let (Some(path), None) = (&backing.path, &huge) {
                check_room(path, file, layout.bytes())?;
            }
            file.set_len(layout.bytes())
                .map_err(|error| MemoryError::File {
                    bytes: layout.bytes(),
                    error,
                })?;
        }
        Ok(Self {
            file: file.map(Arc::new),
            huge,
            aligned: backing.pages == Pages::Transparent,
        })
    }

    fn map(&self, offset: u64, len: u64) -> Result<MmapRegion<AtomicBitmap>, MmapRegionError> {
        let region = self.map_anywhere(offset, len)?;
        if !self.aligned || is_aligned(&region) {
            return Ok(region);
        }
        // What is in the wrong place stays until another one is found.
        let mut misplaced = vec![region];
        for _ in 0..ATTEMPTS {
            let hole = Hole::new(len as usize, ALIGN as usize).map_err(MmapRegionError::Mmap)?;
            let region = self.map_anywhere(offset, len)?;
            drop(hole);
            if is_aligned(&region) {
                return Ok(region);
            }
            // Another place had room, or another thread was faster.
            misplaced.push(region);
        }
        tracing::warn!(
            "guest memory does not begin at a multiple of 2 MiB here: huge pages help less"
        );
        self.map_anywhere(offset, len)
    }

    fn map_anywhere(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<MmapRegion<AtomicBitmap>, MmapRegionError> {
        let sharing = match self.file {
            Some(_) => libc::MAP_SHARED,
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        };
        let pages = match (&self.huge, &self.file) {
            // Not MAP_NORESERVE: the pool has enough, or this fails.
            (Some(huge), None) => libc::MAP_HUGETLB | huge.flag(),
            (Some(_), Some(_)) => 0,
            (None, _) => libc::MAP_NORESERVE,
        };
        let file = self.file.as_ref();
        let mut region = MmapRegion::build(
            file.map(|file| FileOffset::from_arc(Arc::clone(file), offset)),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | pages,
        )?;
        region.set_hugetlbfs(self.huge.is_some());
        Ok(region)
    }

    /// Whether the memory is what /proc/meminfo calls available.
    fn is_hosts_memory(&self) -> bool {
        self.huge.is_none() && self.file.is_none()
    }

    fn failed(&self, bytes: u64, reason: MmapRegionError) -> MemoryError {
        match &self.huge {
            Some(huge) => huge.too_few(bytes),
            None => MemoryError::Map {
                bytes,
                reason: reason.to_string(),
            },
        }
    }
}

fn is_aligned(region: &MmapRegion<AtomicBitmap>) -> bool {
    (region.as_ptr() as u64).is_multiple_of(ALIGN)
}

/// A file in memory, which goes with its last user.
fn memfd(huge: Option<&HugePages>) -> Result<File, MemoryError> {
    let flags = match huge {
        Some(huge) => MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(huge.flag() as u32),
        None => MemfdFlags::empty(),
    };
    let fd = memfd_create("guest-memory", flags | MemfdFlags::CLOEXEC);
    fd.map(File::from)
        .map_err(|error| MemoryError::Memfd(error.into()))
}

/// The huge pages of a hugetlbfs; other file systems have none.
fn on_file_system(
    path: &Path,
    file: &File,
    pages: Pages,
) -> Result<Option<HugePages>, MemoryError> {
    let found = hugetlb::on_file_system(file).map_err(|error| MemoryError::Path {
        path: path.to_owned(),
        error,
    })?;
    match (pages, &found) {
        (Pages::Huge(_), None) => Err(MemoryError::NoHugetlbfs(path.to_owned())),
        (Pages::Huge(Some(size)), Some(huge)) if huge.size != size => {
            Err(MemoryError::OtherHugetlbfs {
                path: path.to_owned(),
                wanted: size,
                there: huge.size,
            })
        }
        (Pages::Transparent, Some(_)) => Err(MemoryError::TransparentHugetlbfs(path.to_owned())),
        _ => Ok(found),
    }
}

/// A file system that is full later would end the process with SIGBUS.
fn check_room(path: &Path, file: &File, bytes: u64) -> Result<(), MemoryError> {
    let stat = fstatvfs(file).map_err(|error| MemoryError::Path {
        path: path.to_owned(),
        error: io::Error::from(error),
    })?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < bytes {
        return Err(MemoryError::NoRoom {
            path: path.to_owned(),
            bytes,
            free,
        });
    }
    Ok(())
}
