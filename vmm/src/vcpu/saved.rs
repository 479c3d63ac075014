//! The saved form of a vCPU's registers: types of our own, with a conversion in each direction
//! that names every field, so that none can be forgotten when KVM's structures grow.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

/// Defines a saved struct with fields of the same names and types as a KVM structure's, and both
/// conversions. `ignore` names the fields that carry nothing, and their value.
macro_rules! saved {
    (
        $(#[$doc:meta])*
        $name:ident = $kvm:ident { $($field:ident: $type:ty),* $(,)? }
        ignore { $($padding:ident: $zero:expr),* }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub(crate) struct $name { $(pub(crate) $field: $type),* }

        impl From<$kvm> for $name {
            fn from($kvm { $($field,)* $($padding: _,)* }: $kvm) -> Self {
                Self { $($field: $field.into()),* }
            }
        }

        impl From<$name> for $kvm {
            fn from($name { $($field),* }: $name) -> Self {
                Self { $($field: $field.into(),)* $($padding: $zero,)* }
            }
        }
    };
}

saved! {
    /// General registers.
    Regs = kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64,
    } ignore {}
}

saved! {
    /// A segment register with its hidden part.
    Segment = kvm_segment {
        base: u64, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8,
        l: u8, g: u8, avl: u8, unusable: u8,
    } ignore { padding: 0 }
}

saved! {
    /// GDTR or IDTR.
    Table = kvm_dtable { base: u64, limit: u16 } ignore { padding: [0; 3] }
}

saved! {
    /// Segments, control registers and, for PAE paging, the page directory pointers.
    Sregs = kvm_sregs2 {
        cs: Segment, ds: Segment, es: Segment, fs: Segment, gs: Segment, ss: Segment,
        tr: Segment, ldt: Segment, gdt: Table, idt: Table,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
        flags: u64, pdptrs: [u64; 4],
    } ignore {}
}

/// Makes one of KVM's two structures of these registers from the other: most fields are in both.
macro_rules! sregs {
    ($sregs:expr, $from:ident less { $($dropped:ident),* }, $to:ident more { $($more:tt)* }) => {{
        let $from {
            cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt,
            cr0, cr2, cr3, cr4, cr8, efer, apic_base,
            $($dropped: _,)*
        } = $sregs;
        $to {
            cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt,
            cr0, cr2, cr3, cr4, cr8, efer, apic_base,
            $($more)*
        }
    }};
}

/// From a KVM without `KVM_GET_SREGS2`: `flags` says that there are no pointers. The bitmap of the
/// interrupt that is being delivered is part of the vCPU events.
impl From<kvm_sregs> for Sregs {
    fn from(old: kvm_sregs) -> Self {
        let new = sregs!(
            old, kvm_sregs less { interrupt_bitmap },
            kvm_sregs2 more { flags: 0, pdptrs: [0; 4] }
        );
        new.into()
    }
}

/// For a KVM without `KVM_SET_SREGS2`: it reads the pointers from guest memory.
impl From<Sregs> for kvm_sregs {
    fn from(sregs: Sregs) -> Self {
        sregs!(
            sregs.into(), kvm_sregs2 less { flags, pdptrs },
            kvm_sregs more { interrupt_bitmap: [0; 4] }
        )
    }
}

saved! {
    /// The debug registers.
    DebugRegs = kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64 }
    ignore { reserved: [0; 9] }
}

saved! {
    /// One MSR.
    Msr = kvm_msr_entry { index: u32, data: u64 } ignore { reserved: 0 }
}

saved! {
    /// One extended control register.
    Xcr = kvm_xcr { xcr: u32, value: u64 } ignore { reserved: 0 }
}

saved! {
    /// One leaf of what CPUID answers.
    CpuidEntry = kvm_cpuid_entry2 {
        function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32,
    } ignore { padding: [0; 3] }
}

/// The extended control registers that KVM has, at most 16.
pub(super) fn xcrs_from(xcrs: &kvm_xcrs) -> Vec<Xcr> {
    let count = xcrs.nr_xcrs as usize;
    xcrs.xcrs
        .iter()
        .take(count)
        .map(|&xcr| xcr.into())
        .collect()
}

/// The reverse of [`xcrs_from`]; what is too much is left out.
pub(super) fn xcrs_into(saved: &[Xcr]) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs::default();
    for (to, from) in xcrs.xcrs.iter_mut().zip(saved) {
        *to = from.clone().into();
        xcrs.nr_xcrs += 1;
    }
    xcrs
}

/// The local APIC's page of registers.
pub(super) fn lapic_from(lapic: &kvm_lapic_state) -> Vec<u8> {
    lapic.regs.iter().map(|&byte| byte as u8).collect()
}

/// The reverse of [`lapic_from`].
pub(super) fn lapic_into(saved: &[u8]) -> kvm_lapic_state {
    let mut lapic = kvm_lapic_state::default();
    for (to, from) in lapic.regs.iter_mut().zip(saved) {
        *to = *from as i8;
    }
    lapic
}

