//! A vCPU's complete architectural state: saving, the saved form, and restoring.

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MP_STATE_SIPI_RECEIVED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_cpuid_entry2, kvm_mp_state, kvm_vcpu_events,
};
use migration::section::Section;
use serde::{Deserialize, Serialize};

use super::saved::{
    CpuidEntry, DebugRegs, Events, Msr, Regs, Sregs, Xcr, lapic_from, lapic_into, xcrs_from,
    xcrs_into,
};
use super::{Vcpu, msrs};
use crate::kvm::{IoctlError, ioctl};
use crate::section_body::{self, BodyError};

/// The version of the section's body that this build writes; it reads no other.
pub const VERSION: u32 = 1;

/// The most bytes of a body: CPUID and MSRs at their limits, and the largest XSAVE area.
const MAX_BODY: usize = 256 << 10;
const MAX_CPUID_ENTRIES: usize = 256;
const MAX_MSRS: usize = 512;
const MAX_XCRS: usize = 16;
const LAPIC_SIZE: usize = 1024;
/// In words of 4 bytes. AMX makes it 11 KiB.
const XSAVE_WORDS: std::ops::RangeInclusive<usize> = 1024..=16384;
/// The highest `KVM_MP_STATE_*` of x86.
const MAX_MP_STATE: u32 = KVM_MP_STATE_SIPI_RECEIVED;

/// Why a vCPU's state can't be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An ioctl failed.
    #[error(transparent)]
    Ioctl(#[from] IoctlError),
    /// The body can't be decoded or encoded.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// A list is longer than it can be.
    #[error("{field} has {len} entries; at most {most} are possible")]
    Limit {
        /// The field.
        field: &'static str,
        /// The number of its entries.
        len: usize,
        /// The limit.
        most: usize,
    },
    /// A value that can't be.
    #[error("{field} is {value:#x}: {problem}")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The destination doesn't take an MSR that the guest uses.
    #[error("this host does not take MSR {index:#x} with the guest's value {data:#x}")]
    Msr {
        /// The MSR.
        index: u32,
        /// The value.
        data: u64,
    },
    /// The guest runs guests of its own.
    #[error("the guest uses nested virtualization, which this KVM cannot save or load")]
    Nested,
}

/// A vCPU's state. Plain data: what came from outside has been validated when there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuState(Body);

/// The body of a section `vcpu.N`, version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Body {
    cpuid: Vec<CpuidEntry>,
    regs: Regs,
    sregs: Sregs,
    xcrs: Vec<Xcr>,
    xsave: Vec<u32>,
    debug: DebugRegs,
    lapic: Vec<u8>,
    msrs: Vec<Msr>,
    events: Events,
    mp_state: u32,
    nested: Vec<u8>,
}

impl VcpuState {
    /// The name of the section of the vCPU of that index.
    pub fn section_name(vcpu: u32) -> String {
        format!("vcpu.{vcpu}")
    }

    /// Encodes the state.
    pub fn to_section(&self, vcpu: u32) -> Result<Section, StateError> {
        Ok(Section {
            name: Self::section_name(vcpu),
            version: VERSION,
            body: section_body::encode(&self.0)?,
        })
    }

    /// Decodes and validates a section's body of version [`VERSION`]. Nothing in it is trusted.
    pub fn from_section(section: &Section) -> Result<Self, StateError> {
        let body: Body = section_body::decode::<MAX_BODY, _>(&section.body)?;
        let limit = |field, len, most| {
            if len > most {
                Err(StateError::Limit { field, len, most })
            } else {
                Ok(())
            }
        };
        limit("cpuid", body.cpuid.len(), MAX_CPUID_ENTRIES)?;
        limit("msrs", body.msrs.len(), MAX_MSRS)?;
        limit("xcrs", body.xcrs.len(), MAX_XCRS)?;
        let value = |field, value: usize, problem| {
            Err(StateError::Value {
                field,
                value: value as u64,
                problem,
            })
        };
        if !XSAVE_WORDS.contains(&body.xsave.len()) {
            return value(
                "the length of xsave in words",
                body.xsave.len(),
                "it must be 1024 to 16384",
            );
        }
        if body.lapic.len() != LAPIC_SIZE {
            return value(
                "the length of lapic",
                body.lapic.len(),
                "it must be 1024 bytes",
            );
        }
        if body.mp_state > MAX_MP_STATE {
            return value("mp_state", body.mp_state as usize, "there is no such state");
        }
        Ok(Self(body))
    }

