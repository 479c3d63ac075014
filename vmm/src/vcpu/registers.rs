//! A vCPU's registers as text for people, laid out as QEMU's `info registers`.

use std::fmt::{self, Display, Formatter};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::{StateError, Vcpu};
use crate::kvm::IoctlError;

impl Vcpu {
    /// The registers of a paused vCPU: several lines, each with its end.
    pub fn registers(&mut self) -> Result<String, StateError> {
        let regs = self
            .fd
            .get_regs()
            .map_err(IoctlError::named("KVM_GET_REGS"))?;
        let sregs = self
            .fd
            .get_sregs()
            .map_err(IoctlError::named("KVM_GET_SREGS"))?;
        Ok(Registers { regs, sregs }.to_string())
    }
}

struct Registers {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl Display for Registers {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { regs: r, sregs: s } = self;
        let rows = [
            [
                ("RAX", r.rax),
                ("RBX", r.rbx),
                ("RCX", r.rcx),
                ("RDX", r.rdx),
            ],
            [
                ("RSI", r.rsi),
                ("RDI", r.rdi),
                ("RBP", r.rbp),
                ("RSP", r.rsp),
            ],
            [("R8 ", r.r8), ("R9 ", r.r9), ("R10", r.r10), ("R11", r.r11)],
            [
                ("R12", r.r12),
                ("R13", r.r13),
                ("R14", r.r14),
                ("R15", r.r15),
            ],
        ];
        for row in rows {
            let row = row.map(|(name, value)| format!("{name}={value:016x}"));
            writeln!(f, "{}", row.join(" "))?;
        }
        writeln!(
            f,
            "RIP={:016x} RFL={:08x} [{}] CPL={}",
            r.rip,
            r.rflags,
            flags(r.rflags),
            s.ss.dpl
        )?;
        for (name, segment) in [
            ("ES ", &s.es),
            ("CS ", &s.cs),
            ("SS ", &s.ss),
            ("DS ", &s.ds),
            ("FS ", &s.fs),
            ("GS ", &s.gs),
            ("LDT", &s.ldt),
            ("TR ", &s.tr),
        ] {
            let kvm_segment {
                base,
                limit,
                selector,
                ..
            } = *segment;
            writeln!(f, "{name}={selector:04x} {base:016x} {limit:08x}")?;
        }
        for (name, table) in [("GDT", &s.gdt), ("IDT", &s.idt)] {
            let kvm_dtable { base, limit, .. } = *table;
            writeln!(f, "{name}=     {base:016x} {limit:08x}")?;
        }
        writeln!(
            f,
            "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}",
            s.cr0, s.cr2, s.cr3, s.cr4
        )?;
        writeln!(f, "EFER={:016x}", s.efer)
    }
}

/// RFLAGS as letters, a dash for one that is clear.
fn flags(rflags: u64) -> String {
    [
        (11, 'O'),
        (10, 'D'),
        (9, 'I'),
        (7, 'S'),
        (6, 'Z'),
        (4, 'A'),
        (2, 'P'),
        (0, 'C'),
    ]
    .map(|(bit, letter)| if rflags >> bit & 1 == 1 { letter } else { '-' })
    .iter()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_named_and_flags_spelled() {
        let text = Registers {
            regs: kvm_regs {
                rip: 0x1000,
                r15: 0xabcd,
                rflags: 0x246,
                ..Default::default()
            },
            sregs: kvm_sregs {
                cr3: 0x9000,
                ..Default::default()
            },
        }
        .to_string();
        assert!(text.contains("R15=000000000000abcd\n"), "{text}");
        assert!(text.contains("RIP=0000000000001000 RFL=00000246 [--I-Z-P-] CPL=0"));
        assert!(text.contains("CR3=0000000000009000"));
    }
}