/// Events that are pending or being delivered. Flat: KVM's structure is nested.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Events {
    flags: u32,
    exception_injected: u8,
    exception_nr: u8,
    exception_has_error_code: u8,
    exception_pending: u8,
    exception_error_code: u32,
    exception_has_payload: u8,
    exception_payload: u64,
    interrupt_injected: u8,
    interrupt_nr: u8,
    interrupt_soft: u8,
    interrupt_shadow: u8,
    nmi_injected: u8,
    nmi_pending: u8,
    nmi_masked: u8,
    sipi_vector: u32,
    smi_smm: u8,
    smi_pending: u8,
    smi_inside_nmi: u8,
    smi_latched_init: u8,
    triple_fault_pending: u8,
}

impl From<kvm_vcpu_events> for Events {
    fn from(events: kvm_vcpu_events) -> Self {
        let kvm_vcpu_events {
            exception,
            interrupt,
            nmi,
            sipi_vector,
            flags,
            smi,
            triple_fault,
            reserved: _,
            exception_has_payload,
            exception_payload,
        } = events;
        Self {
            flags,
            exception_injected: exception.injected,
            exception_nr: exception.nr,
            exception_has_error_code: exception.has_error_code,
            exception_pending: exception.pending,
            exception_error_code: exception.error_code,
            exception_has_payload,
            exception_payload,
            interrupt_injected: interrupt.injected,
            interrupt_nr: interrupt.nr,
            interrupt_soft: interrupt.soft,
            interrupt_shadow: interrupt.shadow,
            nmi_injected: nmi.injected,
            nmi_pending: nmi.pending,
            nmi_masked: nmi.masked,
            sipi_vector,
            smi_smm: smi.smm,
            smi_pending: smi.pending,
            smi_inside_nmi: smi.smm_inside_nmi,
            smi_latched_init: smi.latched_init,
            triple_fault_pending: triple_fault.pending,
        }
    }
}

impl From<Events> for kvm_vcpu_events {
    fn from(saved: Events) -> Self {
        let Events {
            flags,
            exception_injected,
            exception_nr,
            exception_has_error_code,
            exception_pending,
            exception_error_code,
            exception_has_payload,
            exception_payload,
            interrupt_injected,
            interrupt_nr,
            interrupt_soft,
            interrupt_shadow,
            nmi_injected,
            nmi_pending,
            nmi_masked,
            sipi_vector,
            smi_smm,
            smi_pending,
            smi_inside_nmi,
            smi_latched_init,
            triple_fault_pending,
        } = saved;
        let mut events = Self {
            sipi_vector,
            flags,
            exception_has_payload,
            exception_payload,
            ..Default::default()
        };
        events.exception.injected = exception_injected;
        events.exception.nr = exception_nr;
        events.exception.has_error_code = exception_has_error_code;
        events.exception.pending = exception_pending;
        events.exception.error_code = exception_error_code;
        events.interrupt.injected = interrupt_injected;
        events.interrupt.nr = interrupt_nr;
        events.interrupt.soft = interrupt_soft;
        events.interrupt.shadow = interrupt_shadow;
        events.nmi.injected = nmi_injected;
        events.nmi.pending = nmi_pending;
        events.nmi.masked = nmi_masked;
        events.smi.smm = smi_smm;
        events.smi.pending = smi_pending;
        events.smi.smm_inside_nmi = smi_inside_nmi;
        events.smi.latched_init = smi_latched_init;
        events.triple_fault.pending = triple_fault_pending;
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_way_there_and_back() {
        // Every field another value, so that two that are mixed up show.
        let saved = Events {
            flags: 1,
            exception_injected: 2,
            exception_nr: 3,
            exception_has_error_code: 4,
            exception_pending: 5,
            exception_error_code: 6,
            exception_has_payload: 7,
            exception_payload: 8,
            interrupt_injected: 9,
            interrupt_nr: 10,
            interrupt_soft: 11,
            interrupt_shadow: 12,
            nmi_injected: 13,
            nmi_pending: 14,
            nmi_masked: 15,
            sipi_vector: 16,
            smi_smm: 17,
            smi_pending: 18,
            smi_inside_nmi: 19,
            smi_latched_init: 20,
            triple_fault_pending: 21,
        };
        let kvm: kvm_vcpu_events = saved.clone().into();
        assert_eq!(Events::from(kvm), saved);
        assert_eq!((kvm.nmi.pending, kvm.smi.pending), (14, 18));
    }

    #[test]
    fn sregs_without_pointers_say_so() {
        let sregs = kvm_sregs {
            cr4: 0x20,
            efer: 0x500,
            ..Default::default()
        };
        let saved = Sregs::from(sregs);
        assert_eq!((saved.cr4, saved.efer, saved.flags), (0x20, 0x500, 0));
        assert_eq!(kvm_sregs::from(saved), sregs);
    }
}
