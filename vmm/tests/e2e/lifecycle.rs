//! A guest's own resets, power-offs and accidents, and what its user can do to it.

use guest_tests::dirtier::{Report, command};
use serde_json::Value;

use crate::harness::{Ferry, Guest, PATIENCE, busy, require_kvm, scratch};

fn ready(ferry: &Ferry) {
    ferry.wait_for(|report| matches!(report, Report::Ready { .. }).then_some(()));
}

#[test]
fn a_guest_that_powers_off_ends_the_process() {
    require_kvm!();
    let dir = scratch();
    let mut ferry = Ferry::run_dirtier(dir.path(), "a", "128M", busy());
    ferry.serial.send(&[command::QUIT]).unwrap();
    let event = ferry.qmp.wait_event("SHUTDOWN", PATIENCE).unwrap();
    assert_eq!(event.data["reason"], "guest-shutdown");
    let (success, output) = ferry.wait_exit();
    assert!(success, "{output}");
    assert!(output.contains("powered off"), "{output}");
}

#[test]
fn with_no_shutdown_it_stays_and_can_be_reset() {
    require_kvm!();
    let dir = scratch();
    let guest = Guest::dirtier("128M", busy());
    let mut ferry = Ferry::run(dir.path(), "a", &guest, &["--no-shutdown"]);
    ready(&ferry);
    ferry.serial.send(&[command::QUIT]).unwrap();
    ferry.wait_status("shutdown");
    let refusal = ferry.refused("cont", Value::Null);
    assert!(refusal.contains("Resetting"), "{refusal}");
    ferry.execute("system_reset", Value::Null);
    ferry.execute("cont", Value::Null);
    ready(&ferry);
    ferry.wait_heartbeats(20);
}

#[test]
fn resets_and_triple_faults_boot_it_again() {
    require_kvm!();
    let dir = scratch();
    let mut ferry = Ferry::run_dirtier(dir.path(), "a", "128M", busy());
    for asked in [command::RESET, command::TRIPLE_FAULT] {
        ferry.serial.send(&[asked]).unwrap();
        let event = ferry.qmp.wait_event("RESET", PATIENCE).unwrap();
        assert_eq!(event.data["reason"], "guest-reset");
        assert_eq!(event.data["guest"], true);
        ready(&ferry);
    }
    ferry.execute("system_reset", Value::Null);
    let event = ferry.qmp.wait_event("RESET", PATIENCE).unwrap();
    assert_eq!(event.data["guest"], false);
    ready(&ferry);
    ferry.verify();
}

#[test]
fn with_no_reboot_a_reset_ends_the_process() {
    require_kvm!();
    let dir = scratch();
    let guest = Guest::dirtier("128M", busy());
    let mut ferry = Ferry::run(dir.path(), "a", &guest, &["--no-reboot"]);
    ready(&ferry);
    ferry.serial.send(&[command::RESET]).unwrap();
    let (success, output) = ferry.wait_exit();
    assert!(success, "{output}");
}

#[test]
fn it_can_be_reset_where_it_moved_to() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    source.migrate(&uri);
    source.wait_migrated("completed");
    source.quit();
    // Its kernel's file was the source's, and is gone.
    std::fs::remove_file(dir.path().join("src.elf")).unwrap();
    destination.wait_heartbeats(20);
    destination.serial.send(&[command::RESET]).unwrap();
    ready(&destination);
    destination.verify();
}

#[test]
fn stop_and_cont_stop_and_continue() {
    require_kvm!();
    let dir = scratch();
    let mut ferry = Ferry::run_dirtier(dir.path(), "a", "128M", busy());
    ferry.execute("stop", Value::Null);
    assert_eq!(ferry.status(), "paused");
    ferry.execute("stop", Value::Null);
    ferry.execute("cont", Value::Null);
    assert_eq!(ferry.status(), "running");
    ferry.wait_heartbeats(50);
    ferry.verify();
    let events: Vec<_> = ferry.qmp.take_events();
    let names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(names, ["STOP", "RESUME"]);
}

#[test]
fn a_paused_start_waits_for_cont() {
    require_kvm!();
    let dir = scratch();
    let guest = Guest::dirtier("128M", busy());
    let mut ferry = Ferry::run(dir.path(), "a", &guest, &["--paused"]);
    assert_eq!(ferry.status(), "prelaunch");
    ferry.execute("cont", Value::Null);
    ready(&ferry);
}

#[test]
fn a_file_that_is_no_kernel_is_named() {
    require_kvm!();
    let dir = scratch();
    let script = dir.path().join("script");
    std::fs::write(&script, "#!/bin/sh\necho hello\n").unwrap();
    let log = dir.path().join("log");
    let arguments = [
        "run",
        "--kernel",
        script.to_str().unwrap(),
        "--serial",
        "none",
    ];
    let mut process =
        guest_tests::driver::process::Process::spawn(crate::harness::ferry(), arguments, &log)
            .unwrap();
    let status = process.wait(PATIENCE).unwrap().expect("it ends");
    assert!(!status.success());
    let output = process.output();
    assert!(
        output.contains("script") && output.contains("expected"),
        "{output}"
    );
}
