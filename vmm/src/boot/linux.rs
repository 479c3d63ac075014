//! Linux's 64-bit boot protocol. <https://docs.kernel.org/arch/x86/boot.html>

use std::fs::File;
use std::ops::Range;

use linux_loader::loader::bootparam::{
    LOADED_HIGH, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use linux_loader::loader::{BzImage, KernelLoader};
use migration::layout::GuestRam;
use vm_memory::{ByteValued, GuestAddress};

use super::memory_map::Entry;
use super::{BootError, COMMAND_LINE_ADDR, HIGH_MEMORY, Placed, write};

/// Where `struct boot_params` is.
pub(super) const BOOT_PARAMS_ADDR: u64 = 0x7000;
/// Where the page tables are: six pages.
pub(super) const PAGE_TABLES_ADDR: u64 = 0x9000;

/// Where the setup header is in the file and in `struct boot_params`.
const HEADER_AT: usize = 0x1f1;
/// "HdrS".
const MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without a number of its own.
const LOADER_UNKNOWN: u8 = 0xff;
/// The first version with `xloadflags`, of 2012 (Linux 3.8).
const OLDEST_VERSION: u16 = 0x020c;
/// The 64-bit entry point is so far behind the beginning.
const ENTRY_64: u64 = 0x200;

/// The setup header of a bzImage.
#[derive(Clone, Copy, Debug)]
pub struct BzImageHeader {
    header: setup_header,
    /// The length of what is loaded.
    kernel_len: u64,
}

impl BzImageHeader {
    /// Reads the header from the start of a file with `file_len` bytes. The inner error says what
    /// it is if it isn't a kernel that can be booted.
    pub(super) fn read(start: &[u8], file_len: u64) -> Result<Result<Self, String>, BootError> {
        // The byte at 0x201 is the target of a short jump over the header: its length.
        let end = 0x202 + usize::from(start.get(0x201).copied().unwrap_or(0));
        let Some(bytes) = start.get(HEADER_AT..end.min(start.len())) else {
            return Err(BootError::Damaged("the file ends in its header".into()));
        };
        let mut header = setup_header::default();
        header
            .as_mut_slice()
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        let (version, xloadflags) = (header.version, header.xloadflags);
        if version < OLDEST_VERSION {
            return Ok(Err(format!(
                "a Linux kernel with boot protocol {}.{:02}, older than 2.12",
                version >> 8,
                version & 0xff
            )));
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Ok(Err("a Linux zImage, which is loaded below 1 MiB".into()));
        }
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Ok(Err("a Linux bzImage for 32-bit x86".into()));
        }
        let setup_sectors = match header.setup_sects {
            0 => 4,
            sectors => u64::from(sectors),
        };
        match file_len.checked_sub((setup_sectors + 1) * 512) {
            Some(kernel_len) if kernel_len > ENTRY_64 => Ok(Ok(Self { header, kernel_len })),
            _ => Err(BootError::Damaged("the file ends before its kernel".into())),
        }
    }

    /// The most bytes of command line that the kernel takes.
    pub(super) fn command_line_max(&self) -> usize {
        // Ours has a place of 64 KiB.
        (self.header.cmdline_size as usize).min(0xffff)
    }

    /// The end of the memory in which the initrd may lie.
    pub(super) fn initrd_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max).saturating_add(1)
    }

    /// Checks that the memory that the kernel needs until it has found out about its memory is
    /// RAM. It is loaded at 1 MiB and decompresses itself to its preferred address.
    pub(super) fn check(&self, ram_end: u64) -> Result<Placed, BootError> {
        let (preferred, size) = (self.header.pref_address, self.header.init_size);
        let runs_at = if self.header.relocatable_kernel != 0 {
            let align = u64::from(self.header.kernel_alignment);
            if !align.is_power_of_two() {
                return Err(BootError::Damaged(format!(
                    "its alignment is {align:#x}, which is not a power of two"
                )));
            }
            // It doesn't run below its preferred address though it could.
            HIGH_MEMORY.next_multiple_of(align).max(preferred)
        } else {
            preferred
        };
        let parts = [
            (HIGH_MEMORY, self.kernel_len, "the kernel's file"),
            (runs_at, size.into(), "the decompressed kernel"),
        ];
        let mut end = HIGH_MEMORY;
        for (start, len, what) in parts {
            let part_end = start.saturating_add(len);
            if start < HIGH_MEMORY || part_end > ram_end {
                return Err(BootError::KernelPlace {
                    start,
                    end: part_end,
                    what,
                    ram_end,
                    remedy: "; give the guest more memory",
                });
            }
            end = end.max(part_end);
        }
        Ok(Placed {
            entry: HIGH_MEMORY + ENTRY_64,
            end,
        })
    }
}

