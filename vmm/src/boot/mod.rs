//! Booting: the kernel, the initrd and the command line into guest memory, and the registers that
//! vCPU 0 begins with.
//!
//! Everything is read from files that stay open, so that a guest can be booted again after a
//! reset, on any host that it has been migrated to. The files are not trusted: every size, address
//! and offset in them is checked before it is used.
//!
//! Low memory, below 640 KiB, is the VMM's while booting; the kernel may use all of it once it has
//! read what is there:
//!
//! | address | what |
//! |---|---|
//! | 0x0500 | the GDT |
//! | 0x6000 | PVH: start info, list of modules, memory map |
//! | 0x7000 | Linux: boot parameters ("zero page") |
//! | 0x9000 | Linux: page tables that map the first 4 GiB to themselves |
//! | 0x2_0000 | the command line |
//! | 0xe_0000 | the ACPI tables, which stay |
//! | 0xf_0000 | the MP table, which stays |

mod acpi;
mod elf;
mod error;
mod identify;
mod initrd;
mod linux;
mod memory_map;
mod mp_table;
mod pvh;
mod segments;
mod virtio_mmio;

use std::fs::File;

use kvm_bindings::{kvm_regs, kvm_sregs};
use migration::layout::GuestRam;
use vm_memory::{Bytes, GuestAddress};

pub use error::BootError;
pub use identify::{KernelKind, identify};
pub use virtio_mmio::VirtioMmioSlot;

use crate::memory::HOLE_START;
use memory_map::low_ram_end;

/// Kernels and initrds are loaded from here on: below are the VMM's tables and legacy devices.
const HIGH_MEMORY: u64 = 1 << 20;

const COMMAND_LINE_ADDR: u64 = 0x2_0000;

/// The most bytes of a command line for a kernel that doesn't tell its own limit: Linux's
/// `COMMAND_LINE_SIZE` without the terminating zero.
const COMMAND_LINE_MAX: usize = 2047;

/// What a guest boots from.
#[derive(Debug)]
pub struct BootSource<'a> {
    /// The kernel. Read from its start, wherever the file's position is.
    pub kernel: &'a File,
    /// The initrd, if any.
    pub initrd: Option<&'a File>,
    /// The command line, without a terminating zero. A kernel without ACPI, or told not to use it
    /// (`acpi=off`), gets it with words about the virtio devices added.
    pub command_line: &'a str,
    /// Where virtio-mmio devices are.
    pub virtio_mmio: &'a [VirtioMmioSlot],
}

/// The registers that vCPU 0 begins with; the other vCPUs wait for it to start them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootState {
    /// 32-bit protected mode without paging.
    /// <https://xenbits.xen.org/docs/unstable/misc/pvh.html>
    Pvh {
        /// The entry point.
        entry: u32,
        /// Where `struct hvm_start_info` is.
        start_info: u32,
    },
    /// 64-bit mode, with the first 4 GiB mapped to themselves.
    /// <https://docs.kernel.org/arch/x86/boot.html#id1>
    Linux64 {
        /// The entry point.
        entry: u64,
        /// Where `struct boot_params` is.
        boot_params: u64,
    },
}

impl BootState {
    /// Changes registers in their power-on state to those at the entry to the kernel.
    pub fn apply(&self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        match *self {
            Self::Pvh { entry, start_info } => {
                *regs = kvm_regs {
                    rip: entry.into(),
                    rbx: start_info.into(),
                    rflags: 2,
                    ..Default::default()
                };
                segments::protected_mode(sregs);
            }
            Self::Linux64 { entry, boot_params } => {
                *regs = kvm_regs {
                    rip: entry,
                    rsi: boot_params,
                    rflags: 2,
                    ..Default::default()
                };
                segments::long_mode(sregs, linux::PAGE_TABLES_ADDR);
            }
        }
    }
}

