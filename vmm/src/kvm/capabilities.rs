//! What this KVM can do.

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_KVMCLOCK_CTRL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_NR_MEMSLOTS, KVM_CAP_SREGS2, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use kvm_ioctls::{Cap, VmFd};

/// Required, with the names that KVM's documentation uses.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// The required capabilities that `kvm` lacks, by name.
pub(super) fn missing(kvm: &kvm_ioctls::Kvm) -> Vec<&'static str> {
    let lacking = REQUIRED
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap));
    lacking.map(|&(_, name)| name).collect()
}

/// Who arms the dirty log again after a page was reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManualProtect {
    /// Reading the log arms it: `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` is not there.
    No,
    /// The VMM does, page by page.
    Yes,
    /// The VMM does, and all pages are reported once when the log is switched on, so that
    /// switching it on has nothing to protect.
    YesInitiallySet,
}

/// What not every KVM has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The most vCPUs of one VM.
    pub max_vcpus: u32,
    /// The most memory slots of one VM.
    pub max_slots: usize,
    /// How the dirty log is armed again.
    pub manual_protect: ManualProtect,
    /// `KVM_GET_SREGS2`: the PDPTRs are saved, as a guest with PAE paging may need.
    pub sregs2: bool,
    /// The size of the XSAVE area in bytes where `KVM_GET_XSAVE2` is there.
    pub xsave2: Option<usize>,
    /// The size of the nested state in bytes where nested virtualization is there.
    pub nested_state: Option<usize>,
    /// `KVM_SET_TSC_KHZ` to another frequency than the host's: the hardware scales.
    pub tsc_control: bool,
    /// A guest can be told that it was stopped, to spare it false alarms of its watchdogs.
    pub kvmclock_ctrl: bool,
    /// The flags that `KVM_GET_CLOCK` may return.
    pub clock_flags: u32,
    /// Pending exceptions are told from injected ones, with their payload (CR2, DR6).
    pub exception_payload: bool,
    /// A pending triple fault is part of `KVM_GET_VCPU_EVENTS`.
    pub triple_fault_event: bool,
}

impl Capabilities {
    /// Asks the VM, whose answers may be narrower than those of `/dev/kvm`.
    pub fn probe(vm: &VmFd) -> Self {
        let number = |cap: u32| vm.check_extension_raw(cap.into()).max(0) as u32;
        let has = |cap: u32| number(cap) > 0;
        let size = |cap: Cap| usize::try_from(vm.check_extension_int(cap)).ok();
        let manual = number(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        Self {
            max_vcpus: vm.check_extension_int(Cap::MaxVcpus).max(1) as u32,
            // The documentation's default where the capability is not there.
            max_slots: match number(KVM_CAP_NR_MEMSLOTS) {
                0 => 32,
                slots => slots as usize,
            },
            manual_protect: if manual & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
                ManualProtect::No
            } else if manual & KVM_DIRTY_LOG_INITIALLY_SET == 0 {
                ManualProtect::Yes
            } else {
                ManualProtect::YesInitiallySet
            },
            sregs2: has(KVM_CAP_SREGS2),
            xsave2: size(Cap::Xsave2).filter(|&size| size >= 4096),
            nested_state: size(Cap::NestedState).filter(|&size| size > 0),
            tsc_control: vm.check_extension(Cap::TscControl),
            kvmclock_ctrl: has(KVM_CAP_KVMCLOCK_CTRL),
            clock_flags: vm.check_extension_int(Cap::AdjustClock).max(0) as u32,
            exception_payload: has(KVM_CAP_EXCEPTION_PAYLOAD),
            triple_fault_event: has(KVM_CAP_X86_TRIPLE_FAULT_EVENT),
        }
    }
}
