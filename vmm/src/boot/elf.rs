//! ELF kernels: reading the headers, and checking all of them before linux-loader copies.
//!
//! linux-loader trusts the file to place its segments well and doesn't clear what has no bytes in
//! the file (.bss); after a reset that memory is dirty. Both are done here.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::{Elf, KernelLoader};
use memchr::memmem::Finder;
use migration::layout::{GuestRam, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, HIGH_MEMORY, Placed};

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Far more than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// The same for the bytes of notes.
const MAX_NOTES: u64 = 64 << 10;

/// How many bytes of a file are searched at once.
const SEARCH_PIECE: u64 = 1 << 20;

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// A piece of the file and its place in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    addr: u64,
    file_len: u64,
    memory_len: u64,
}

/// The headers of a 64-bit x86 ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElfKernel {
    entry: u64,
    /// The 32-bit entry point of the PVH note.
    pub(super) pvh_entry: Option<u32>,
    /// Whether it is a program for an operating system, with a dynamic linker.
    pub(super) has_interpreter: bool,
    segments: Vec<Segment>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    array_at(bytes, at).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    array_at(bytes, at).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    array_at(bytes, at).map_or(0, u64::from_le_bytes)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn damaged(what: impl Into<String>) -> BootError {
    BootError::Damaged(what.into())
}

impl ElfKernel {
    /// Reads the headers of `file`, which starts with `start`, is `file_len` bytes long, and is a
    /// 64-bit little-endian ELF file for x86.
    pub(super) fn read(mut file: &File, start: &[u8], file_len: u64) -> Result<Self, BootError> {
        if start.len() < HEADER {
            return Err(damaged("the file ends in the ELF header"));
        }
        let (table, entry_size, count) = (u64_at(start, 32), u16_at(start, 54), u16_at(start, 56));
        if usize::from(entry_size) != PROGRAM_HEADER {
            return Err(damaged(format!(
                "its ELF program headers have {entry_size} bytes instead of {PROGRAM_HEADER}"
            )));
        }
        if count == 0 || count > MAX_PROGRAM_HEADERS {
            return Err(damaged(format!(
                "it has {count} ELF program headers; 1 to {MAX_PROGRAM_HEADERS} are supported"
            )));
        }
        let mut headers = vec![0; usize::from(count) * PROGRAM_HEADER];
        read_at(&mut file, table, &mut headers, file_len, "program headers")?;
        let mut kernel = Self {
            entry: u64_at(start, 24),
            pvh_entry: None,
            has_interpreter: false,
            segments: Vec::new(),
        };
        for header in headers.chunks_exact(PROGRAM_HEADER) {
            let (offset, file_len_of) = (u64_at(header, 8), u64_at(header, 32));
            match u32_at(header, 0) {
                PT_LOAD => kernel.segments.push(Segment {
                    offset,
                    addr: u64_at(header, 24),
                    file_len: file_len_of,
                    memory_len: u64_at(header, 40),
                }),
                PT_INTERP => kernel.has_interpreter = true,
                PT_NOTE => {
                    if file_len_of > MAX_NOTES {
                        return Err(damaged(format!("it has {file_len_of} bytes of ELF notes")));
                    }
                    let mut notes = vec![0; file_len_of as usize];
                    read_at(&mut file, offset, &mut notes, file_len, "notes")?;
                    if let Some(entry) = find_pvh_entry(&notes) {
                        kernel.pvh_entry = Some(entry);
                    }
                }
                _ => {}
            }
        }
        for segment in &kernel.segments {
            let end = segment.offset.checked_add(segment.file_len);
            if end.is_none_or(|end| end > file_len) {
                return Err(damaged(format!(
                    "its segment at file offset {:#x} goes past the end of the file",
                    segment.offset
                )));
            }
            if segment.file_len > segment.memory_len {
                return Err(damaged(format!(
                    "its segment at file offset {:#x} has more bytes in the file than in memory",
                    segment.offset
                )));
            }
        }
        kernel.segments.retain(|segment| segment.memory_len > 0);
        kernel.segments.sort_by_key(|segment| segment.addr);
        Ok(kernel)
    }

