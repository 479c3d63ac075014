//! What the guest sees of its processor.
//!
//! A [`Model`] is what the user asked for; on a host it becomes a [`Cpuid`], the answers that KVM
//! gives to the guest's CPUID instructions, a table with one row for each leaf. [`compatibility`]
//! says whether a guest that sees one table can go on where the host supports another.

mod compatibility;
mod features;
mod model;
mod topology;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, VcpuFd};
use serde::{Deserialize, Serialize};

pub use compatibility::{GuestCpu, HostCpu, compatibility};
pub use features::{Feature, Register, Word};
pub use model::{Base, Model, ModelError};

use crate::kvm::{IoctlError, Kvm};
use crate::vcpu::CpuidEntry;

/// The most rows that KVM takes.
pub const MAX_ENTRIES: usize = 256;

/// What CPUID answers. Rows are in the order that KVM gave them in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpuid(Vec<CpuidEntry>);

impl Cpuid {
    /// What this host's KVM supports, and what the VMM adds because of how it builds machines.
    pub fn supported(kvm: &Kvm) -> Result<Self, IoctlError> {
        let supported = kvm
            .fd()
            .get_supported_cpuid(MAX_ENTRIES)
            .map_err(IoctlError::named("KVM_GET_SUPPORTED_CPUID"))?;
        let mut table = Self::from_kvm(supported.as_slice());
        // KVM doesn't list what depends on how the VM is built: here, with local APICs in KVM.
        table.set(features::LEAF_1_ECX, 31, true); // hypervisor
        table.set(features::LEAF_1_ECX, 21, true); // x2apic
        if kvm.fd().check_extension(Cap::TscDeadlineTimer) {
            table.set(features::LEAF_1_ECX, 24, true);
        }
        table.set(features::LEAF_6_EAX, 2, true); // arat: the APIC's timer never stops
        Ok(table)
    }

    /// A table in KVM's form.
    pub fn from_kvm(entries: &[kvm_cpuid_entry2]) -> Self {
        Self(entries.iter().map(|&entry| entry.into()).collect())
    }

    /// KVM's form of the table.
    pub fn to_kvm(&self) -> Vec<kvm_cpuid_entry2> {
        self.0.iter().map(|entry| entry.clone().into()).collect()
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn entry(&self, function: u32, index: u32) -> Option<&CpuidEntry> {
        self.0.iter().find(|entry| answers(entry, function, index))
    }

    fn entry_mut(&mut self, function: u32, index: u32) -> Option<&mut CpuidEntry> {
        self.0
            .iter_mut()
            .find(|entry| answers(entry, function, index))
    }

    /// A word of features; 0 if there is no such leaf.
    pub fn word(&self, word: Word) -> u32 {
        self.entry(word.function, word.index)
            .map_or(0, |entry| match word.register {
                Register::Eax => entry.eax,
                Register::Ebx => entry.ebx,
                Register::Ecx => entry.ecx,
                Register::Edx => entry.edx,
            })
    }

    fn word_mut(&mut self, word: Word) -> Option<&mut u32> {
        self.entry_mut(word.function, word.index)
            .map(|entry| match word.register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            })
    }

    /// Whether the guest sees the feature.
    pub fn has(&self, feature: Feature) -> bool {
        self.word(feature.word) >> feature.bit & 1 == 1
    }

    /// Sets or clears a bit. A leaf that isn't there is added for one that is to be set.
    fn set(&mut self, word: Word, bit: u32, on: bool) {
        if on && self.entry(word.function, word.index).is_none() {
            self.0.push(CpuidEntry {
                function: word.function,
                index: word.index,
                flags: if has_subleaves(word.function) {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                },
                ..Default::default()
            });
        }
        if let Some(value) = self.word_mut(word) {
            *value = *value & !(1 << bit) | u32::from(on) << bit;
        }
    }

    /// The vendor, such as `GenuineIntel`.
    pub fn vendor(&self) -> String {
        let Some(entry) = self.entry(0, 0) else {
            return String::new();
        };
        let bytes = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
        String::from_utf8_lossy(&bytes.concat()).into_owned()
    }
}

fn answers(entry: &CpuidEntry, function: u32, index: u32) -> bool {
    entry.function == function
        && (entry.index == index || entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0)
}

fn has_subleaves(function: u32) -> bool {
    matches!(function, 4 | 7 | 0xb | 0xd | 0xf..=0x12 | 0x14 | 0x17 | 0x18 | 0x1d..=0x20 | 0x8000_001d)
}

/// Whether a guest that sees this could run guests of its own.
pub(crate) fn has_nested_virtualization(entries: &[kvm_cpuid_entry2]) -> bool {
    let table = Cpuid::from_kvm(entries);
    let has = |word, bit| table.has(Feature { word, bit });
    has(features::LEAF_1_ECX, 5) || has(features::EXTENDED_1_ECX, 2)
}

/// Sets what a vCPU's CPUID answers, and returns what the guest will really see: some KVMs add
/// bits of the host's that they can't hide.
pub(crate) fn set(
    vcpu: &VcpuFd,
    entries: &[kvm_cpuid_entry2],
) -> Result<Vec<kvm_cpuid_entry2>, IoctlError> {
    let too_many = |_| IoctlError {
        name: "KVM_SET_CPUID2",
        source: std::io::Error::from_raw_os_error(libc::E2BIG),
    };
    let table = CpuId::from_entries(entries).map_err(too_many)?;
    vcpu.set_cpuid2(&table)
        .map_err(IoctlError::named("KVM_SET_CPUID2"))?;
    let seen = vcpu
        .get_cpuid2(MAX_ENTRIES)
        .map_err(IoctlError::named("KVM_GET_CPUID2"))?;
    Ok(seen.as_slice().to_vec())
}

#[cfg(test)]
mod tests;
