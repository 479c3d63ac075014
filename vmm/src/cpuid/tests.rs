use super::*;
use crate::kvm::tests::kvm_or_skip;

fn row(function: u32, index: u32, registers: [u32; 4]) -> CpuidEntry {
    let [eax, ebx, ecx, edx] = registers;
    let flags = u32::from(has_subleaves(function)) * KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    CpuidEntry {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
    }
}

/// A host with everything up to AVX-512 and AMX.
fn host(vendor: &str) -> Cpuid {
    let bytes = vendor.as_bytes();
    let part = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let all = u32::MAX;
    Cpuid(vec![
        row(0, 0, [0x1f, part(0), part(8), part(4)]),
        row(1, 0, [0x0008_06f8, 0x0710_0800, all, all]),
        row(4, 0, [0xfc00_4121, 0x02c0_003f, 63, 0]),
        row(4, 3, [0xfc1f_c163, 0x0380_003f, 0xffff, 4]),
        row(6, 0, [all, 1, 9, 0]),
        row(7, 0, [2, all, all, all]),
        row(7, 1, [all, all, all, all]),
        row(0xb, 0, [1, 2, 0x100, 7]),
        row(0xd, 0, [0x602e7, 0x240, 0x2b00, 0]),
        row(0xd, 1, [0x1f, 0x240, 0x1800, 0]),
        row(0xd, 2, [0x100, 0x240, 0, 0]),
        row(0xd, 5, [0x40, 0x440, 0, 0]),
        row(0xd, 6, [0x200, 0x480, 0, 0]),
        row(0xd, 7, [0x400, 0x680, 0, 0]),
        row(0xd, 9, [0x8, 0xa80, 0, 0]),
        row(0xd, 17, [0x40, 0xac0, 2, 0]),
        row(0xd, 18, [0x2000, 0xb00, 6, 0]),
        row(0x1f, 0, [1, 2, 0x100, 7]),
        row(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
        row(0x8000_0001, 0, [0, 0, all, all]),
        row(0x8000_0002, 0, [1, 2, 3, 4]),
        row(0x8000_0007, 0, [0, 0, 0, 0x100]),
        row(0x8000_0008, 0, [0x3030, all, 0x700f, 0]),
        row(0x8000_001e, 0, [7, 0x103, 2, 0]),
        row(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
        row(0x4000_0001, 0, [all, 0, 0, 0]),
    ])
}

fn cpu(model: &str) -> Cpuid {
    let model: Model = model.parse().unwrap();
    model.cpuid(&host("GenuineIntel")).unwrap()
}

fn has(table: &Cpuid, name: &str) -> bool {
    let features = Feature::named(name);
    assert!(!features.is_empty(), "{name}");
    features.iter().all(|feature| table.has(*feature))
}

#[test]
fn models_have_what_their_level_says_and_no_more() {
    let v2 = cpu("x86-64-v2");
    for name in [
        "cx16",
        "lahf-lm",
        "popcnt",
        "sse4.2",
        "ssse3",
        "nx",
        "lm",
        "hypervisor",
    ] {
        assert!(has(&v2, name), "{name}");
    }
    for name in [
        "avx", "xsave", "avx2", "bmi1", "aes", "vmx", "pcid", "invtsc",
    ] {
        assert!(!has(&v2, name), "{name}");
    }
    assert!(v2.entry(0xd, 0).is_none(), "no XSAVE, no leaf about it");
    let v3 = cpu("x86-64-v3");
    for name in [
        "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave",
    ] {
        assert!(has(&v3, name), "{name}");
    }
    assert!(!has(&v3, "avx512f") && !has(&v3, "xsaves"));
    let states = v3.entry(0xd, 0).unwrap();
    assert_eq!((states.eax, states.ecx), (7, 0x340), "x87, SSE, AVX");
    assert!(v3.entry(0xd, 5).is_none());
    let brand = v3.entry(0x8000_0002, 0).unwrap();
    assert_eq!(brand.eax.to_le_bytes(), *b"Ferr");
}

#[test]
fn host_has_everything_but_promises_that_hold_only_there() {
    let table = cpu("host");
    assert!(has(&table, "avx512f") && has(&table, "amx-tile") && !has(&table, "invtsc"));
    assert!(has(&cpu("host,+invtsc"), "invtsc"));
    let amd = Model::default().cpuid(&host("AuthenticAMD")).unwrap();
    let mirror = amd.entry(0x8000_0001, 0).unwrap().edx & 0x0183_f3ff;
    assert_eq!(mirror, amd.entry(1, 0).unwrap().edx & 0x0183_f3ff);
}

#[test]
fn flags_are_added_and_removed_with_what_depends_on_them() {
    let table = cpu("x86-64-v3,+aes,pcid=on,-fma");
    assert!(has(&table, "aes") && has(&table, "pcid") && !has(&table, "fma"));
    let table = cpu("host,-avx");
    assert!(!has(&table, "avx2") && !has(&table, "avx512vl") && has(&table, "xsave"));
    assert_eq!(table.entry(0xd, 0).unwrap().eax & 0xe7, 3);
    let table = cpu("host,avx512f=off");
    assert!(!has(&table, "avx512bw") && has(&table, "avx2"));
    // PKRU and AMX stay, and the size is that of what is left.
    assert_eq!(table.entry(0xd, 0).unwrap().ecx, 0x2b00);
    let table = cpu("host,avx512f=off,-amx-tile,-pku");
    assert_eq!(table.entry(0xd, 0).unwrap().ecx, 0x340);
    assert!(cpu("host,-xsave").entry(0xd, 0).is_none());
    // Other spellings of the same.
    assert_eq!(cpu("host,-sse4_2"), cpu("host,sse4.2=off"));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let error = |text: &str| text.parse::<Model>().unwrap_err().to_string();
    assert!(error("qemu64").contains("unknown CPU model 'qemu64'; known are host"));
    assert!(error("").contains("unknown CPU model ''"));
    assert_eq!(error("host,+mmx2"), "unknown CPU feature 'mmx2'");
    assert!(error("host,avx").contains("'avx' is not +flag, -flag"));
    let mut weak = host("GenuineIntel");
    for name in ["avx2", "movbe", "kvm-pv-ipi", "tsc-deadline"] {
        for feature in Feature::named(name) {
            weak.set(feature.word, feature.bit, false);
        }
    }
    let model: Model = "x86-64-v3".parse().unwrap();
    assert_eq!(
        model.cpuid(&weak).unwrap_err().to_string(),
        "CPU model x86-64-v3: this host lacks movbe (leaf 1, ECX bit 22), avx2 (leaf 7, EBX bit 5)"
    );
    let without: Model = "x86-64-v3,-movbe,-avx2".parse().unwrap();
    without.cpuid(&weak).unwrap();
    let more: Model = "x86-64-v2,+avx2,+xsave,+avx".parse().unwrap();
    assert!(
        more.cpuid(&weak)
            .unwrap_err()
            .to_string()
            .contains("lacks avx2")
    );
}

#[test]
fn each_vcpu_is_a_core_with_an_id_of_its_own() {
    let table = cpu("host");
    let third = table.for_vcpu(2, 3);
    let entry = |function, index| third.entry(function, index).unwrap();
    assert_eq!(entry(1, 0).ebx, 0x0204_0800, "APIC ID 2, room for 4");
    assert!(has(&third, "ht"));
    let threads = entry(0xb, 0);
    assert_eq!(
        (threads.eax, threads.ebx, threads.ecx, threads.edx),
        (0, 1, 0x100, 2)
    );
    let cores = entry(0xb, 1);
    assert_eq!(
        (cores.eax, cores.ebx, cores.ecx, cores.edx),
        (2, 3, 0x201, 2)
    );
    assert_eq!(entry(0xb, 2).ecx, 2, "the end");
    assert!(third.entry(0x1f, 0).is_none());
    assert_eq!(entry(0x8000_0008, 0).ecx, 0x2002);
    assert_eq!(entry(0x8000_001e, 0).eax, 2);
    assert_eq!(entry(4, 0).eax, 0x0c00_0121, "a first-level cache each");
    assert_eq!(
        entry(4, 3).eax,
        0x0c00_8163,
        "the last level shared by three"
    );
    let alone = table.for_vcpu(0, 1);
    assert!(!has(&alone, "ht"));
    assert_eq!(alone.entry(1, 0).unwrap().ebx, 0x0001_0800);
}

fn guest(model: &str) -> GuestCpu {
    GuestCpu {
        cpuid: cpu(model),
        tsc_khz: 2_596_120,
    }
}

fn destination() -> HostCpu {
    HostCpu {
        supported: host("GenuineIntel"),
        tsc_khz: 2_596_120,
        tsc_control: false,
    }
}

#[test]
fn a_guest_can_go_where_everything_it_sees_is() {
    for model in ["host", "x86-64-v2", "x86-64-v3"] {
        assert_eq!(compatibility(&guest(model), &destination()), [""; 0]);
    }
    // Bits that only mirror control registers are no reason.
    let mut host = destination();
    for name in ["osxsave", "ospke", "apic", "ht", "hypervisor"] {
        for feature in Feature::named(name) {
            host.supported.set(feature.word, feature.bit, false);
        }
    }
    assert_eq!(compatibility(&guest("host"), &host), [""; 0]);
}

#[test]
fn every_missing_feature_is_named() {
    let mut host = destination();
    for name in ["avx512f", "nx", "kvm-pv-ipi", "avx-vnni"] {
        for feature in Feature::named(name) {
            host.supported.set(feature.word, feature.bit, false);
        }
    }
    host.supported
        .word_mut(Word {
            function: 7,
            index: 0,
            register: Register::Ebx,
        })
        .map(|word| *word &= !(1 << 12))
        .unwrap();
    host.supported.entry_mut(0xd, 0).unwrap().eax &= !(1 << 9);
    assert_eq!(
        compatibility(&guest("host"), &host),
        [
            "destination lacks leaf 7, EBX bit 12",
            "destination lacks avx512f (leaf 7, EBX bit 16)",
            "destination lacks avx-vnni (leaf 7.1, EAX bit 4)",
            "destination lacks nx (leaf 0x80000001, EDX bit 20)",
            "destination lacks kvm-pv-ipi (leaf 0x40000001, EAX bit 11)",
            "destination lacks XSAVE state component 9 (PKRU)",
        ]
    );
    // A guest that doesn't see them can go there, but for NX.
    assert_eq!(
        compatibility(&guest("x86-64-v3,-kvm-pv-ipi"), &host),
        ["destination lacks nx (leaf 0x80000001, EDX bit 20)"]
    );
}

#[test]
fn a_tsc_of_another_frequency_needs_scaling() {
    let mut host = destination();
    host.tsc_khz = 2_596_120 + 600;
    assert_eq!(
        compatibility(&guest("host"), &host),
        [""; 0],
        "within 250 ppm"
    );
    host.tsc_khz = 2_000_000;
    let reasons = compatibility(&guest("host"), &host);
    assert_eq!(reasons.len(), 1);
    assert!(reasons[0].contains("2596120 kHz, the destination's at 2000000 kHz"));
    host.tsc_control = true;
    assert_eq!(compatibility(&guest("host"), &host), [""; 0]);
}

#[test]
fn another_vendor_is_a_reason() {
    let mut host = destination();
    host.supported = super::tests::host("AuthenticAMD");
    let reasons = compatibility(&guest("x86-64-v2"), &host);
    assert!(reasons[0].contains("\"GenuineIntel\""), "{reasons:?}");
}

#[test]
fn what_a_guest_sees_here_is_supported_here() {
    let Some(kvm) = kvm_or_skip() else { return };
    let start = std::time::Instant::now();
    let host = HostCpu::probe(&kvm).unwrap();
    eprintln!("probing took {:?}", start.elapsed());
    for model in ["host", "x86-64-v2", "x86-64-v2,-popcnt"] {
        let model: Model = model.parse().unwrap();
        let table = model.cpuid(&host.supported).unwrap();
        let layout = crate::memory::layout(crate::memory::MIN_RAM).unwrap();
        let ram = crate::memory::map(&layout, &Default::default()).unwrap();
        let vm = crate::kvm::Vm::new(&kvm, ram).unwrap();
        let vcpu = crate::vcpu::Vcpu::new(&kvm, &vm, 0, 1, &table).unwrap();
        let guest = GuestCpu {
            cpuid: vcpu.cpuid(),
            tsc_khz: vcpu.tsc_khz().unwrap(),
        };
        // KVM may show more than it was given, and hides what depends on the host's bugs.
        for name in ["nx", "lm", "cx16", "sse4.2", "hypervisor"] {
            assert!(has(&guest.cpuid, name), "{name}");
        }
        assert_eq!(compatibility(&guest, &host), [""; 0]);
    }
}