    /// Checks that all segments have a place of their own in RAM, which ends at `ram_end`, and
    /// that the entry point is in one.
    pub(super) fn check(&self, ram_end: u64) -> Result<Placed, BootError> {
        let mut free_from = HIGH_MEMORY;
        for segment in &self.segments {
            let end = segment.addr.saturating_add(segment.memory_len);
            if segment.addr < HIGH_MEMORY || end > ram_end {
                return Err(BootError::KernelPlace {
                    start: segment.addr,
                    end,
                    what: "an ELF segment's physical addresses",
                    ram_end,
                    remedy: if segment.addr < HIGH_MEMORY {
                        "; link it at 1 MiB or above"
                    } else {
                        "; give the guest more memory"
                    },
                });
            }
            if segment.addr < free_from {
                return Err(damaged(format!(
                    "two of its ELF segments overlap at {:#x}",
                    segment.addr
                )));
            }
            free_from = end;
        }
        let entry = self.pvh_entry.map_or(self.entry, u64::from);
        let is_code =
            |segment: &Segment| (segment.addr..segment.addr + segment.memory_len).contains(&entry);
        if !self.segments.iter().any(is_code) {
            return Err(damaged(format!(
                "its entry point {entry:#x} is in none of its segments"
            )));
        }
        Ok(Placed {
            entry,
            end: free_from,
        })
    }

    /// Whether what `file` has for its segments contains these bytes.
    pub(super) fn contains(&self, mut file: &File, bytes: &[u8]) -> Result<bool, BootError> {
        let finder = Finder::new(bytes);
        let mut piece = Vec::new();
        for segment in &self.segments {
            file.seek(SeekFrom::Start(segment.offset))
                .map_err(BootError::ReadKernel)?;
            let mut left = segment.file_len;
            piece.clear();
            while left > 0 {
                let len = left.min(SEARCH_PIECE);
                let read = file.take(len).read_to_end(&mut piece);
                if read.map_err(BootError::ReadKernel)? == 0 {
                    break;
                }
                if finder.find(&piece).is_some() {
                    return Ok(true);
                }
                left -= len;
                // What begins in this piece may end in the next one.
                piece.drain(..piece.len().saturating_sub(bytes.len() - 1));
            }
        }
        Ok(false)
    }

    /// Loads the segments, which have been [checked](Self::check).
    pub(super) fn load(&self, ram: &GuestRam, mut file: &File) -> Result<(), BootError> {
        Elf::load(ram, None, &mut file, None)?;
        for segment in &self.segments {
            clear(
                ram,
                segment.addr + segment.file_len,
                segment.addr + segment.memory_len,
            )
            .map_err(|reason| BootError::Write {
                addr: segment.addr,
                reason,
            })?;
        }
        Ok(())
    }
}

/// Makes memory read as zeroes without touching what already does: a new guest's takes no space.
fn clear(ram: &GuestRam, mut from: u64, to: u64) -> Result<(), vm_memory::GuestMemoryError> {
    let zeroes = [0; PAGE_SIZE as usize];
    let mut bytes = [0; PAGE_SIZE as usize];
    while from < to {
        let len = (PAGE_SIZE - from % PAGE_SIZE).min(to - from) as usize;
        let (Some(page), Some(zeroes)) = (bytes.get_mut(..len), zeroes.get(..len)) else {
            break;
        };
        ram.read_slice(page, GuestAddress(from))?;
        if page != zeroes {
            ram.write_slice(zeroes, GuestAddress(from))?;
        }
        from += len as u64;
    }
    Ok(())
}

fn read_at(
    file: &mut &File,
    offset: u64,
    buffer: &mut [u8],
    file_len: u64,
    what: &str,
) -> Result<(), BootError> {
    let end = offset.checked_add(buffer.len() as u64);
    if end.is_none_or(|end| end > file_len) {
        return Err(damaged(format!(
            "its ELF {what} at file offset {offset:#x} go past the end of the file"
        )));
    }
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_exact(buffer))
        .map_err(BootError::ReadKernel)
}

/// The entry point in the note of type `XEN_ELFNOTE_PHYS32_ENTRY` that Xen owns, if it is among
/// `notes`: name length, description length, type, then both, padded to multiples of 4.
fn find_pvh_entry(mut notes: &[u8]) -> Option<u32> {
    while notes.len() >= 12 {
        let (name_len, desc_len, kind) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8));
        let desc_at = 12 + (name_len as usize).next_multiple_of(4);
        let name = notes.get(12..12 + name_len as usize)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" && desc_len >= 4 {
            return array_at(notes, desc_at).map(u32::from_le_bytes);
        }
        notes = notes.get(desc_at + (desc_len as usize).next_multiple_of(4)..)?;
    }
    None
}
