//! The MADT: processors and interrupt controllers (section 5.2.12).

use super::SCI;

const IO_APIC_ADDR: u32 = 0xfec0_0000;
const LOCAL_APIC_ADDR: u32 = 0xfee0_0000;

/// The table for `vcpus` processors, without its header.
pub(super) fn body(vcpus: u32) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&LOCAL_APIC_ADDR.to_le_bytes());
    body.extend_from_slice(&1u32.to_le_bytes()); // There are PICs, too.
    let io_apic_id = vcpus.min(254) as u8;
    for id in 0..io_apic_id {
        // Local APIC: the processor's UID, its APIC ID, enabled.
        body.extend_from_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // I/O APIC, for the interrupts from 0 on. KVM's default routing has each at the pin of its
    // number, the PIT's too, so there is no override for that.
    body.extend_from_slice(&[1, 12, io_apic_id, 0]);
    body.extend_from_slice(&IO_APIC_ADDR.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // The SCI: ISA interrupt 9, at its own pin, active high and level-triggered.
    body.extend_from_slice(&[2, 10, 0, SCI, SCI, 0, 0, 0, 0xd, 0]);
    // NMI at every local APIC's LINT1.
    body.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    body
}