    /// The address of the next instruction, for messages.
    pub fn rip(&self) -> u64 {
        self.0.regs.rip
    }
}

impl Vcpu {
    /// Reads the whole state. The vCPU is paused, and the access that it was in is finished (the
    /// thread has seen to that).
    pub fn save(&mut self) -> Result<VcpuState, StateError> {
        // The order: KVM_GET_MP_STATE comes first, because it takes an INIT or SIPI that is
        // still pending in the local APIC and acts on it, which changes registers. Reading the
        // others changes nothing that is read after them. An APIC timer that fires meanwhile is
        // delivered only by the next KVM_RUN: it is saved as still armed, and fires at once where
        // it is loaded.
        let mp_state = self
            .fd
            .get_mp_state()
            .map_err(IoctlError::named("KVM_GET_MP_STATE"))?
            .mp_state;
        let events = self
            .fd
            .get_vcpu_events()
            .map_err(IoctlError::named("KVM_GET_VCPU_EVENTS"))?;
        let regs = self
            .fd
            .get_regs()
            .map_err(IoctlError::named("KVM_GET_REGS"))?;
        let sregs = self.sregs()?;
        let xcrs = self
            .fd
            .get_xcrs()
            .map_err(IoctlError::named("KVM_GET_XCRS"))?;
        let xsave = ioctl::get_xsave(&self.fd, self.capabilities.xsave2)?;
        let debug = self
            .fd
            .get_debug_regs()
            .map_err(IoctlError::named("KVM_GET_DEBUGREGS"))?;
        let msrs = msrs::read(&self.fd, &mut self.msr_indices)?;
        let lapic = self
            .fd
            .get_lapic()
            .map_err(IoctlError::named("KVM_GET_LAPIC"))?;
        let nested = self.save_nested()?;
        Ok(VcpuState(Body {
            cpuid: self.cpuid.iter().map(|&entry| entry.into()).collect(),
            regs: regs.into(),
            sregs,
            xcrs: xcrs_from(&xcrs),
            xsave,
            debug: debug.into(),
            lapic: lapic_from(&lapic),
            msrs,
            events: events.into(),
            mp_state,
            nested,
        }))
    }

    /// Loads a state that was saved on this or another host. The vCPU has not run yet, or only
    /// with this state's CPUID, and its TSC is already set ([`crate::clock`]): the APIC's timer
    /// counts in it.
    pub fn restore(&mut self, state: &VcpuState) -> Result<(), StateError> {
        let body = &state.0;
        // 1. CPUID first: it decides which bits of CR4, EFER and XCR0 and which MSRs KVM takes.
        // KVM refuses to change it once the vCPU has run, and takes a while: so it is only set if it
        // differs, in whatever order.
        let entries = body.cpuid.iter();
        let cpuid: Vec<_> = entries.map(|entry| entry.clone().into()).collect();
        if sorted(&cpuid) != sorted(&self.cpuid) {
            tracing::debug!(vcpu = self.index, "CPUID is set again, as it differs");
            self.set_cpuid(&cpuid)?;
        }
        let reset_msrs = self.power_on.as_ref().map(|state| state.0.msrs.clone());
        self.restore_registers(body, &reset_msrs.unwrap_or_default())
    }

    /// Everything but CPUID and the TSC.
    fn restore_registers(&mut self, body: &Body, reset_msrs: &[Msr]) -> Result<(), StateError> {
        // 2. Special registers before the LAPIC: they hold APIC_BASE, which decides whether there
        // is one, and in which mode. Before the general ones: an old KVM takes a vCPU whose RIP is
        // the reset vector as reset, and wakes it.
        self.set_sregs(&body.sregs)?;
        // 3. XCR0 before the state that it enables; CR4.OSXSAVE is there by now.
        self.fd
            .set_xcrs(&xcrs_into(&body.xcrs))
            .map_err(IoctlError::named("KVM_SET_XCRS"))?;
        ioctl::set_xsave(&self.fd, self.capabilities.xsave2, &body.xsave)?;
        // 4. General registers before events: setting RIP and RFLAGS drops pending exceptions.
        self.fd
            .set_regs(&body.regs.clone().into())
            .map_err(IoctlError::named("KVM_SET_REGS"))?;
        // 5. The LAPIC before the MSRs: the TSC deadline is only taken in its timer mode.
        self.fd
            .set_lapic(&lapic_into(&body.lapic))
            .map_err(IoctlError::named("KVM_SET_LAPIC"))?;
        msrs::write(&self.fd, &self.ram, &body.msrs, reset_msrs)?;
        // 6. After EFER.SVME and the VMX MSRs.
        self.restore_nested(&body.nested)?;
        self.fd
            .set_debug_regs(&body.debug.clone().into())
            .map_err(IoctlError::named("KVM_SET_DEBUGREGS"))?;
        // 7. Events after everything that may raise or drop one.
        self.fd
            .set_vcpu_events(&events_to_set(body))
            .map_err(IoctlError::named("KVM_SET_VCPU_EVENTS"))?;
        // 8. Last: whether the vCPU runs at all, halts, or waits for INIT or SIPI. Events must be
        // there when it comes to SIPI_RECEIVED, whose vector is one of them.
        self.fd
            .set_mp_state(kvm_mp_state {
                mp_state: body.mp_state,
            })
            .map_err(IoctlError::named("KVM_SET_MP_STATE"))?;
        Ok(())
    }

