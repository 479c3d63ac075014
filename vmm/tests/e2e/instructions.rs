//! Instructions of the guest's kernel that some KVMs can't execute: a KVM without hardware
//! virtualization interprets CPL 0. On hardware all of them are executed as usual.

use std::time::Instant;

use guest_tests::boot::{Options, Report, Then};
use guest_tests::fault::Fault;
use serde_json::Value;

use crate::harness::{Ferry, Guest, PATIENCE, require_kvm, scratch, skip};

fn run(dir: &std::path::Path, then: Then) -> Ferry {
    let guest = Guest::new(guest_tests::BOOT, "64M", Options { then, cpus: 1 });
    Ferry::run(dir, &then.to_string(), &guest, &["--no-shutdown"])
}

#[test]
fn a_breakpoint_at_cpl_0_reaches_the_guests_handler() {
    require_kvm!();
    let dir = scratch();
    let mut ferry = run(dir.path(), Then::Int3);
    let breakpoint = ferry.wait_line(|line| match Report::parse(line) {
        Some(Report::Breakpoint { count, returned }) => Some((count, returned)),
        _ => None,
    });
    assert_eq!(breakpoint, (1, true));
    ferry.wait_status("shutdown");
}

#[test]
fn an_undefined_instruction_at_cpl_0_is_the_guests_own_exception() {
    require_kvm!();
    let dir = scratch();
    let ferry = run(dir.path(), Then::Undefined);
    let (fault, _) = ferry.serial.wait_for(PATIENCE, Fault::parse).unwrap();
    let Fault::Exception { vector, cpl, .. } = fault;
    assert_eq!((vector, cpl), (6, 0));
}

/// Lets the guest execute `popcnt` at CPL 0: true if it could, or else it has stopped.
fn popcnt_works(ferry: &mut Ferry) -> bool {
    ferry.wait_line(|line| matches!(Report::parse(line), Some(Report::Done { .. })).then_some(()));
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ferry.status().as_str() {
            "shutdown" => return true,
            "internal-error" => return false,
            _ => assert!(Instant::now() < deadline, "{}", ferry.process.output()),
        }
        std::thread::yield_now();
    }
}

/// Whether a guest's kernel may execute what not every interpreter of CPL 0 can: as on all hardware.
pub fn executes_popcnt_at_cpl_0(dir: &std::path::Path) -> bool {
    popcnt_works(&mut run(dir, Then::Popcnt))
}

#[test]
fn what_kvm_cannot_execute_stops_the_guest_and_is_named() {
    require_kvm!();
    let dir = scratch();
    let mut ferry = run(dir.path(), Then::Popcnt);
    if popcnt_works(&mut ferry) {
        let bits = ferry.wait_line(|line| match Report::parse(line) {
            Some(Report::Popcnt { bits }) => Some(bits),
            _ => None,
        });
        assert_eq!(bits, 7);
        skip("in part: this KVM executes every instruction; a KVM that interprets CPL 0 is needed");
        return;
    }
    let event = ferry.qmp.wait_event("STOP", PATIENCE);
    event.expect("the guest has stopped");
    // popcnt with a 64-bit operand.
    let output = ferry.process.output();
    let message = output
        .lines()
        .find(|line| line.contains("cannot execute the instruction with the bytes f3 48 0f b8"));
    let message = message.unwrap_or_else(|| panic!("no such message in: {output}"));
    assert!(message.contains("vCPU 0 stopped at RIP 0x"), "{message}");
    assert!(message.contains("CPL 0"), "{message}");

    let refusal = ferry.refused("cont", Value::Null);
    assert!(refusal.contains("Resetting"), "{refusal}");
    let refusal = ferry.refused("migrate", serde_json::json!({ "uri": "tcp:127.0.0.1:1" }));
    assert!(refusal.contains("internal-error"), "{refusal}");
    ferry.execute("system_reset", Value::Null);
    assert_eq!(ferry.status(), "paused");
    ferry.execute("cont", Value::Null);
    // It boots again, and comes as far as before.
    assert!(!popcnt_works(&mut ferry));
}
