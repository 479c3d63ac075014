//! What a guest finds at its entry, by each boot protocol.

use guest_tests::boot::{Options, Probe, Protocol, Report, Then, checksum, command_line};
use guest_tests::driver::process::Process;

use crate::harness::{Guest, PATIENCE, ferry, require_kvm, scratch};

const FLAVOURS: [(&[u8], Protocol); 2] = [
    (guest_tests::BOOT, Protocol::Pvh),
    (guest_tests::BOOT_LINUX64, Protocol::Linux64),
];

/// Everything that a guest said at its start.
#[derive(Default)]
struct Told {
    protocol: Option<Protocol>,
    rsdp: u64,
    command_line: String,
    /// Base, size, kind and probe.
    regions: Vec<(u64, u64, u64, Probe)>,
    /// Size and checksum.
    initrd: Option<(u64, u64)>,
    vcpus: u64,
}

/// Runs the guest up to its power-off. A file keeps its first words; a socket's client may come
/// too late for them.
fn boot(guest: &Guest<'_>, more: &[&str]) -> Told {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (kernel, serial, smp) = (at("kernel"), at("serial"), guest.smp.to_string());
    std::fs::write(&kernel, guest.image).unwrap();
    let serial_option = format!("file:{serial}");
    let mut arguments = vec![
        "run",
        "--kernel",
        &kernel,
        "--append",
        &guest.append,
        "--memory",
        guest.memory,
        "--smp",
        &smp,
        "--serial",
        &serial_option,
    ];
    arguments.extend_from_slice(more);
    let mut process = Process::spawn(ferry(), arguments, &dir.path().join("log")).unwrap();
    let status = process.wait(PATIENCE).unwrap().expect("it powers off");
    assert!(status.success(), "{}", process.output());
    let said = std::fs::read_to_string(serial).unwrap();
    let mut told = Told::default();
    let mut done = false;
    for line in said.lines() {
        if let Some(text) = command_line(line) {
            text.clone_into(&mut told.command_line);
        }
        match Report::parse(line) {
            Some(Report::Entered { protocol, rsdp }) => {
                told.protocol = Some(protocol);
                told.rsdp = rsdp.0;
            }
            Some(Report::Region {
                base,
                size,
                kind,
                probe,
            }) => told.regions.push((base.0, size.0, kind, probe)),
            Some(Report::Initrd { size, checksum, .. }) => told.initrd = Some((size, checksum.0)),
            Some(Report::Vcpus { running }) => told.vcpus = running,
            Some(Report::Done { .. }) => done = true,
            _ => {}
        }
    }
    assert!(done, "{said}");
    told
}

fn guest<'a>(image: &'a [u8], memory: &'a str, smp: u32, then: Then) -> Guest<'a> {
    let options = Options {
        then,
        cpus: smp.into(),
    };
    Guest {
        image,
        append: format!("{options} hello  world=\"1 2\""),
        memory,
        smp,
    }
}

#[test]
fn the_memory_map_is_the_memory_that_is_there() {
    require_kvm!();
    const HOLE_END: u64 = 4 << 30;
    for (image, protocol) in FLAVOURS {
        for (memory, bytes) in [("16M", 16u64 << 20), ("512M", 512 << 20), ("4G", 4 << 30)] {
            let told = boot(&guest(image, memory, 1, Then::Off), &[]);
            assert_eq!(told.protocol, Some(protocol));
            let mut ram = 0;
            let mut end = 0;
            for &(base, size, kind, probe) in &told.regions {
                assert!(base >= end, "{memory}: {:x?}", told.regions);
                end = base + size;
                if kind != 1 {
                    continue;
                }
                ram += size;
                assert_ne!(
                    probe,
                    Probe::Lost,
                    "{memory}: RAM at {base:#x} is not there"
                );
                // The hole for devices is no RAM.
                assert!(
                    end <= 0xfec0_0000 || base >= HOLE_END,
                    "{memory}: {base:#x}"
                );
                if base >= 1 << 20 {
                    assert_eq!(probe, Probe::Kept, "{memory}: {base:#x}");
                }
            }
            // Less what a PC reserves below 1 MiB.
            assert!(
                (bytes - (1 << 20)..bytes).contains(&ram),
                "{memory}: {ram:#x}"
            );
            let beyond = told.regions.iter().any(|region| region.0 == HOLE_END);
            assert_eq!(beyond, memory == "4G", "{:x?}", told.regions);
        }
    }
}

#[test]
fn the_command_line_the_initrd_and_all_vcpus_are_there() {
    require_kvm!();
    let dir = scratch();
    let initrd = dir.path().join("initrd");
    // No whole number of pages.
    let contents: Vec<u8> = (0..1_000_003u32).map(|n| (n * 7 + n / 251) as u8).collect();
    std::fs::write(&initrd, &contents).unwrap();
    for (image, protocol) in FLAVOURS {
        for smp in [1, 2, 4] {
            let guest = guest(image, "64M", smp, Then::Off);
            let told = boot(&guest, &["--initrd", initrd.to_str().unwrap()]);
            assert_eq!(told.protocol, Some(protocol));
            assert_eq!(told.command_line, guest.append);
            let expected = (contents.len() as u64, checksum(&contents));
            assert_eq!(told.initrd, Some(expected), "{protocol}");
            assert_eq!(told.vcpus, u64::from(smp), "{protocol}");
        }
        let told = boot(&guest(image, "64M", 1, Then::Off), &[]);
        assert_eq!(told.initrd, None);
    }
}
