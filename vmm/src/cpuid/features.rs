//! The names of CPUID's feature bits, as QEMU has them.

use std::fmt;

/// A register that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// A register full of feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Word {
    /// The leaf: EAX before CPUID.
    pub function: u32,
    /// The subleaf: ECX before CPUID; 0 where there are none.
    pub index: u32,
    /// Where the bits are.
    pub register: Register,
}

/// One feature bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Where it is.
    pub word: Word,
    /// Its number, 0 to 31.
    pub bit: u32,
}

/// `avx512f (leaf 7, EBX bit 16)`, or only `leaf 7, EBX bit 13` for one without a name.
impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Word {
            function,
            index,
            register,
        } = self.word;
        let register = match register {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        };
        let mut place = match function {
            0..=9 => format!("leaf {function}"),
            _ => format!("leaf {function:#x}"),
        };
        if index != 0 {
            place.push_str(&format!(".{index}"));
        }
        match self.name() {
            Some(name) => write!(f, "{name} ({place}, {register} bit {})", self.bit),
            None => write!(f, "{place}, {register} bit {}", self.bit),
        }
    }
}

const fn word(function: u32, index: u32, register: Register) -> Word {
    Word {
        function,
        index,
        register,
    }
}

pub(super) const LEAF_1_ECX: Word = word(1, 0, Register::Ecx);
pub(super) const LEAF_1_EDX: Word = word(1, 0, Register::Edx);
pub(super) const LEAF_6_EAX: Word = word(6, 0, Register::Eax);
pub(super) const LEAF_7_ECX: Word = word(7, 0, Register::Ecx);
pub(super) const EXTENDED_1_ECX: Word = word(0x8000_0001, 0, Register::Ecx);

/// The words that hold features and nothing else, each with the names of its bits from 0 on
/// (spaces between them, `.` for a bit without a name).
pub(super) const WORDS: &[(Word, &str)] = &[
    (
        LEAF_1_EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic . sep mtrr pge mca cmov pat pse36 pn clflush . ds \
         acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        LEAF_1_ECX,
        "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid . fma cx16 xtpr pdcm . pcid \
         dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave osxsave avx f16c rdrand \
         hypervisor",
    ),
    (LEAF_6_EAX, ". . arat"),
    (
        word(7, 0, Register::Ebx),
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm . \
         zero-fcs-fds mpx . avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb \
         intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    ),
    (
        LEAF_7_ECX,
        ". avx512vbmi umip pku ospke waitpkg avx512vbmi2 shstk gfni vaes vpclmulqdq avx512vnni \
         avx512bitalg . avx512-vpopcntdq . la57 . . . . . rdpid . bus-lock-detect cldemote . \
         movdiri movdir64b . sgxlc pks",
    ),
    (
        word(7, 0, Register::Edx),
        ". sgx-keys avx512-4vnniw avx512-4fmaps fsrm . . . avx512-vp2intersect . md-clear . . . \
         serialize . tsx-ldtrk . . arch-lbr ibt . amx-bf16 avx512-fp16 amx-tile amx-int8 \
         spec-ctrl stibp flush-l1d arch-capabilities core-capability ssbd",
    ),
    (
        word(7, 1, Register::Eax),
        "sha512 sm3 sm4 . avx-vnni avx512-bf16 . cmpccxadd . . fzrm fsrs fsrc . . . . fred lkgs \
         wrmsrns . amx-fp16 . avx-ifma . . lam",
    ),
    (
        word(0xd, 1, Register::Eax),
        "xsaveopt xsavec xgetbv1 xsaves xfd",
    ),
    (
        word(0x8000_0001, 0, Register::Edx),
        ". . . . . . . . . . . syscall . . . . . . . . nx . mmxext . . fxsr-opt pdpe1gb rdtscp . \
         lm 3dnowext 3dnow",
    ),
    (
        EXTENDED_1_ECX,
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop \
         skinit wdt . lwp fma4 tce . nodeid-msr . tbm topoext perfctr-core perfctr-nb",
    ),
    (
        word(0x8000_0007, 0, Register::Edx),
        ". . . . . . . . invtsc",
    ),
    (
        word(0x8000_0008, 0, Register::Ebx),
        "clzero . xsaveerptr . . . . . . wbnoinvd . . ibpb . ibrs amd-stibp . stibp-always-on . . \
         . . . . amd-ssbd virt-ssbd amd-no-ssb . amd-psfd",
    ),
    (
        word(0x4000_0001, 0, Register::Eax),
        "kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi \
         kvm-pv-unhalt . kvm-pv-tlb-flush . kvm-pv-ipi kvm-poll-control kvm-pv-sched-yield \
         kvm-asyncpf-int kvm-msi-ext-dest-id . . . . . . . . kvmclock-stable-bit",
    ),
];

