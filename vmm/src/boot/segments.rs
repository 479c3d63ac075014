//! The GDT and the segment registers at the kernel's entry.
//!
//! Descriptors: Intel SDM volume 3, section 3.4.5. The selectors are those that Linux's 64-bit boot
//! protocol asks for; PVH leaves them open.

use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};

/// Where the GDT is.
pub(super) const GDT_ADDR: u64 = 0x500;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Execute/read, accessed.
const CODE: u8 = 0xb;
/// Read/write, accessed.
const DATA: u8 = 0x3;
/// A busy TSS; with a 32-bit limit of 0x67 in either mode.
const TASK: u8 = 0xb;

/// A flat segment of the whole address space.
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        // A 64-bit code segment must not be 32-bit too.
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn task() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: TASK,
        present: 1,
        ..Default::default()
    }
}

/// The descriptor that loads the segment.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flags = u64::from(segment.g) << 15
        | u64::from(segment.db) << 14
        | u64::from(segment.l) << 13
        | u64::from(segment.present) << 7
        | u64::from(segment.dpl) << 5
        | u64::from(segment.s) << 4
        | u64::from(segment.type_);
    (segment.base & 0xff00_0000) << 32
        | (segment.base & 0x00ff_ffff) << 16
        | (limit & 0xf_0000) << 32
        | (limit & 0xffff)
        | flags << 40
}

/// The GDT's contents: unused, unused, code (64-bit or 32-bit), data, task.
pub(super) fn gdt(long: bool) -> Vec<u8> {
    let entries = [
        0,
        0,
        descriptor(&flat(CODE_SELECTOR, CODE, long)),
        descriptor(&flat(DATA_SELECTOR, DATA, false)),
        descriptor(&task()),
    ];
    entries
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect()
}

fn set_segments(sregs: &mut kvm_sregs, long: bool) {
    let data = flat(DATA_SELECTOR, DATA, false);
    sregs.cs = flat(CODE_SELECTOR, CODE, long);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = task();
    sregs.gdt = kvm_dtable {
        base: GDT_ADDR,
        limit: gdt(long).len() as u16 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
}

/// 32-bit protected mode, paging off.
pub(super) fn protected_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs, false);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// 64-bit mode with the page tables at `cr3`.
pub(super) fn long_mode(sregs: &mut kvm_sregs, cr3: u64) {
    set_segments(sregs, true);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = cr3;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_encoded_as_the_processor_reads_them() {
        assert_eq!(
            descriptor(&flat(CODE_SELECTOR, CODE, true)),
            0x00af_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&flat(DATA_SELECTOR, DATA, false)),
            0x00cf_9300_0000_ffff
        );
        assert_eq!(descriptor(&task()), 0x0000_8b00_0000_0067);
    }
}
