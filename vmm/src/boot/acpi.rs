//! The ACPI tables: which processors and interrupt controllers there are, and how to power off and
//! reset. ACPI Specification 6.5, chapter 5.
//!
//! Kernels of distributions look for their processors only here. Everything else is a PC's as it
//! always was, and needs no description: nothing but the sleep state S5 is in the DSDT.

/// Where the tables begin, with the root pointer. Kernels that aren't told look for it from here on.
pub(super) const RSDP_ADDR: u64 = 0xe_0000;

const IO_APIC_ADDR: u32 = 0xfec0_0000;
const LOCAL_APIC_ADDR: u32 = 0xfee0_0000;
/// The PM1a event block, of which nothing is used, and the control register: QEMU's addresses.
const PM1A_EVENT: u16 = 0x600;
const PM1A_CONTROL: u16 = 0x604;
/// The reset control register, and what to write there.
const RESET_PORT: u16 = 0xcf9;
const RESET_VALUE: u8 = 6;
/// The interrupt of the PM1a event block.
const SCI: u8 = 9;

const RSDP_LEN: usize = 36;
const HEADER_LEN: usize = 36;
const FADT_LEN: usize = 276;

/// Where each table's sum of bytes is made zero.
const CHECKSUM_AT: usize = 9;

/// A table: its header (section 5.2.6) and its contents.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Vec::from(signature);
    table.extend_from_slice(&((HEADER_LEN + body.len()) as u32).to_le_bytes());
    table.extend_from_slice(&[revision, 0]);
    table.extend_from_slice(b"FERRY ");
    table.extend_from_slice(b"FERRYVM ");
    table.extend_from_slice(&1u32.to_le_bytes());
    table.extend_from_slice(b"FERR");
    table.extend_from_slice(&1u32.to_le_bytes());
    table.extend_from_slice(body);
    make_sum_zero(&mut table, CHECKSUM_AT);
    table
}

