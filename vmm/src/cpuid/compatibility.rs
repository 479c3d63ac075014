//! Whether a guest can go on on another host, from what it sees of its processor.

use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use super::features::{LEAF_1_ECX, LEAF_1_EDX, LEAF_7_ECX, WORDS};
use super::{Cpuid, Feature, Register, Word};
use crate::clock::tsc_matches;
use crate::kvm::{IoctlError, Kvm};

/// What a guest sees and relies on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCpu {
    /// What CPUID answers, as read back from KVM.
    pub cpuid: Cpuid,
    /// The frequency of its TSC in kHz.
    pub tsc_khz: u32,
}

/// What a host can give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpu {
    /// Every bit that a guest can see here.
    pub supported: Cpuid,
    /// The frequency of its own TSC in kHz.
    pub tsc_khz: u32,
    /// Whether a guest's TSC can have another frequency.
    pub tsc_control: bool,
}

impl HostCpu {
    /// Asks KVM. A vCPU is made and thrown away, because some KVMs show a guest more of the host
    /// than they list as supported.
    pub fn probe(kvm: &Kvm) -> Result<Self, IoctlError> {
        let mut supported = Cpuid::supported(kvm)?;
        let vm = kvm.create_vm()?;
        let vcpu = vm
            .create_vcpu(0)
            .map_err(IoctlError::named("KVM_CREATE_VCPU"))?;
        let seen = Cpuid::from_kvm(&super::set(&vcpu, &supported.to_kvm())?);
        for (word, _) in WORDS {
            for bit in bits_of(seen.word(*word)) {
                supported.set(*word, bit, true);
            }
        }
        Ok(Self {
            supported,
            tsc_khz: vcpu
                .get_tsc_khz()
                .map_err(IoctlError::named("KVM_GET_TSC_KHZ"))?,
            tsc_control: vm.check_extension(Cap::TscControl),
        })
    }
}

/// Bits that tell the state of a control register, or that the VMM makes itself: never a reason.
const NOT_FEATURES: &[(Word, u32)] = &[
    (LEAF_1_EDX, 1 << 9 | 1 << 28),  // apic, ht
    (LEAF_1_ECX, 1 << 27 | 1 << 31), // osxsave, hypervisor
    (LEAF_7_ECX, 1 << 4),            // ospke
];

fn bits_of(value: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |bit| value >> bit & 1 == 1)
}

/// Every reason why the guest can't go on at the destination; none if it can.
pub fn compatibility(guest: &GuestCpu, host: &HostCpu) -> Vec<String> {
    let mut reasons = Vec::new();
    let (vendor, here) = (guest.cpuid.vendor(), host.supported.vendor());
    if vendor != here {
        reasons.push(format!(
            "the guest's processor is from {vendor:?}, the destination's from {here:?}"
        ));
    }
    for (word, _) in WORDS {
        let ignored = NOT_FEATURES.iter().find(|(other, _)| other == word);
        let ignored = ignored.map_or(0, |(_, bits)| *bits);
        let missing = guest.cpuid.word(*word) & !host.supported.word(*word) & !ignored;
        for bit in bits_of(missing) {
            reasons.push(format!(
                "destination lacks {}",
                Feature { word: *word, bit }
            ));
        }
    }
    reasons.extend(missing_components(&guest.cpuid, &host.supported));
    if !host.tsc_control && !tsc_matches(guest.tsc_khz, host.tsc_khz) {
        reasons.push(format!(
            "the guest's TSC runs at {} kHz, the destination's at {} kHz, and its KVM cannot scale \
             it",
            guest.tsc_khz, host.tsc_khz
        ));
    }
    reasons
}

/// The XSAVE state components that the guest may have enabled and the host lacks.
fn missing_components(guest: &Cpuid, host: &Cpuid) -> Vec<String> {
    const NAMES: &[(u32, &str)] = &[
        (0, "x87"),
        (1, "SSE"),
        (2, "AVX"),
        (3, "MPX bounds registers"),
        (4, "MPX configuration"),
        (5, "AVX-512 mask registers"),
        (6, "AVX-512 upper halves of ZMM0-15"),
        (7, "AVX-512 ZMM16-31"),
        (9, "PKRU"),
        (17, "AMX configuration"),
        (18, "AMX tiles"),
    ];
    let components = |table: &Cpuid, register| {
        table.word(Word {
            function: 0xd,
            index: 0,
            register,
        })
    };
    let mut reasons = Vec::new();
    for (register, first) in [(Register::Eax, 0), (Register::Edx, 32)] {
        for bit in bits_of(components(guest, register) & !components(host, register)) {
            let number = first + bit;
            let name = NAMES.iter().find(|(component, _)| *component == number);
            let name = name.map_or(String::new(), |(_, name)| format!(" ({name})"));
            reasons.push(format!(
                "destination lacks XSAVE state component {number}{name}"
            ));
        }
    }
    reasons
}
