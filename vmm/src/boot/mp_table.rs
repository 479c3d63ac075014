//! The table that tells a guest its processors and interrupt wiring: Intel MultiProcessor
//! Specification 1.4, chapter 4. Linux looks for it between 0xf_0000 and 1 MiB.

/// Where the table is. The floating pointer comes first, and points behind itself.
pub(super) const ADDR: u64 = 0xf_0000;

const SPECIFICATION: u8 = 4; // Version 1.4
const IO_APIC_ADDR: u32 = 0xfec0_0000;
const LOCAL_APIC_ADDR: u32 = 0xfee0_0000;
/// Of KVM's local APICs and I/O APIC.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
/// The pins of the I/O APIC. The ISA bus has interrupts up to 15 only, but kernels take any from it,
/// and as they do those: edge-triggered, active high.
const PINS: u8 = 24;
const FLOATING_POINTER_LEN: usize = 16;

/// Makes the last sum of all bytes zero by setting the byte at `at`.
fn check_sum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

/// The floating pointer and the configuration table for `vcpus` processors, whose APIC IDs are
/// their numbers.
pub(super) fn build(vcpus: u32) -> Vec<u8> {
    let io_apic_id = vcpus.min(254) as u8;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..io_apic_id {
        // Enabled; the first is the one that boots. Signature and features are CPUID's to tell.
        let flags = if id == 0 { 3 } else { 1 };
        let mut processor = [0; 20];
        processor[1] = id;
        processor[2] = LOCAL_APIC_VERSION;
        processor[3] = flags;
        entry(&processor);
    }
    entry(b"\x01\x00ISA   ");
    let mut io_apic = [2, io_apic_id, IO_APIC_VERSION, 1, 0, 0, 0, 0];
    io_apic[4..].copy_from_slice(&IO_APIC_ADDR.to_le_bytes());
    entry(&io_apic);
    for irq in 0..PINS {
        // KVM's default routing: each line to the pin of its number, the PIT's too (PCs have that at
        // pin 2). The line of the PICs' cascade is nobody's.
        if irq != 2 {
            entry(&[3, 0, 0, 0, 0, irq, io_apic_id, irq]);
        }
    }
    // The PICs' output, and NMI, at every local APIC's LINT0 and LINT1.
    entry(&[4, 3, 0, 0, 0, 0, 0, 0]);
    entry(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut table = Vec::from(*b"PCMP");
    let len = 44 + entries.len() as u16;
    table.extend_from_slice(&len.to_le_bytes());
    table.extend_from_slice(&[SPECIFICATION, 0]);
    table.extend_from_slice(b"FERRY   ");
    table.extend_from_slice(b"FERRY VM    ");
    table.extend_from_slice(&[0; 6]); // No OEM table.
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC_ADDR.to_le_bytes());
    table.extend_from_slice(&[0; 4]); // No extended table.
    table.append(&mut entries);
    check_sum(&mut table, 7);

    let mut bytes = Vec::from(*b"_MP_");
    let table_addr = ADDR as u32 + FLOATING_POINTER_LEN as u32;
    bytes.extend_from_slice(&table_addr.to_le_bytes());
    // One paragraph long; no default configuration, no IMCR.
    bytes.extend_from_slice(&[1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    check_sum(&mut bytes, 10);
    bytes.append(&mut table);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_table_is_well_formed_and_names_every_processor() {
        for vcpus in [1, 2, 254] {
            let bytes = build(vcpus);
            assert!(ADDR as usize + bytes.len() <= 1 << 20);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!((sum(pointer), sum(table)), (0, 0));
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(
                u16::from_le_bytes([table[4], table[5]]) as usize,
                table.len()
            );
            let mut rest = &table[44..];
            let (mut entries, mut ids, mut pins) = (0, vec![], vec![]);
            while let Some(&kind) = rest.first() {
                if kind == 0 {
                    ids.push(u32::from(rest[1]));
                }
                if kind == 3 {
                    assert_eq!(rest[5], rest[7]);
                    pins.push(rest[7]);
                }
                rest = &rest[if kind == 0 { 20 } else { 8 }..];
                entries += 1;
            }
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), entries);
            assert_eq!(ids, (0..vcpus).collect::<Vec<_>>());
            assert_eq!(pins, (0..24).filter(|pin| *pin != 2).collect::<Vec<_>>());
        }
    }
}
