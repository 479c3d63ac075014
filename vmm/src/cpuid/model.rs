//! CPU models: `host`, `x86-64-v2` and `x86-64-v3`, with flags added and removed.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::features::{LEAF_1_ECX, LEAF_1_EDX, WORDS};
use super::{Cpuid, Feature, Register, Word};

/// What a model starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// All that the host's KVM can give.
    Host,
    /// The microarchitecture level of the x86-64 psABI: SSE4.2, CMPXCHG16B, POPCNT.
    V2,
    /// The next: AVX2, BMI, FMA, MOVBE.
    V3,
}

/// A CPU model, as `--cpu` names it: `x86-64-v3,-avx2,+aes,pcid=on`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// What it starts from.
    pub base: Base,
    /// Flags added or removed, by their names; the last word on a flag counts.
    flags: BTreeMap<String, bool>,
}

/// Why there is no such CPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No such model.
    #[error("unknown CPU model '{0}'; known are host, x86-64-v2 and x86-64-v3")]
    Unknown(String),
    /// Not `+flag`, `-flag`, `flag=on` or `flag=off`.
    #[error("'{0}' is not +flag, -flag, flag=on or flag=off")]
    Syntax(String),
    /// No feature of that name.
    #[error("unknown CPU feature '{0}'")]
    Feature(String),
    /// The host can't give what was asked for.
    #[error("CPU model {model}: this host lacks {}", list(.missing))]
    Missing {
        /// The model.
        model: String,
        /// What the host lacks.
        missing: Vec<Feature>,
    },
}

fn list(features: &[Feature]) -> String {
    let names: Vec<_> = features.iter().map(Feature::to_string).collect();
    names.join(", ")
}

/// x86-64-v2: its instruction sets, and what a kernel and KVM's irqchip expect.
const V2: &str = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx \
                  fxsr sse sse2 pni ssse3 cx16 sse4.1 sse4.2 x2apic popcnt tsc-deadline \
                  hypervisor arat syscall nx lm lahf-lm kvmclock kvm-nopiodelay \
                  kvm-steal-time kvm-pv-eoi kvm-pv-unhalt kvm-pv-ipi kvm-pv-tlb-flush \
                  kvm-poll-control kvm-pv-sched-yield kvmclock-stable-bit";
/// What v3 adds.
const V3: &str = "fma movbe xsave avx f16c bmi1 avx2 bmi2 abm";
/// Not needed by the level, only given if the host has them.
const IF_POSSIBLE: &str = "tsc-deadline arat kvmclock kvm-nopiodelay kvm-steal-time kvm-pv-eoi \
                           kvm-pv-unhalt kvm-pv-ipi kvm-pv-tlb-flush kvm-poll-control \
                           kvm-pv-sched-yield kvmclock-stable-bit";
/// Not given by `host` unless asked for, as in QEMU: a promise that only holds on this host.
const HOST_ONLY_IF_ASKED: &str = "invtsc";

/// Without the first, the others make no sense, and KVM or the guest stumbles.
const NEEDS: &[(&str, &str)] = &[
    (
        "xsave",
        "avx xsaveopt xsavec xgetbv1 xsaves xfd pku mpx avx512f amx-tile",
    ),
    (
        "avx",
        "fma f16c avx2 xop fma4 vaes vpclmulqdq avx-vnni avx-ifma avx512f",
    ),
    (
        "avx512f",
        "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512vbmi2 \
         avx512vnni avx512bitalg avx512-vpopcntdq avx512-4vnniw avx512-4fmaps \
         avx512-vp2intersect avx512-bf16 avx512-fp16",
    ),
    ("amx-tile", "amx-bf16 amx-int8 amx-fp16"),
    ("lm", "syscall lahf-lm pdpe1gb la57"),
    ("kvm-asyncpf", "kvm-asyncpf-int"),
];

/// The highest leaves of the models that aren't the host.
const MODEL_MAX_LEAF: u32 = 0xd;
const MODEL_MAX_EXTENDED: u32 = 0x8000_0008;