/// Loads a bzImage that has been checked.
pub(super) fn load_bzimage(ram: &GuestRam, mut file: &File) -> Result<(), BootError> {
    BzImage::load(ram, Some(GuestAddress(HIGH_MEMORY)), &mut file, None)?;
    Ok(())
}

/// Writes `struct boot_params`. A vmlinux has no header: it gets one with what a boot loader sets.
pub(super) fn write_boot_params(
    ram: &GuestRam,
    kernel: Option<&BzImageHeader>,
    command_line_len: usize,
    map: &[Entry],
    initrd: Option<&Range<u64>>,
) -> Result<(), BootError> {
    let mut hdr = kernel.map_or_else(
        || setup_header {
            boot_flag: BOOT_FLAG,
            header: MAGIC,
            version: OLDEST_VERSION,
            loadflags: LOADED_HIGH,
            cmdline_size: command_line_len as u32,
            kernel_alignment: 0x0100_0000,
            ..Default::default()
        },
        |kernel| kernel.header,
    );
    hdr.type_of_loader = LOADER_UNKNOWN;
    hdr.code32_start = HIGH_MEMORY as u32;
    hdr.cmd_line_ptr = COMMAND_LINE_ADDR as u32;
    // The initrd lies below the hole, at 3 GiB.
    if let Some(initrd) = initrd {
        hdr.ramdisk_image = initrd.start as u32;
        hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    }
    let mut params = boot_params {
        hdr,
        acpi_rsdp_addr: super::acpi::RSDP_ADDR,
        ..Default::default()
    };
    let mut table = params.e820_table;
    let entries = table.len().min(map.len());
    for (to, from) in table.iter_mut().zip(map) {
        *to = boot_e820_entry {
            addr: from.addr,
            size: from.size,
            r#type: from.kind as u32,
        };
    }
    params.e820_table = table;
    params.e820_entries = entries as u8;
    write(ram, BOOT_PARAMS_ADDR, params.as_slice())
}

/// Maps the first 4 GiB to themselves with pages of 2 MiB: more than the protocol asks for (the
/// kernel, the boot parameters and the command line).
pub(super) fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    write_page_tables_with(ram, 0)
}

/// The same with more bits in every entry.
pub(super) fn write_page_tables_with(ram: &GuestRam, bits: u64) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const TABLE: u64 = 4096;
    let directories = PAGE_TABLES_ADDR + 2 * TABLE;
    let mut tables: Vec<u64> = vec![0; 6 * 512];
    let mut set = |index: usize, value: u64| {
        if let Some(entry) = tables.get_mut(index) {
            *entry = value | PRESENT_WRITABLE | bits;
        }
    };
    set(0, PAGE_TABLES_ADDR + TABLE);
    for gib in 0..4 {
        set(512 + gib, directories + gib as u64 * TABLE);
    }
    for page in 0..4 * 512 {
        set(2 * 512 + page, (page as u64) << 21 | LARGE);
    }
    let bytes: Vec<u8> = tables
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    write(ram, PAGE_TABLES_ADDR, &bytes)
}
