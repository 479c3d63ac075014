//! The DSDT: what is described by code (AML, chapter 20), here all of it constants.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};

use super::{VirtioMmioSlot, bytes};

/// What Linux and EDK2 know virtio-mmio devices by.
const VIRTIO_MMIO: &str = "LNRO0005";

/// The table without its header: soft off, and the virtio devices.
pub(super) fn body(virtio_mmio: &[VirtioMmioSlot]) -> Vec<u8> {
    // The sleep type of soft off is 0.
    let soft_off = Package::new(vec![&ZERO, &ZERO, &ZERO, &ZERO]);
    let mut body = bytes(&Name::new(Path::new("_S5_"), &soft_off));
    // \_SB, the root of all devices.
    let devices = virtio_mmio.iter().enumerate();
    let devices = devices.flat_map(|(number, slot)| device(number, slot));
    body.append(&mut Scope::raw(Path::new("_SB_"), devices.collect()));
    body
}

fn device(number: usize, slot: &VirtioMmioSlot) -> Vec<u8> {
    // Slots lie below 4 GiB.
    let registers = Memory32Fixed::new(true, slot.addr as u32, VirtioMmioSlot::LEN as u32);
    // The device takes it; edge-triggered, active high, not shared.
    let interrupt = Interrupt::new(true, true, false, false, slot.gsi);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let constants = [
        Name::new(Path::new("_HID"), &VIRTIO_MMIO),
        Name::new(Path::new("_UID"), &number),
        // It sees memory as the processors do.
        Name::new(Path::new("_CCA"), &ONE),
        Name::new(Path::new("_CRS"), &resources),
    ];
    let constants = constants.iter().map(|name| name as &dyn Aml).collect();
    bytes(&Device::new(
        Path::new(&format!("VM{number:02X}")),
        constants,
    ))
}