    /// Puts the vCPU into the state that it had when it was made, as a reset of the machine does.
    /// Its TSC counts on.
    pub fn reset(&mut self) -> Result<(), StateError> {
        let Some(power_on) = self.power_on.clone() else {
            return Ok(());
        };
        self.restore_registers(&power_on.0, &power_on.0.msrs)
    }

    fn sregs(&self) -> Result<Sregs, StateError> {
        if self.capabilities.sregs2 {
            return Ok(ioctl::get_sregs2(&self.fd)?.into());
        }
        let sregs = self.fd.get_sregs();
        Ok(sregs.map_err(IoctlError::named("KVM_GET_SREGS"))?.into())
    }

    fn set_sregs(&self, sregs: &Sregs) -> Result<(), StateError> {
        if self.capabilities.sregs2 {
            ioctl::set_sregs2(&self.fd, &sregs.clone().into())?;
        } else {
            self.fd
                .set_sregs(&sregs.clone().into())
                .map_err(IoctlError::named("KVM_SET_SREGS"))?;
        }
        Ok(())
    }

    /// Nested state, if the guest has a hypervisor's instructions.
    fn save_nested(&self) -> Result<Vec<u8>, StateError> {
        if !crate::cpuid::has_nested_virtualization(&self.cpuid) {
            return Ok(Vec::new());
        }
        if self.capabilities.nested_state.is_none() {
            return Err(StateError::Nested);
        }
        let mut state = KvmNestedStateBuffer::empty();
        // The header matters even where nothing follows it: whether VMX is on, and AMD's GIF.
        self.fd
            .nested_state(&mut state)
            .map_err(IoctlError::named("KVM_GET_NESTED_STATE"))?;
        Ok(section_body::encode(&state)?)
    }

    fn restore_nested(&self, nested: &[u8]) -> Result<(), StateError> {
        if nested.is_empty() {
            return Ok(());
        }
        if self.capabilities.nested_state.is_none() {
            return Err(StateError::Nested);
        }
        let state: KvmNestedStateBuffer = section_body::decode::<MAX_BODY, _>(nested)?;
        // KVM reads as many bytes as the header says.
        if state.size as usize > size_of::<KvmNestedStateBuffer>() {
            return Err(StateError::Value {
                field: "nested.size",
                value: state.size.into(),
                problem: "it is larger than the state can be",
            });
        }
        self.fd
            .set_nested_state(&state)
            .map_err(IoctlError::named("KVM_SET_NESTED_STATE"))?;
        Ok(())
    }
}

/// The saved events with the flags that make KVM take what it only takes when asked to.
/// As KVM looks them up, which does not depend on their order.
fn sorted(entries: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut entries = entries.to_vec();
    entries.sort_by_key(|entry| (entry.function, entry.index));
    entries
}

fn events_to_set(body: &Body) -> kvm_vcpu_events {
    let mut events: kvm_vcpu_events = body.events.clone().into();
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    // The vector of a SIPI counts only for a vCPU that has received one.
    events.flags &= !KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    if body.mp_state == KVM_MP_STATE_SIPI_RECEIVED {
        events.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    }
    // A KVM without these refuses their flags; where there is nothing to say, it need not.
    if events.smi == Default::default() {
        events.flags &= !KVM_VCPUEVENT_VALID_SMM;
    }
    if events.exception.pending == 0 {
        events.flags &= !KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if events.triple_fault.pending == 0 {
        events.flags &= !KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
    events
}

#[cfg(test)]
mod tests;
