//! The registers of CPL 0.
#![allow(unsafe_code, reason = "MSRs and debug registers")]

use guests::bare::{privileged, pvclock};
use guests::state::Vectors;

use crate::Log;

const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const LSTAR: u32 = 0xc000_0082;

/// MSRs (Intel SDM, volume 4) and what to write; addresses get the vCPU's number added.
const WRITTEN: [(&str, u32, u64); 12] = [
    ("sysenter_cs", 0x174, 0x1230),
    ("sysenter_esp", 0x175, 0xffff_8000_1111_0000),
    ("sysenter_eip", 0x176, 0xffff_8000_2222_0000),
    ("mtrr_base0", 0x200, 0xc000_0000),
    ("mtrr_mask0", 0x201, 0xff_c000_0000),
    // Uncached minus where Linux has write-combining: not what a reset leaves.
    ("pat", 0x277, 0x0007_0406_0007_0106),
    ("star", 0xc000_0081, 0x0023_0010_dead_0000),
    ("lstar", LSTAR, 0xffff_8000_3333_0000),
    ("cstar", 0xc000_0083, 0xffff_8000_4444_0000),
    ("fmask", 0xc000_0084, 0x0004_7700),
    ("kernel_gs_base", 0xc000_0102, 0xffff_8000_5555_0000),
    ("tsc_aux", 0xc000_0103, 0x0077_0000),
];
/// MSRs that are to stay as they are.
const LEFT: [(&str, u32); 6] = [
    ("apic_base", 0x1b),
    ("misc_enable", 0x1a0),
    ("mtrr_fix64k", 0x250),
    ("mtrr_def_type", 0x2ff),
    ("efer", 0xc000_0080),
    ("tsc_adjust", 0x3b),
];
const MSRS: usize = WRITTEN.len() + LEFT.len() + 3;

/// What is expected of a vCPU.
pub(crate) struct System {
    /// Name, number, value.
    msrs: [Option<(&'static str, u32, u64)>; MSRS],
    control: privileged::Control,
    xcr0: u64,
}

/// XCR0, 1 without XSAVE.
fn xcr0() -> u64 {
    const OSXSAVE: u64 = 1 << 18;
    if privileged::control().cr[2] & OSXSAVE == 0 {
        return 1;
    }
    let (low, high): (u32, u32);
    // SAFETY: XGETBV exists if OSXSAVE could be set.
    unsafe {
        core::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(low) | u64::from(high) << 32
}

/// The widest vectors that XCR0 allows.
pub(crate) fn vectors() -> Vectors {
    match xcr0() {
        all if all & 0xe6 == 0xe6 => Vectors::Avx512,
        some if some & 6 == 6 => Vectors::Avx,
        _ => Vectors::Sse,
    }
}

impl System {
    /// Sets everything, with FS and GS at these addresses.
    pub(crate) fn set(cpu: u64, segments: [u64; 2], clock: u64, log: &mut Log) -> Self {
        let written = WRITTEN.iter().map(|&(name, msr, value)| {
            let number = match name {
                "mtrr_base0" | "mtrr_mask0" | "pat" | "star" | "fmask" => 0,
                _ => cpu << 4,
            };
            (name, msr, Some(value + number))
        });
        let left = LEFT.iter().map(|&(name, msr)| (name, msr, None));
        let clock = if pvclock::offered() {
            Some(clock | 1)
        } else {
            None
        };
        let special = [
            ("fs_base", FS_BASE, Some(segments[0])),
            ("gs_base", GS_BASE, Some(segments[1])),
            ("kvm_system_time", SYSTEM_TIME, clock),
        ];
        let mut msrs = [None; MSRS];
        for (slot, (name, msr, value)) in msrs.iter_mut().zip(written.chain(left).chain(special)) {
            // SAFETY: none of these is used by the guest otherwise, and FS and GS point to memory.
            let set = value.is_none_or(|value| unsafe { privileged::write_msr(msr, value) });
            let read = privileged::read_msr(msr);
            *slot = match (set, read) {
                (true, Some(read)) if value.is_none_or(|value| value == read) => {
                    Some((name, msr, read))
                }
                _ => {
                    log.skip(format_args!("{name}"));
                    None
                }
            };
        }
        // Linear addresses in DR0 to DR3; conditions and lengths in DR7, but nothing enabled.
        let debug = [0x1111_1000, 0x2222_2000, 0x3333_3000, 0x4444_4000]
            .map(|address: u64| address + (cpu << 8));
        let [dr0, dr1, dr2, dr3] = debug;
        // SAFETY: no breakpoint is enabled.
        unsafe { privileged::write_debug(&[dr0, dr1, dr2, dr3, 0xdd11_0400]) };
        let control = privileged::control();
        let wanted = [dr0, dr1, dr2, dr3, control.dr[4], 0xdd11_0400];
        if control.dr != wanted {
            log.skip(format_args!("debug_registers"));
        }
        Self {
            msrs,
            control,
            xcr0: xcr0(),
        }
    }

    /// The same, but with CR8 as the local APIC's task priority has made it meanwhile.
    pub(crate) fn with_current_priority(mut self) -> Self {
        self.control.cr[3] = privileged::control().cr[3];
        self
    }

    /// Compares everything.
    pub(crate) fn compare(&self, log: &mut Log) {
        for (name, msr, expected) in self.msrs.into_iter().flatten() {
            if let Some(found) = privileged::read_msr(msr) {
                log.compare(format_args!("{name}"), expected, found);
            }
        }
        let (expected, found) = (&self.control, privileged::control());
        for (index, name) in ["cr0", "cr3", "cr4", "cr8"].into_iter().enumerate() {
            log.compare(format_args!("{name}"), expected.cr[index], found.cr[index]);
        }
        for (index, name) in ["dr0", "dr1", "dr2", "dr3", "dr6", "dr7"]
            .into_iter()
            .enumerate()
        {
            log.compare(format_args!("{name}"), expected.dr[index], found.dr[index]);
        }
        for (name, expected, found) in [
            ("gdtr", expected.gdtr, found.gdtr),
            ("idtr", expected.idtr, found.idtr),
        ] {
            log.compare(format_args!("{name}.0"), expected[0], found[0]);
            log.compare(format_args!("{name}.1"), expected[1], found[1]);
        }
        log.compare(format_args!("tr"), expected.tr.into(), found.tr.into());
        log.compare(
            format_args!("ldtr"),
            expected.ldtr.into(),
            found.ldtr.into(),
        );
        log.compare(format_args!("xcr0"), self.xcr0, xcr0());
    }
}

/// Changes an MSR.
pub(crate) fn spoil_msr() {
    // SAFETY: nothing uses it.
    unsafe { privileged::wrmsr(LSTAR, 0xffff_8000_0bad_0000) };
}

/// Changes a debug register.
pub(crate) fn spoil_debug() {
    // SAFETY: no breakpoint is enabled.
    unsafe { privileged::write_debug(&[0, 0, 0, 0x0bad_0000, 0xdd11_0400]) };
}