/// Other names of the same bits.
const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("pclmuldq", "pclmulqdq"),
    ("lzcnt", "abm"),
    ("sse4-1", "sse4.1"),
    ("sse4_1", "sse4.1"),
    ("sse4-2", "sse4.2"),
    ("sse4_2", "sse4.2"),
    ("ffxsr", "fxsr-opt"),
    ("i64", "lm"),
    ("xd", "nx"),
];

impl Feature {
    /// Its name, if it has one.
    pub fn name(&self) -> Option<&'static str> {
        let (_, names) = WORDS.iter().find(|(word, _)| *word == self.word)?;
        let name = names.split_whitespace().nth(self.bit as usize)?;
        (name != ".").then_some(name)
    }

    /// The bits of that name; as in QEMU, `_` is as good as `-`. Empty if there is none.
    pub fn named(name: &str) -> Vec<Self> {
        let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
        let name = alias.map_or_else(|| name.replace('_', "-"), |(_, name)| (*name).to_owned());
        let mut found = Vec::new();
        for (word, names) in WORDS {
            for (bit, candidate) in names.split_whitespace().enumerate() {
                if candidate == name {
                    found.push(Self {
                        word: *word,
                        bit: bit as u32,
                    });
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(name: &str) -> Feature {
        let found = Feature::named(name);
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        found[0]
    }

    #[test]
    fn bits_have_the_numbers_that_the_manuals_give_them() {
        // Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
        for (name, expected) in [
            ("sse2", "sse2 (leaf 1, EDX bit 26)"),
            ("sse4_2", "sse4.2 (leaf 1, ECX bit 20)"),
            ("hypervisor", "hypervisor (leaf 1, ECX bit 31)"),
            ("avx2", "avx2 (leaf 7, EBX bit 5)"),
            ("avx512f", "avx512f (leaf 7, EBX bit 16)"),
            ("avx512vl", "avx512vl (leaf 7, EBX bit 31)"),
            ("rdpid", "rdpid (leaf 7, ECX bit 22)"),
            ("pks", "pks (leaf 7, ECX bit 31)"),
            ("ssbd", "ssbd (leaf 7, EDX bit 31)"),
            (
                "arch-capabilities",
                "arch-capabilities (leaf 7, EDX bit 29)",
            ),
            ("serialize", "serialize (leaf 7, EDX bit 14)"),
            ("avx-vnni", "avx-vnni (leaf 7.1, EAX bit 4)"),
            ("lam", "lam (leaf 7.1, EAX bit 26)"),
            ("xsaves", "xsaves (leaf 0xd.1, EAX bit 3)"),
            ("nx", "nx (leaf 0x80000001, EDX bit 20)"),
            ("lm", "lm (leaf 0x80000001, EDX bit 29)"),
            ("svm", "svm (leaf 0x80000001, ECX bit 2)"),
            ("topoext", "topoext (leaf 0x80000001, ECX bit 22)"),
            ("invtsc", "invtsc (leaf 0x80000007, EDX bit 8)"),
            ("wbnoinvd", "wbnoinvd (leaf 0x80000008, EBX bit 9)"),
            ("virt-ssbd", "virt-ssbd (leaf 0x80000008, EBX bit 25)"),
            (
                "kvmclock-stable-bit",
                "kvmclock-stable-bit (leaf 0x40000001, EAX bit 24)",
            ),
        ] {
            assert_eq!(only(name).to_string(), expected);
        }
        assert_eq!(Feature::named("kvmclock").len(), 2, "old and new");
        assert_eq!(Feature::named("sse5000"), []);
    }

    #[test]
    fn no_word_has_more_than_32_names() {
        for (word, names) in WORDS {
            assert!(names.split_whitespace().count() <= 32, "{word:?}");
        }
    }
}