/// Loads what `source` names into `ram` for a machine with `vcpus` vCPUs. Memory that isn't loaded
/// to is left as it is: after a reset it holds what the guest left there, as on hardware.
pub fn load(ram: &GuestRam, source: &BootSource<'_>, vcpus: u32) -> Result<BootState, BootError> {
    let low_end = low_ram_end(ram);
    let kernel = identify(source.kernel)?;
    // Everything that can be wrong is checked before guest memory is written.
    let limit = match &kernel {
        KernelKind::BzImage(header) => header.command_line_max(),
        KernelKind::Pvh(_) | KernelKind::Elf64(_) => COMMAND_LINE_MAX,
    };
    let slots = source.virtio_mmio;
    let by_acpi = !slots.is_empty()
        && !virtio_mmio::acpi_is_off(source.command_line)
        && kernel.has_acpi(source.kernel)?;
    let named = if by_acpi { &[] } else { slots };
    let command_line = virtio_mmio::command_line(source.command_line, named, limit)?;
    let placed = match &kernel {
        KernelKind::Pvh(elf) | KernelKind::Elf64(elf) => elf.check(low_end)?,
        KernelKind::BzImage(header) => header.check(low_end)?,
    };
    let initrd_limit = match &kernel {
        KernelKind::BzImage(header) => low_end.min(header.initrd_limit()),
        KernelKind::Pvh(_) | KernelKind::Elf64(_) => low_end,
    };
    let initrd = source
        .initrd
        .map(|file| initrd::place(file, placed.end, initrd_limit).map(|range| (file, range)))
        .transpose()?;

    match &kernel {
        KernelKind::Pvh(elf) | KernelKind::Elf64(elf) => elf.load(ram, source.kernel)?,
        KernelKind::BzImage(_) => linux::load_bzimage(ram, source.kernel)?,
    }
    if let Some((file, range)) = &initrd {
        initrd::load(ram, file, range)?;
    }
    let initrd = initrd.map(|(_, range)| range);
    write(ram, COMMAND_LINE_ADDR, command_line.as_bytes())?;
    write(ram, COMMAND_LINE_ADDR + command_line.len() as u64, &[0])?;
    let long = !matches!(kernel, KernelKind::Pvh(_));
    write(ram, segments::GDT_ADDR, &segments::gdt(long))?;
    let acpi = acpi::build(vcpus, source.virtio_mmio);
    write(ram, acpi::RSDP_ADDR, &acpi)?;
    write(ram, mp_table::ADDR, &mp_table::build(vcpus))?;
    let map = memory_map::memory_map(ram);
    match kernel {
        KernelKind::Pvh(_) => {
            let start_info = pvh::write_start_info(ram, &map, initrd.as_ref())?;
            Ok(BootState::Pvh {
                entry: placed.entry as u32,
                start_info,
            })
        }
        KernelKind::Elf64(_) | KernelKind::BzImage(_) => {
            let header = match &kernel {
                KernelKind::BzImage(header) => Some(header),
                _ => None,
            };
            linux::write_boot_params(ram, header, command_line.len(), &map, initrd.as_ref())?;
            linux::write_page_tables(ram)?;
            Ok(BootState::Linux64 {
                entry: placed.entry,
                boot_params: linux::BOOT_PARAMS_ADDR,
            })
        }
    }
}

/// Where a kernel is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    entry: u64,
    /// The end of all memory that the kernel needs at the start.
    end: u64,
}

/// Writes one of the VMM's own tables, which lie in the first MiB: every guest has that.
fn write(ram: &GuestRam, addr: u64, data: &[u8]) -> Result<(), BootError> {
    debug_assert!(addr < HIGH_MEMORY && HIGH_MEMORY < HOLE_START);
    ram.write_slice(data, GuestAddress(addr))
        .map_err(|reason| BootError::Write { addr, reason })
}

/// The page tables for Linux, with everything open to CPL 3.
#[cfg(test)]
pub(crate) fn write_user_page_tables(ram: &GuestRam) {
    const USER: u64 = 4;
    linux::write_page_tables_with(ram, USER).unwrap();
}

#[cfg(test)]
mod tests;
