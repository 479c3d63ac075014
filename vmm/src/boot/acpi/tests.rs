use super::*;
use crate::boot::mp_table;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(number)
}

/// The table at that guest address, by its length.
fn unchecked(all: &[u8], addr: u64) -> &[u8] {
    let table = &all[(addr - RSDP_ADDR) as usize..];
    &table[..number::<4>(table, 4) as usize]
}

fn at(all: &[u8], addr: u64) -> &[u8] {
    let table = unchecked(all, addr);
    assert_eq!(sum(table), 0, "{:?}", &table[..4]);
    table
}

fn slots(count: usize) -> Vec<VirtioMmioSlot> {
    (0..count).filter_map(VirtioMmioSlot::of).collect()
}

#[test]
fn every_table_is_found_from_the_root_and_sums_to_zero() {
    for (vcpus, devices) in [(1, 0), (2, 1), (254, 16)] {
        let all = build(vcpus, &slots(devices));
        assert!(RSDP_ADDR + all.len() as u64 <= mp_table::ADDR);
        assert_eq!((&all[..8], all[15]), (&b"RSD PTR "[..], 2));
        assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
        let xsdt = at(&all, number::<8>(&all, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 16));
        let fadt = at(&all, number::<8>(xsdt, 36));
        assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 276));
        let facs_addr = number::<8>(fadt, 132);
        let facs = unchecked(&all, facs_addr);
        assert_eq!((&facs[..4], facs.len()), (&b"FACS"[..], 64));
        assert_eq!(facs_addr % 64, 0);
        let dsdt = at(&all, number::<8>(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        let madt = at(&all, number::<8>(xsdt, 44));
        assert_eq!((&madt[..4], madt[40]), (&b"APIC"[..], 1));
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

#[test]
fn the_fixed_hardware_is_the_power_button_power_off_and_reset() {
    let fadt = fadt(0xe_0040, 0xe_0080);
    assert_eq!(number::<2>(&fadt, 46), 9, "SCI");
    assert_eq!(number::<4>(&fadt, 48), 0, "no SMI command port");
    assert_eq!((number::<4>(&fadt, 56), fadt[88]), (0x600, 4), "PM1a event");
    assert_eq!(
        (number::<4>(&fadt, 64), fadt[89]),
        (0x604, 2),
        "PM1a control"
    );
    // Wbinvd works; no sleep button, no RTC wake-up; a reset register. Not set is bit 4: the power
    // button is fixed hardware.
    assert_eq!(number::<4>(&fadt, 112), 1 << 0 | 1 << 5 | 1 << 6 | 1 << 10);
    // Generic addresses: I/O space, bits, offset, access size, address.
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 0xf9, 0xc, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[128], 6);
    assert_eq!(fadt[148..160], [1, 32, 0, 2, 0, 6, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[172..184], [1, 16, 0, 2, 4, 6, 0, 0, 0, 0, 0, 0]);
}

/// As `iasl -d` shows it: Name (_S5, Package (0x04) {Zero, Zero, Zero, Zero}), and in Scope (_SB)
/// Device (VM01) with _HID "LNRO0005", _UID 1, _CCA One and _CRS of Memory32Fixed (ReadWrite,
/// 0xD0001000, 0x1000) and Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {6}.
#[test]
fn the_dsdt_has_soft_off_and_a_device_for_each_slot() {
    let nothing = dsdt::body(&[]);
    assert_eq!(nothing, b"\x08_S5_\x12\x06\x04\0\0\0\0\x10\x05_SB_");
    let body = dsdt::body(&slots(2));
    let device = b"VM01\
        \x08_HID\x0dLNRO0005\0\
        \x08_UID\x01\
        \x08_CCA\x01\
        \x08_CRS\x11\x1a\x0a\x17\
        \x86\x09\0\x01\0\x10\0\xd0\0\x10\0\0\
        \x89\x06\0\x03\x01\x06\0\0\0\
        \x79\0";
    let found = body.len() - device.len();
    assert_eq!(
        body[found..].escape_ascii().to_string(),
        device.escape_ascii().to_string()
    );
    let names = body.windows(8).filter(|part| part == b"LNRO0005");
    assert_eq!(names.count(), 2);
}
