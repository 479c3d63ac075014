//! The MSRs that are part of a vCPU's state: all that KVM lists, and those that it keeps for the
//! guest without listing them: memory types (MTRRs) and machine check banks.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use migration::layout::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::saved::Msr;
use super::state::StateError;
use crate::kvm::{IoctlError, Kvm};

/// Saved with the clocks, relative to the other vCPUs' ([`crate::clock`]).
pub(crate) const MSR_IA32_TSC: u32 = 0x10;
/// The LAPIC timer's deadline, in the guest's TSC.
pub(crate) const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// kvmclock's old and new register for the address where the guest wants the time of boot.
const MSR_KVM_WALL_CLOCK: u32 = 0x11;
const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
/// What KVM writes there: `struct pvclock_wall_clock`.
const WALL_CLOCK_LEN: usize = 12;

/// The number of machine check banks is its lowest byte.
const MSR_IA32_MCG_CAP: u32 = 0x179;
/// Control, status, address and miscellaneous of bank 0; those of the others follow.
const MSR_IA32_MC0_CTL: u32 = 0x400;
/// As many as KVM ever gives a guest.
const MAX_BANKS: u32 = 32;
/// The default memory type; with what a firmware leaves: enabled, write-back.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// Variable ranges (base and mask of eight), fixed ranges of 64, 16 and 4 KiB, and the default.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    MSR_MTRR_DEF_TYPE..=MSR_MTRR_DEF_TYPE,
];

/// KVM's own limit for one ioctl.
const MAX_MSRS: usize = 256;

/// The MSRs to save, but for the TSC. Those that turn out not to be readable are dropped by the
/// first [`read`].
pub(super) fn list(kvm: &Kvm, fd: &VcpuFd) -> Result<Vec<u32>, StateError> {
    let list = kvm
        .fd()
        .get_msr_index_list()
        .map_err(IoctlError::named("KVM_GET_MSR_INDEX_LIST"))?;
    let capabilities = read(fd, &mut vec![MSR_IA32_MCG_CAP])?;
    let banks = capabilities.first().map_or(0, |msr| msr.data as u32 & 0xff);
    let banks = MSR_IA32_MC0_CTL..MSR_IA32_MC0_CTL + 4 * banks.min(MAX_BANKS);
    let unlisted = MTRRS.into_iter().flatten().chain(banks);
    let mut indices: Vec<u32> = list.as_slice().to_vec();
    for index in unlisted {
        if !indices.contains(&index) {
            indices.push(index);
        }
    }
    indices.retain(|&index| index != MSR_IA32_TSC);
    Ok(indices)
}

/// Makes memory write-back, as a PC's firmware does before it starts a kernel; without that, Linux
/// warns and uses no other memory type either. A KVM without MTRRs has it so.
pub(super) fn set_write_back(fd: &VcpuFd) -> Result<(), StateError> {
    let entry = kvm_msr_entry {
        index: MSR_MTRR_DEF_TYPE,
        data: MTRR_WRITE_BACK,
        ..Default::default()
    };
    fd.set_msrs(&msrs_of(&[entry])?)
        .map_err(IoctlError::named("KVM_SET_MSRS"))?;
    Ok(())
}

fn msrs_of(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    Msrs::from_entries(entries).map_err(|_| StateError::Limit {
        field: "msrs",
        len: entries.len(),
        most: MAX_MSRS,
    })
}

/// Reads the MSRs of `indices`. KVM stops at the first that it can't read: it is left out, and
/// from `indices` too, so that it is said once.
pub(super) fn read(fd: &VcpuFd, indices: &mut Vec<u32>) -> Result<Vec<Msr>, StateError> {
    let mut values = Vec::with_capacity(indices.len());
    while values.len() < indices.len() {
        let wanted: Vec<_> = indices
            .iter()
            .skip(values.len())
            .take(MAX_MSRS)
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = msrs_of(&wanted)?;
        let read = fd
            .get_msrs(&mut msrs)
            .map_err(IoctlError::named("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice().iter().take(read).map(|&msr| Msr::from(msr)));
        if read < wanted.len() {
            // Listed for the host's hardware, but not there with this guest's CPUID: the guest
            // can't read it either.
            let index = indices.remove(values.len());
            tracing::debug!("MSR {index:#x} is not readable, and so not part of the state");
        }
    }
    Ok(values)
}

/// Writes MSRs. One that KVM refuses is an error, unless the guest loses nothing by it: the value
/// is what `reset` has for it, or 0 if that doesn't have it.
pub(super) fn write(
    fd: &VcpuFd,
    ram: &GuestRam,
    saved: &[Msr],
    reset: &[Msr],
) -> Result<(), StateError> {
    let _kept = WallClocks::keep(ram, saved);
    let mut rest = saved;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .take(MAX_MSRS)
            .map(|msr| msr.clone().into())
            .collect();
        let written = fd
            .set_msrs(&msrs_of(&entries)?)
            .map_err(IoctlError::named("KVM_SET_MSRS"))?;
        rest = rest.get(written..).unwrap_or_default();
        if written < entries.len() {
            let Some((refused, after)) = rest.split_first() else {
                break;
            };
            check_refused(refused, reset)?;
            rest = after;
        }
    }
    Ok(())
}

/// Writing a wall clock register makes KVM write the time to guest memory at once. The guest
/// asked for that once, at boot, and may have something else there by now: it is put back.
struct WallClocks<'a> {
    ram: &'a GuestRam,
    contents: Vec<(GuestAddress, [u8; WALL_CLOCK_LEN])>,
}

impl<'a> WallClocks<'a> {
    fn keep(ram: &'a GuestRam, saved: &[Msr]) -> Self {
        let registers = [MSR_KVM_WALL_CLOCK, MSR_KVM_WALL_CLOCK_NEW];
        let contents = saved
            .iter()
            .filter(|msr| registers.contains(&msr.index) && msr.data != 0)
            .filter_map(|msr| {
                let addr = GuestAddress(msr.data);
                // What isn't RAM KVM can't write to either.
                ram.read_obj(addr).ok().map(|bytes| (addr, bytes))
            })
            .collect();
        Self { ram, contents }
    }
}

impl Drop for WallClocks<'_> {
    fn drop(&mut self) {
        for (addr, bytes) in &self.contents {
            if let Err(error) = self.ram.write_slice(bytes, *addr) {
                tracing::error!(%error, "cannot put back guest memory at {:#x}", addr.0);
            }
        }
    }
}

fn check_refused(refused: &Msr, reset: &[Msr]) -> Result<(), StateError> {
    let Msr { index, data } = *refused;
    let at_reset = reset.iter().find(|msr| msr.index == index);
    if data == at_reset.map_or(0, |msr| msr.data) {
        tracing::debug!("MSR {index:#x} is not writable, and has its reset value {data:#x}");
        Ok(())
    } else {
        Err(StateError::Msr { index, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msr_that_is_refused_matters_only_if_the_guest_changed_it() {
        let msr = |index, data| Msr { index, data };
        let reset = [msr(0x277, 0x0007_0406_0007_0406)];
        check_refused(&msr(0x277, 0x0007_0406_0007_0406), &reset).unwrap();
        check_refused(&msr(0x175, 0), &reset).unwrap();
        let error = check_refused(&msr(0x277, 6), &reset).unwrap_err();
        assert!(error.to_string().contains("MSR 0x277"), "{error}");
        assert!(check_refused(&msr(0x175, 1), &reset).is_err());
    }
}
