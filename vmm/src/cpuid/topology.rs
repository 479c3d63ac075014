//! What each vCPU is told about its place: one socket, in which every vCPU is a core with one
//! thread, as QEMU does it for a plain `-smp N`.

use super::Cpuid;
use crate::vcpu::CpuidEntry;
use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

/// Leaf 4 and 0x8000_001d: the caches' level, in bits 5 to 7.
const LAST_LEVEL: u32 = 3;

impl Cpuid {
    /// The table for one of `vcpus` vCPUs. Its index is its APIC ID.
    pub fn for_vcpu(&self, vcpu: u32, vcpus: u32) -> Self {
        let mut table = self.clone();
        let id_bits = vcpus.max(1).next_power_of_two().trailing_zeros();
        // Leaf 0xb is rewritten as a whole, and its successor 0x1f left out: it says no more.
        let has_topology = table.0.iter().any(|entry| entry.function == 0xb);
        table
            .0
            .retain(|entry| !matches!(entry.function, 0xb | 0x1f));
        for entry in &mut table.0 {
            adapt(entry, vcpu, vcpus, id_bits);
        }
        if has_topology {
            // Intel SDM, leaf 0xb: the shift to the next level's ID, the processors in it, its
            // type (1 thread, 2 core) with its number, and the x2APIC ID.
            for (index, shift, count, kind) in [(0, 0, 1, 1), (1, id_bits, vcpus, 2), (2, 0, 0, 0)]
            {
                table.0.push(CpuidEntry {
                    function: 0xb,
                    index,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax: shift,
                    ebx: count,
                    ecx: kind << 8 | index,
                    edx: vcpu,
                });
            }
        }
        table
    }
}

fn adapt(entry: &mut CpuidEntry, vcpu: u32, vcpus: u32, id_bits: u32) {
    const HT: u32 = 1 << 28;
    let cores = vcpus.max(1) - 1;
    match entry.function {
        1 => {
            // APIC ID and the number of IDs in the package; only valid with HT.
            let ids = (1u32 << id_bits).min(0xff);
            entry.ebx = entry.ebx & 0xffff | ids << 16 | vcpu << 24;
            entry.edx = if vcpus > 1 {
                entry.edx | HT
            } else {
                entry.edx & !HT
            };
        }
        // The processors that share the cache, less one, in bits 14 to 25; in leaf 4 the cores,
        // less one, in bits 26 to 31.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= LAST_LEVEL { cores } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing.min(0xfff) << 14;
            if entry.function == 4 {
                entry.eax |= ((1u32 << id_bits) - 1).min(0x3f) << 26;
            }
        }
        // Cores, less one, and the bits of a core's ID.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | cores.min(0xff) | id_bits.min(0xf) << 12,
        // APIC ID, core ID with one thread each, node 0 of one.
        0x8000_001e => {
            entry.eax = vcpu;
            entry.ebx = vcpu & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}