fn make_sum_zero(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

/// AML for `Name (\_S5, Package () {0, 0, 0, 0})`: the sleep type of soft off is 0.
const DSDT: &[u8] = b"\x08_S5_\x12\x06\x04\x00\x00\x00\x00";

/// Processors and interrupt controllers (section 5.2.12).
fn madt(vcpus: u32) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&LOCAL_APIC_ADDR.to_le_bytes());
    body.extend_from_slice(&1u32.to_le_bytes()); // There are PICs, too.
    for id in 0..vcpus.min(254) as u8 {
        // Local APIC: the processor's UID, its APIC ID, enabled.
        body.extend_from_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // I/O APIC, for the interrupts from 0 on. KVM's default routing has each at the pin of its
    // number, the PIT's too, so there is no override for that.
    body.extend_from_slice(&[1, 12, vcpus.min(254) as u8, 0]);
    body.extend_from_slice(&IO_APIC_ADDR.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // The SCI: ISA interrupt 9, at its own pin, active high and level-triggered.
    body.extend_from_slice(&[2, 10, 0, SCI, SCI, 0, 0, 0, 0xd, 0]);
    // NMI at every local APIC's LINT1.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    table(b"APIC", 5, &body)
}

/// Fixed hardware (section 5.2.9): only the registers to power off and to reset.
fn fadt(dsdt: u64) -> Vec<u8> {
    /// Invalidating caches with WBINVD works; the buttons are no fixed hardware; there is no
    /// timer of the power management's; there is a reset register.
    const FLAGS: u32 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 10;
    /// There are devices at legacy addresses, and a keyboard controller; no VGA, no CMOS alarm.
    const BOOT_ARCHITECTURE: u16 = 1 << 0 | 1 << 1 | 1 << 2;
    const SYSTEM_IO: u8 = 1;
    let mut fadt = vec![0; FADT_LEN];
    let mut set = |at: usize, bytes: &[u8]| {
        if let Some(place) = fadt.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    // Addresses in I/O space come as a number, and as a generic address: space, bits, offset,
    // access size, address.
    let generic = |bits: u8, access: u8, port: u16| {
        let mut address = [SYSTEM_IO, bits, 0, access, 0, 0, 0, 0, 0, 0, 0, 0];
        let [low, high] = port.to_le_bytes();
        (address[4], address[5]) = (low, high);
        address
    };
    set(40, &(dsdt as u32).to_le_bytes());
    set(46, &u16::from(SCI).to_le_bytes());
    set(56, &u32::from(PM1A_EVENT).to_le_bytes());
    set(64, &u32::from(PM1A_CONTROL).to_le_bytes());
    set(88, &[4, 2]); // The two registers' lengths.
    set(96, &[0xff, 0xff, 0xff, 0xff]); // No C2, no C3: latencies too high.
    set(109, &BOOT_ARCHITECTURE.to_le_bytes());
    set(112, &FLAGS.to_le_bytes());
    set(116, &generic(8, 1, RESET_PORT));
    set(128, &[RESET_VALUE]);
    set(131, &[5]); // Minor version.
    set(140, &dsdt.to_le_bytes());
    set(148, &generic(32, 2, PM1A_EVENT));
    set(172, &generic(16, 2, PM1A_CONTROL));
    let body = fadt.get(HEADER_LEN..).unwrap_or_default();
    table(b"FACP", 6, body)
}

/// All tables for a machine with `vcpus` processors, to be put at [`RSDP_ADDR`].
pub(super) fn build(vcpus: u32) -> Vec<u8> {
    let mut bytes = vec![0; RSDP_LEN];
    let mut add = |table: Vec<u8>| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let addr = RSDP_ADDR + bytes.len() as u64;
        bytes.extend_from_slice(&table);
        addr
    };
    let dsdt = add(table(b"DSDT", 2, DSDT));
    let tables = [add(fadt(dsdt)), add(madt(vcpus))];
    let list: Vec<u8> = tables.iter().flat_map(|addr| addr.to_le_bytes()).collect();
    let xsdt = add(table(b"XSDT", 1, &list));

    // The root pointer (section 5.2.5), revision 2, without an RSDT.
    let mut rsdp = Vec::from(*b"RSD PTR \0FERRY \x02\0\0\0\0");
    make_sum_zero(&mut rsdp, 8);
    rsdp.extend_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    rsdp.extend_from_slice(&xsdt.to_le_bytes());
    rsdp.extend_from_slice(&[0; 4]);
    make_sum_zero(&mut rsdp, 32);
    for (to, from) in bytes.iter_mut().zip(rsdp) {
        *to = from;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
        let mut number = [0; 8];
        number[..N].copy_from_slice(&bytes[at..at + N]);
        u64::from_le_bytes(number)
    }

    /// The table at that guest address.
    fn at(all: &[u8], addr: u64) -> &[u8] {
        let table = &all[(addr - RSDP_ADDR) as usize..];
        let table = &table[..number::<4>(table, 4) as usize];
        assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        table
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sums_to_zero() {
        for vcpus in [1, 2, 254] {
            let all = build(vcpus);
            assert!(RSDP_ADDR + all.len() as u64 <= super::super::mp_table::ADDR);
            assert_eq!((&all[..8], all[15]), (&b"RSD PTR "[..], 2));
            assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
            let xsdt = at(&all, number::<8>(&all, 24));
            assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 16));
            let fadt = at(&all, number::<8>(xsdt, 36));
            assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 276));
            assert_eq!((number::<4>(fadt, 64), fadt[89]), (0x604, 2));
            assert_eq!((number::<8>(fadt, 120), fadt[128]), (0xcf9, 6));
            let dsdt = at(&all, number::<8>(fadt, 140));
            assert_eq!(&dsdt[..4], b"DSDT");
            let madt = at(&all, number::<8>(xsdt, 44));
            assert_eq!(&madt[..4], b"APIC");
            let mut rest = &madt[44..];
            let mut ids = vec![];
            while let Some(&kind) = rest.first() {
                if kind == 0 {
                    ids.push(u32::from(rest[3]));
                }
                rest = &rest[usize::from(rest[1])..];
            }
            assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
        }
    }
}
