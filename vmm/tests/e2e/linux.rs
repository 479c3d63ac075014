//! Real Linux kernels: a small one ([`small`]), and Debian's cloud kernel, as guest-tests/linux/fetch
//! gets it.
//!
//! On hardware KVM that boots in a second. A KVM that interprets CPL 0 takes half a minute to the
//! kernel's first lines and many minutes to unpack a bzImage, so these tests ask only for what
//! both can show: the ELF file by its own first lines, the bzImage by where its code runs.

mod hints;
mod network;
pub mod small;
mod stock;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Ferry, PATIENCE, require_kvm, scratch, skip};

const COMMAND_LINE: &str = "earlyprintk=serial,ttyS0 console=ttyS0 panic=-1 ferry.test=\"a b\"";

/// How long booting may take, on a machine that does other things besides.
pub const BOOT: Duration = Duration::from_secs(600);

/// What no guest should ever say.
const COMPLAINTS: [&str; 15] = [
    "ACPI BIOS",
    "ACPI Error",
    "ACPI Warning",
    "BUG:",
    "Firmware Bug",
    "I/O error",
    "Kernel panic",
    "NETDEV WATCHDOG",
    "WARNING:",
    "can't request region",
    "damaged memory",
    "failed with error",
    "invalid for parameter",
    "nobody cared",
    "unknown parameter",
];

/// The file of that name in target/linux, or a notice that the test is skipped.
fn file(name: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("FERRY_TEST_LINUX").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/linux"),
        PathBuf::from,
    );
    let path = dir.join(name);
    if path.is_file() {
        return Some(path);
    }
    skip(&format!(
        "{} is not there; guest-tests/linux/fetch and build get it, or set FERRY_TEST_LINUX to \
         another directory with their files",
        path.display()
    ));
    None
}

/// Waits until the guest has said all of this, in whatever order.
pub fn wait_said(ferry: &Ferry, patience: Duration, parts: &[&str]) {
    let mut missing = parts.to_vec();
    let said = ferry.serial.wait_for(patience, |line| {
        for complaint in COMPLAINTS {
            assert!(!line.contains(complaint), "{line}");
        }
        missing.retain(|part| !line.contains(part));
        missing.is_empty().then_some(())
    });
    if let Err(err) = said {
        panic!("no {missing:?}: {err}\n{}", ferry.process.output());
    }
}

fn run(dir: &Path, kernel: &Path) -> Ferry {
    let kernel = kernel.display().to_string();
    let arguments = [
        "--kernel",
        &kernel,
        "--append",
        COMMAND_LINE,
        "--memory",
        "256M",
        "--smp",
        "2",
        "--rng",
        "--balloon",
        "--paused",
    ];
    let mut ferry = Ferry::start(dir, "linux", &arguments);
    ferry.execute("cont", Value::Null);
    ferry
}

/// The instruction pointer of the first vCPU.
fn instruction(ferry: &mut Ferry) -> u64 {
    let arguments = json!({ "command-line": "info registers" });
    let registers = ferry.execute("human-monitor-command", arguments);
    let registers = registers.as_str().unwrap();
    let (_, rest) = registers.split_once("RIP=").expect(registers);
    let digits = rest.split_whitespace().next().unwrap();
    u64::from_str_radix(digits, 16).unwrap()
}

#[test]
fn an_elf_kernel_tells_what_it_was_given() {
    require_kvm!();
    let Some(kernel) = file("vmlinux") else {
        return;
    };
    let dir = scratch();
    let ferry = run(dir.path(), &kernel);
    let mut expected = vec![
        "Linux version ".to_owned(),
        format!("Command line: {COMMAND_LINE}"),
        "BIOS-e820: [mem 0x0000000000100000-0x000000000fffffff] usable".to_owned(),
        "Hypervisor detected: KVM".to_owned(),
        "ACPI: RSDP 0x00000000000E0000 000024 (v02 FERRY )".to_owned(),
        "ACPI: FACP 0x".to_owned(),
        "ACPI: DSDT 0x".to_owned(),
        "ACPI: APIC 0x".to_owned(),
        "ACPI: INT_SRC_OVR (bus 0 bus_irq 9 global_irq 9 high level)".to_owned(),
        "ACPI: Using ACPI (MADT) for SMP configuration information".to_owned(),
        "smpboot: Allowing 2 CPUs, 0 hotplug CPUs".to_owned(),
    ];
    ferry.wait_line(|line| {
        for complaint in COMPLAINTS {
            assert!(!line.contains(complaint), "{line}");
        }
        // The devices are in the ACPI tables.
        assert!(!line.contains("virtio_mmio.device"), "{line}");
        expected.retain(|part| !line.contains(part));
        expected.is_empty().then_some(())
    });
}

#[test]
fn a_bzimage_is_loaded_and_entered() {
    require_kvm!();
    let Some(kernel) = file("bzImage") else {
        return;
    };
    let dir = scratch();
    let mut ferry = run(dir.path(), &kernel);
    // It copies itself behind its place and unpacks there: the instruction pointer goes from
    // page to page, and nothing goes wrong meanwhile.
    let deadline = Instant::now() + PATIENCE;
    let mut pages = std::collections::BTreeSet::new();
    while pages.len() < 3 {
        assert!(Instant::now() < deadline, "it runs on {pages:x?} only");
        let at = instruction(&mut ferry);
        assert!(at >= 0x10_0000, "it is at {at:#x}");
        pages.insert(at >> 12);
        assert_eq!(ferry.status(), "running", "{}", ferry.process.output());
    }
}
