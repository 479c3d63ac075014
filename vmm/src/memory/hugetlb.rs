//! The host's pools of huge pages: see the kernel's admin-guide/mm/hugetlbpage.

use std::fs::{self, File};
use std::io;

use migration::layout::Layout;
use rustix::fs::fstatfs;

use super::MemoryError;
use crate::control::size::format_size;

/// Where the pools are, a directory each.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;

/// Huge pages of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HugePages {
    /// Bytes of one.
    pub(super) size: u64,
}

impl HugePages {
    /// Those of `size`, or of the host's default size.
    pub(super) fn of_host(size: Option<u64>) -> Result<Self, MemoryError> {
        let sizes = sizes();
        let size = match size.or_else(default_size) {
            Some(size) => size,
            None => return Err(MemoryError::NoHugePages),
        };
        if !sizes.contains(&size) {
            return Err(MemoryError::NoSuchHugePages { size, sizes });
        }
        Ok(Self { size })
    }

    /// Checks that memory can be made of them.
    pub(super) fn check(&self, layout: &Layout) -> Result<(), MemoryError> {
        let whole = |len: u64| len.is_multiple_of(self.size);
        match layout.regions().iter().all(|region| whole(region.len)) {
            true => Ok(()),
            false => Err(MemoryError::PartialHugePage {
                bytes: layout.bytes(),
                size: self.size,
            }),
        }
    }

    /// The size as mmap(2) and memfd_create(2) take it.
    pub(super) fn flag(&self) -> i32 {
        (self.size.trailing_zeros() as i32) << libc::MAP_HUGE_SHIFT
    }

    /// What to say when there aren't enough for `bytes`.
    pub(super) fn too_few(&self, bytes: u64) -> MemoryError {
        let pool = format!("{POOLS}/hugepages-{}kB", self.size >> 10);
        let count = |name: &str| read_number(&format!("{pool}/{name}")).unwrap_or(0);
        MemoryError::TooFewHugePages {
            size: self.size,
            needed: bytes / self.size,
            free: count("free_hugepages").saturating_sub(count("resv_hugepages")),
            pool: format!("{pool}/nr_hugepages"),
        }
    }
}

/// Those that the file system of `file` has, if it is a hugetlbfs.
pub(super) fn on_file_system(file: &File) -> io::Result<Option<HugePages>> {
    let stat = fstatfs(file)?;
    let is_hugetlbfs = stat.f_type as u32 == HUGETLBFS_MAGIC;
    Ok(is_hugetlbfs.then_some(HugePages {
        size: stat.f_bsize as u64,
    }))
}

/// The sizes that the host has pools of, ascending.
fn sizes() -> Vec<u64> {
    let names = fs::read_dir(POOLS).into_iter().flatten().flatten();
    let mut sizes: Vec<u64> = names
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kib: u64 = name
                .strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse()
                .ok()?;
            kib.checked_mul(1 << 10)
        })
        .collect();
    sizes.sort_unstable();
    sizes
}

fn default_size() -> Option<u64> {
    super::meminfo("Hugepagesize")
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The sizes, as messages show them.
pub(super) fn list(sizes: &[u64]) -> String {
    let sizes: Vec<_> = sizes.iter().map(|&size| format_size(size)).collect();
    sizes.join(", ")
}
