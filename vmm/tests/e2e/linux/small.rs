//! A small Linux kernel, as guest-tests/linux/build makes it, with a process that counts in its memory
//! for ever. It comes that far on every KVM; one that interprets CPL 0 needs half a minute for it.
//!
//! The process makes no system call, because not every KVM can, so it is watched from outside: its
//! registers show how far it is, and if it finds its memory changed it ends, at which the kernel
//! panics. The kernel shows that it works by the echo of its serial console, which takes
//! its interrupts and a worker thread.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{BOOT, file, wait_said};
use crate::harness::{Ferry, PATIENCE, require_kvm, scratch};

/// What a KVM that interprets CPL 0 can't do is not used (`noxsave`, and by their numbers POPCNT,
/// SMAP, RDRAND, RDSEED, FSGSBASE, AVX-512, ADX, CMPXCHG16B), and what takes long is left out.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 lpj=1000000 tsc=reliable no_timer_check \
    reboot=k random.trust_cpu=on noxsave clearcpuid=151,308,158,306,288,304,307,141";

/// What ferry logs, and what it says when the guest clears the power button's status.
const LOG: &str = "info,devices=debug";
const BUTTON_SEEN: &str = "the guest has seen the power button pressed";

/// Where the process's code is.
const INIT: std::ops::Range<u64> = 0x40_0000..0x41_0000;

/// Starts the kernel; `None`, with a notice, if it is not there. `more` are options for ferry, `append`
/// words for the kernel.
pub fn boot(dir: &Path, name: &str, more: &[&str], append: &str) -> Option<Ferry> {
    let (kernel, initramfs) = (file("small/vmlinux")?, file("small/initramfs")?);
    let (kernel, initramfs) = (
        kernel.display().to_string(),
        initramfs.display().to_string(),
    );
    let append = format!("{COMMAND_LINE} {append}");
    let mut arguments = vec![
        "--kernel", &kernel, "--initrd", &initramfs, "--append", &append, "--memory", "128M",
        "--paused",
    ];
    arguments.extend_from_slice(more);
    let mut ferry = Ferry::start(dir, name, &arguments);
    ferry.execute("cont", Value::Null);
    Some(ferry)
}

fn hexadecimal(registers: &str, name: &str) -> u64 {
    let (_, rest) = registers.split_once(name).expect(registers);
    let digits = rest.split_whitespace().next().unwrap();
    u64::from_str_radix(digits, 16).unwrap()
}

/// How often the process has gone through its memory: at least `least` times, which is waited for.
pub fn wait_passes(ferry: &mut Ferry, least: u64) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let arguments = json!({ "command-line": "info registers" });
        let registers = ferry.execute("human-monitor-command", arguments);
        let registers = registers.as_str().unwrap();
        if registers.contains("CPL=3") && INIT.contains(&hexadecimal(registers, "RIP=")) {
            let passes = hexadecimal(registers, "R15=");
            if passes >= least {
                return passes;
            }
        }
        assert!(Instant::now() < deadline, "{least} passes: {registers}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Moves the guest to a new process, and ends the old one.
fn move_to(mut source: Ferry, dir: &Path, name: &str) -> Ferry {
    let arguments = ["--incoming", "tcp:127.0.0.1:0", "--log", LOG];
    let mut destination = Ferry::start(dir, name, &arguments);
    let uri = destination.listening_at();
    let refusal = destination.refused("system_powerdown", Value::Null);
    assert!(refusal.contains("no guest here yet"), "{refusal}");
    source.migrate(&uri);
    source.wait_migrated("completed");
    let refusal = source.refused("system_powerdown", Value::Null);
    assert!(refusal.contains("postmigrate"), "{refusal}");
    let output = source.process.output();
    assert!(!output.contains(BUTTON_SEEN), "{output}");
    source.quit();
    destination
}

/// The kernel echoes what is typed at its console.
pub fn echoes(ferry: &mut Ferry, text: &str) {
    ferry.serial.send(format!("{text}\n").as_bytes()).unwrap();
    wait_said(ferry, PATIENCE, &[text]);
}

#[test]
fn a_running_linux_moves_and_runs_on() {
    require_kvm!();
    let dir = scratch();
    let Some(mut source) = boot(dir.path(), "source", &["--log", LOG], "") else {
        return;
    };
    // It has found its processor, its interrupt controllers and its power button.
    wait_said(
        &source,
        BOOT,
        &[
            "ACPI: RSDP 0x00000000000E0000",
            "IOAPIC[0]: apic_id 1, version 17, address 0xfec00000, GSI 0-23",
            "ACPI: INT_SRC_OVR (bus 0 bus_irq 9 global_irq 9 high level)",
            "Using ACPI (MADT) for SMP configuration information",
            "ACPI: Interpreter enabled",
            "ACPI: button: Power Button [PWRF]",
            "Run /init as init process",
        ],
    );
    let before = wait_passes(&mut source, 3);
    echoes(&mut source, "typed at the source");

    let mut middle = move_to(source, dir.path(), "middle");
    let arrived = wait_passes(&mut middle, before);
    wait_passes(&mut middle, arrived + 100);
    echoes(&mut middle, "typed after one migration");

    // The power button is pressed while the guest stands still: it sees that after it has moved.
    middle.execute("stop", Value::Null);
    middle.execute("system_powerdown", Value::Null);
    let event = middle.qmp.wait_event("POWERDOWN", PATIENCE);
    event.expect("the button was pressed");
    let mut last = move_to(middle, dir.path(), "last");
    last.execute("cont", Value::Null);
    let deadline = Instant::now() + PATIENCE;
    while !last.process.output().contains(BUTTON_SEEN) {
        assert!(Instant::now() < deadline, "{}", last.process.output());
        std::thread::sleep(Duration::from_millis(5));
    }
    // The interrupt is over with that: the guest goes on.
    let arrived = wait_passes(&mut last, arrived + 100);
    wait_passes(&mut last, arrived + 100);
    echoes(&mut last, "typed after two migrations");
}

#[test]
fn a_kernel_without_acpi_finds_the_mp_table() {
    require_kvm!();
    let dir = scratch();
    let Some(mut ferry) = boot(dir.path(), "linux", &[], "acpi=off") else {
        return;
    };
    wait_said(
        &ferry,
        BOOT,
        &[
            "found SMP MP-table",
            "IOAPIC[0]: apic_id 1, version 17, address 0xfec00000, GSI 0-23",
            "Run /init as init process",
        ],
    );
    let passes = wait_passes(&mut ferry, 3);
    wait_passes(&mut ferry, passes + 100);
    echoes(&mut ferry, "typed");
}
