//! PVH: what a kernel finds at its 32-bit entry point.
//! <https://xenbits.xen.org/docs/unstable/misc/pvh.html>

use std::ops::Range;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use migration::layout::GuestRam;
use vm_memory::GuestAddress;

use super::memory_map::Entry;
use super::{BootError, COMMAND_LINE_ADDR};

const START_INFO_ADDR: u64 = 0x6000;
const MODULES_ADDR: u64 = 0x6040;
const MEMORY_MAP_ADDR: u64 = 0x6080;

/// Writes the start info (version 1, with the memory map) and what it points to. Returns its
/// address.
pub(super) fn write_start_info(
    ram: &GuestRam,
    map: &[Entry],
    initrd: Option<&Range<u64>>,
) -> Result<u32, BootError> {
    let memory_map: Vec<_> = map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.addr,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES_ADDR } else { 0 },
        cmdline_paddr: COMMAND_LINE_ADDR,
        rsdp_paddr: super::acpi::RSDP_ADDR,
        memmap_paddr: MEMORY_MAP_ADDR,
        memmap_entries: memory_map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(START_INFO_ADDR));
    params.set_sections(&memory_map, GuestAddress(MEMORY_MAP_ADDR));
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.end - initrd.start,
            ..Default::default()
        };
        params.set_modules(&[module], GuestAddress(MODULES_ADDR));
    }
    PvhBootConfigurator::write_bootparams(&params, ram)
        .map_err(|error| BootError::Damaged(format!("no room for the PVH start info: {error}")))?;
    Ok(START_INFO_ADDR as u32)
}