impl FromStr for Model {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        let mut parts = text.split(',');
        let base = match parts.next().unwrap_or_default() {
            "host" => Base::Host,
            "x86-64-v2" => Base::V2,
            "x86-64-v3" => Base::V3,
            other => return Err(ModelError::Unknown(other.to_owned())),
        };
        let mut flags = BTreeMap::new();
        for part in parts {
            let (name, on) = if let Some(name) = part.strip_prefix('+') {
                (name, true)
            } else if let Some(name) = part.strip_prefix('-') {
                (name, false)
            } else {
                match part.split_once('=') {
                    Some((name, "on")) => (name, true),
                    Some((name, "off")) => (name, false),
                    _ => return Err(ModelError::Syntax(part.to_owned())),
                }
            };
            let found = Feature::named(name);
            let Some(canonical) = found.first().and_then(Feature::name) else {
                return Err(ModelError::Feature(name.to_owned()));
            };
            flags.insert(canonical.to_owned(), on);
        }
        Ok(Self { base, flags })
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.base {
            Base::Host => "host",
            Base::V2 => "x86-64-v2",
            Base::V3 => "x86-64-v3",
        })?;
        for (name, on) in &self.flags {
            write!(f, ",{}{name}", if *on { '+' } else { '-' })?;
        }
        Ok(())
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            base: Base::Host,
            flags: BTreeMap::new(),
        }
    }
}

impl Model {
    /// The table of this model on a host that supports `supported`, which is best taken from
    /// [`HostCpu`](super::HostCpu). [`Vcpu::new`](crate::vcpu::Vcpu::new) adapts it to each vCPU.
    pub fn cpuid(&self, supported: &Cpuid) -> Result<Cpuid, ModelError> {
        let mut wanted: BTreeMap<Word, u32> = BTreeMap::new();
        let mut required: BTreeMap<Word, u32> = BTreeMap::new();
        let add = |set: &mut BTreeMap<Word, u32>, names: &str| {
            for feature in names.split_whitespace().flat_map(Feature::named) {
                *set.entry(feature.word).or_default() |= 1 << feature.bit;
            }
        };
        let remove = |set: &mut BTreeMap<Word, u32>, names: &str| {
            for feature in names.split_whitespace().flat_map(Feature::named) {
                *set.entry(feature.word).or_default() &= !(1 << feature.bit);
            }
        };
        match self.base {
            Base::Host => {
                for (word, _) in WORDS {
                    wanted.insert(*word, supported.word(*word));
                }
                remove(&mut wanted, HOST_ONLY_IF_ASKED);
            }
            Base::V2 | Base::V3 => {
                add(&mut wanted, V2);
                if self.base == Base::V3 {
                    add(&mut wanted, V3);
                }
                required = wanted.clone();
                remove(&mut required, IF_POSSIBLE);
            }
        }
        for (name, on) in &self.flags {
            if *on {
                add(&mut wanted, name);
                // kvmclock is two bits, of which a KVM may have one.
                if name != "kvmclock" {
                    add(&mut required, name);
                }
            } else {
                remove(&mut wanted, name);
                remove(&mut required, name);
            }
        }
        for (needed, dependent) in NEEDS {
            let has = |feature: &Feature| {
                wanted.get(&feature.word).copied().unwrap_or(0) >> feature.bit & 1 == 1
            };
            if !Feature::named(needed).iter().all(has) {
                remove(&mut wanted, dependent);
                remove(&mut required, dependent);
            }
        }
        let missing: Vec<_> = required
            .iter()
            .flat_map(|(&word, &bits)| {
                let lacking = bits & !supported.word(word);
                (0..32)
                    .filter(move |bit| lacking >> bit & 1 == 1)
                    .map(move |bit| Feature { word, bit })
            })
            .collect();
        if !missing.is_empty() {
            return Err(ModelError::Missing {
                model: self.to_string(),
                missing,
            });
        }
        let mut table = supported.clone();
        for (word, _) in WORDS {
            let bits = wanted.get(word).copied().unwrap_or(0);
            if let Some(value) = table.word_mut(*word) {
                *value &= bits;
            }
        }
        table.mirror_on_amd();
        if self.base != Base::Host {
            table.be_generic(&self.to_string());
        }
        table.fit_xsave();
        Ok(table)
    }
}

