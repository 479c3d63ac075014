//! Debian's kernel with a shell (guest-tests/linux/shell-init), on two vCPUs: for KVMs that execute all of a
//! kernel natively, as every KVM on hardware virtualization does.

use serde_json::Value;

use super::{BOOT, file, wait_said};
use crate::harness::{Ferry, PATIENCE, require_kvm, scratch, skip};
use crate::instructions::executes_popcnt_at_cpl_0;

/// The shell answers.
fn answers(ferry: &mut Ferry, text: &str) {
    ferry.serial.send(format!("{text}\n").as_bytes()).unwrap();
    wait_said(ferry, PATIENCE, &[&format!("heard {text}")]);
}

#[test]
fn a_shell_on_debians_kernel_moves_and_answers() {
    require_kvm!();
    let dir = scratch();
    if !executes_popcnt_at_cpl_0(dir.path()) {
        skip(
            "this KVM interprets CPL 0, so a stock kernel boots for many minutes; a KVM with \
             hardware virtualization is needed",
        );
        return;
    }
    let (Some(kernel), Some(initramfs)) = (file("bzImage"), file("initramfs")) else {
        return;
    };
    let (kernel, initramfs) = (
        kernel.display().to_string(),
        initramfs.display().to_string(),
    );
    let arguments = [
        "--kernel",
        &kernel,
        "--initrd",
        &initramfs,
        "--append",
        "console=ttyS0 panic=-1",
        "--memory",
        "256M",
        "--smp",
        "2",
        "--paused",
    ];
    let mut source = Ferry::start(dir.path(), "source", &arguments);
    source.execute("cont", Value::Null);
    wait_said(
        &source,
        BOOT,
        &["Brought up 1 node, 2 CPUs", "shell is ready"],
    );
    answers(&mut source, "one");
    let (mut destination, _) = source.move_on(dir.path(), "destination");
    answers(&mut destination, "two");
    let (mut destination, _) = destination.move_on(dir.path(), "third");
    answers(&mut destination, "three");
}
