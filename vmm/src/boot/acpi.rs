//! The ACPI tables: which processors, interrupt controllers and virtio devices there are, and how
//! to power off and reset. ACPI Specification 6.5, chapter 5.
//!
//! Kernels of distributions look for these only here. Everything else is a PC's as it always was,
//! and needs no description. acpi_tables writes the tables, but for the one whose PC parts it
//! doesn't know (the MADT).

mod dsdt;
mod madt;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::VirtioMmioSlot;

/// Where the tables begin, with the root pointer. Kernels that aren't told look for it from here on.
pub(super) const RSDP_ADDR: u64 = 0xe_0000;

/// The PM1a event block, with the power button, and the control register: QEMU's addresses.
const PM1A_EVENT: u16 = 0x600;
const PM1A_CONTROL: u16 = 0x604;
/// The reset control register, and what to write there.
const RESET_PORT: u16 = 0xcf9;
const RESET_VALUE: u8 = 6;
/// The interrupt of the PM1a event block.
const SCI: u8 = devices::power::SCI as u8;

const OEM_ID: [u8; 6] = *b"FERRY ";
const OEM_TABLE_ID: [u8; 8] = *b"FERRYVM ";
const OEM_REVISION: u32 = 1;

/// A table with this body behind its header (section 5.2.6).
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    /// The length of the header.
    const HEADER: u32 = 36;
    let mut table = Sdt::new(
        *signature,
        HEADER,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    bytes(&table)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed hardware (section 5.2.9): the registers for the power button, to power off and to reset.
fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    /// There are devices at legacy addresses, and a keyboard controller; no VGA, no CMOS alarm.
    const BOOT_ARCHITECTURE: u16 = 1 << 0 | 1 << 1 | 1 << 2;
    /// Latencies that are too high for C2 and C3.
    const NEVER: u16 = 0xffff;
    let register =
        |bits, access, port: u16| GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_64(facs)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // The flags say what is not fixed hardware: there is a power button, and nothing else.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    // There is no SMI command port: the machine is in ACPI mode all the time.
    fadt.sci_int = u16::from(SCI).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT).into();
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL).into();
    (fadt.pm1_evt_len, fadt.pm1_cnt_len) = (4, 2);
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (NEVER.into(), NEVER.into());
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = register(8, AccessSize::ByteAccess, RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.x_pm1a_evt_blk = register(32, AccessSize::WordAccess, PM1A_EVENT);
    fadt.x_pm1a_cnt_blk = register(16, AccessSize::WordAccess, PM1A_CONTROL);
    bytes(&fadt.finalize())
}

/// All tables for a machine with `vcpus` processors, to be put at [`RSDP_ADDR`].
pub(super) fn build(vcpus: u32, virtio_mmio: &[VirtioMmioSlot]) -> Vec<u8> {
    let mut all = vec![0; Rsdp::len()];
    let mut add = |table: Vec<u8>| {
        // The FACS must be at a multiple of 64, and it does the others no harm.
        all.resize(all.len().next_multiple_of(64), 0);
        let addr = RSDP_ADDR + all.len() as u64;
        all.extend_from_slice(&table);
        addr
    };
    let facs = add(bytes(&FACS::new()));
    let dsdt = add(table(b"DSDT", 2, &dsdt::body(virtio_mmio)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(add(fadt(facs, dsdt)));
    xsdt.add_entry(add(table(b"APIC", 5, &madt::body(vcpus))));
    let xsdt = add(bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    all.splice(..rsdp.len(), rsdp);
    all
}

#[cfg(test)]
mod tests;