impl Cpuid {
    /// AMD repeats bits of leaf 1 in leaf 0x8000_0001: both say the same.
    fn mirror_on_amd(&mut self) {
        // AMD APM volume 3, appendix E.4.2: bits 0-9, 12-17, 23 and 24.
        const MIRRORED: u32 = 0x0183_f3ff;
        if !matches!(self.vendor().as_str(), "AuthenticAMD" | "HygonGenuine") {
            return;
        }
        let bits = self.word(LEAF_1_EDX) & MIRRORED;
        let word = Word {
            function: 0x8000_0001,
            index: 0,
            register: Register::Edx,
        };
        if let Some(value) = self.word_mut(word) {
            *value = *value & !MIRRORED | bits;
        }
    }

    /// Hides what would tell hosts apart: family, model, name, and leaves that no level needs.
    fn be_generic(&mut self, name: &str) {
        self.0.retain(|entry| {
            matches!(
                entry.function,
                0 | 1 | 4 | 6 | 7 | 0xb | 0xd | 0x4000_0000 | 0x4000_0001 | 0x8000_0000
                    ..=0x8000_0004 | 0x8000_0007 | 0x8000_0008
            )
        });
        let mut brand = [b' '; 48];
        let full = format!("Ferry {name}");
        for (to, from) in brand.iter_mut().zip(full.bytes()) {
            *to = from;
        }
        let brand_register = |at: usize| {
            let bytes = brand.get(at..at + 4).and_then(|bytes| bytes.first_chunk());
            bytes.map_or(0, |bytes: &[u8; 4]| u32::from_le_bytes(*bytes))
        };
        for entry in &mut self.0 {
            match entry.function {
                0 => entry.eax = entry.eax.min(MODEL_MAX_LEAF),
                // Family 6, model 6, stepping 3: a name that no kernel has quirks for.
                1 => entry.eax = 0x663,
                6 => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
                7 if entry.index == 0 => entry.eax = entry.eax.min(1),
                7 => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
                0x8000_0000 => entry.eax = entry.eax.min(MODEL_MAX_EXTENDED),
                0x8000_0001 => entry.eax = 0x663,
                leaf @ 0x8000_0002..=0x8000_0004 => {
                    let at = (leaf - 0x8000_0002) as usize * 16;
                    entry.eax = brand_register(at);
                    entry.ebx = brand_register(at + 4);
                    entry.ecx = brand_register(at + 8);
                    entry.edx = brand_register(at + 12);
                }
                _ => {}
            }
        }
    }

    /// Leaves only the XSAVE state components that the features need, and the leaf that tells
    /// them only if there is XSAVE at all.
    fn fit_xsave(&mut self) {
        /// A component (its number) is there for one of the features.
        const COMPONENTS: &[(u32, &str)] = &[
            (2, "avx"),
            (3, "mpx"),
            (4, "mpx"),
            (5, "avx512f"),
            (6, "avx512f"),
            (7, "avx512f"),
            (9, "pku"),
            (11, "shstk"),
            (12, "shstk"),
            (17, "amx-tile"),
            (18, "amx-tile"),
        ];
        const XSAVE: Feature = Feature {
            word: LEAF_1_ECX,
            bit: 26,
        };
        if !self.has(XSAVE) {
            self.0.retain(|entry| entry.function != 0xd);
            return;
        }
        // x87 and SSE always.
        let mut keep = 3u32;
        for (component, feature) in COMPONENTS {
            if Feature::named(feature).iter().any(|f| self.has(*f)) {
                keep |= 1 << component;
            }
        }
        self.0.retain(|entry| {
            entry.function != 0xd
                || entry.index < 2
                || keep
                    .checked_shr(entry.index)
                    .is_some_and(|bits| bits & 1 == 1)
        });
        // What all components take together, with those that are left.
        let end = |entry: &crate::vcpu::CpuidEntry| entry.eax.saturating_add(entry.ebx);
        let size = self
            .0
            .iter()
            .filter(|entry| entry.function == 0xd && entry.index >= 2 && entry.ecx & 1 == 0)
            .map(end)
            .fold(576, u32::max);
        if let Some(entry) = self.entry_mut(0xd, 0) {
            entry.eax &= keep;
            entry.edx = 0;
            // The size for what is enabled now is KVM's to tell.
            entry.ecx = size;
        }
        if let Some(entry) = self.entry_mut(0xd, 1) {
            // Components of the supervisor, saved with XSAVES only.
            entry.ecx &= keep;
            entry.edx = 0;
        }
    }
}
