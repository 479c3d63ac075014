//! Where guest memory that is a file of tmpfs (shared memory) holds something. The rest reads as
//! zeroes, and reading it to find that out would allocate it.

use std::fs::File;

use rustix::fs::{SeekFrom, fstatfs, seek};
use rustix::io::Errno;

use crate::bitmap::PageRun;
use crate::layout::PAGE_SIZE;

/// `TMPFS_MAGIC` of linux/magic.h.
const TMPFS_MAGIC: u32 = 0x0102_1994;

/// Whether the file system tells of holes, pages that are mapped or in swap included. Of others
/// that is not known.
pub(crate) fn are_told(file: &File) -> bool {
    fstatfs(file).is_ok_and(|stat| stat.f_type as u32 == TMPFS_MAGIC)
}

/// Puts into `runs` the runs of pages that may hold something among the `pages` pages at `offset` of
/// the file, in bytes; page numbers are relative to `offset`.
pub(crate) fn between(
    file: &File,
    offset: u64,
    pages: u64,
    runs: &mut Vec<PageRun>,
) -> Result<(), Errno> {
    runs.clear();
    let end = offset + pages * PAGE_SIZE;
    let mut at = offset;
    while at < end {
        let from = match seek(file, SeekFrom::Data(at)) {
            Ok(from) if from < end => from,
            // Nothing more in the file.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error),
        };
        // The end of the file counts as one.
        let to = seek(file, SeekFrom::Hole(from))?.min(end);
        let first = (from - offset) / PAGE_SIZE;
        let last = (to - offset).div_ceil(PAGE_SIZE);
        // The page may have gone between the two looks.
        let last = last.max(first + 1);
        runs.push(PageRun {
            first,
            count: last - first,
        });
        at = offset + last * PAGE_SIZE;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn only_what_was_written_is_found() {
        let file = File::from(memfd_create("holes", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(100 * PAGE_SIZE).unwrap();
        assert!(are_told(&file));
        let mut runs = vec![];
        between(&file, 0, 100, &mut runs).unwrap();
        assert!(runs.is_empty());
        for page in [0, 7, 8, 50, 99] {
            file.write_at(&[1], page * PAGE_SIZE + 5).unwrap();
        }
        between(&file, 0, 100, &mut runs).unwrap();
        let run = |first, count| PageRun { first, count };
        assert_eq!(runs, [run(0, 1), run(7, 2), run(50, 1), run(99, 1)]);
        between(&file, 8 * PAGE_SIZE, 42, &mut runs).unwrap();
        assert_eq!(runs, [run(0, 1)]);
    }
}
