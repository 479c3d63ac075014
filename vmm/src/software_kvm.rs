//! What a KVM without hardware virtualization needs: the one place for its quirks.
//!
//! Such a KVM runs the guest's kernel (CPL 0) in KVM's instruction emulator, which was made for
//! the few instructions that hardware leaves to it. What it can't do ends in an internal error
//! with the instruction's bytes. `int3` is the one that a kernel can't be kept from using (Linux
//! tests it while booting) and that the VMM can do itself. On hardware KVM none of this happens.

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, KVM_VCPUEVENT_VALID_PAYLOAD};
use kvm_ioctls::VcpuFd;

use crate::kvm::IoctlError;
use crate::kvm::ioctl::InternalError;

const INT3: u8 = 0xcc;
/// The vector of #BP.
const BREAKPOINT: u8 = 3;

/// Does what KVM's emulator couldn't, if it is known how. Whether it did: if so the vCPU can be
/// entered again.
pub(crate) fn emulate(vcpu: &VcpuFd, error: &InternalError) -> Result<bool, IoctlError> {
    if error.suberror != KVM_INTERNAL_ERROR_EMULATION || error.instruction.first() != Some(&INT3) {
        return Ok(false);
    }
    // At CPL 3 KVM raises #UD by itself; there the instruction ran natively.
    let sregs = vcpu
        .get_sregs()
        .map_err(IoctlError::named("KVM_GET_SREGS"))?;
    if sregs.ss.dpl != 0 {
        return Ok(false);
    }
    let mut regs = vcpu.get_regs().map_err(IoctlError::named("KVM_GET_REGS"))?;
    let mut events = vcpu
        .get_vcpu_events()
        .map_err(IoctlError::named("KVM_GET_VCPU_EVENTS"))?;
    if events.exception.injected != 0 || events.exception.pending != 0 {
        return Ok(false);
    }
    // #BP is a trap: the address that it saves is the next instruction's.
    regs.rip = regs.rip.wrapping_add(1);
    // Registers first: setting them drops a pending exception.
    vcpu.set_regs(&regs)
        .map_err(IoctlError::named("KVM_SET_REGS"))?;
    events.exception.injected = 1;
    events.exception.nr = BREAKPOINT;
    events.exception.has_error_code = 0;
    events.exception.error_code = 0;
    // An injected exception has no payload.
    events.flags &= !KVM_VCPUEVENT_VALID_PAYLOAD;
    events.exception_has_payload = 0;
    vcpu.set_vcpu_events(&events)
        .map_err(IoctlError::named("KVM_SET_VCPU_EVENTS"))?;
    Ok(true)
}
