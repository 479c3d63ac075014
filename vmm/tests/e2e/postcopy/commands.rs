//! What users can and can't do about a post-copy.

use std::path::Path;
use std::process::Command;

use guest_tests::dirtier::{Report, command};
use guest_tests::driver::skip;
use serde_json::{Value, json};

use super::{
    arrived, destination, destination_with, idle, in_postcopy, push_fast, push_slowly,
    require_postcopy, source, switch_at_once, wait_state,
};
use crate::harness::{Ferry, PATIENCE, scratch};

#[test]
fn with_the_capability_at_one_side_only() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    let (mut without, uri) = Ferry::incoming(dir.path(), "d0");
    source.migrate(&uri);
    let info = source.wait_migrated("failed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("postcopy-ram at both sides"), "{reason}");
    let (success, output) = without.wait_exit();
    assert!(!success, "{output}");
    assert_eq!(source.status(), "running");

    // The destination's alone changes nothing.
    let off = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": false }] });
    source.execute("migrate-set-capabilities", off);
    let (mut with, uri) = destination(dir.path(), "d1");
    let refusal = source.refused("migrate-start-postcopy", Value::Null);
    assert!(refusal.contains("Enable postcopy"), "{refusal}");
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    assert!(info["x-ferry"]["postcopy"].is_null(), "{info:#}");
    with.wait_heartbeats(20);
    with.verify();
}

/// Starts a process without what lets it have a userfaultfd that serves KVM's faults: the device
/// and the right to do without it.
const WITHOUT_USERFAULTFD: [&str; 6] = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    "{ [ ! -e /dev/userfaultfd ] || mount --bind /dev/null /dev/userfaultfd; } && \
     exec setpriv --bounding-set -sys_ptrace \"$@\"",
    "sh",
];

/// Why a process can't be started like that, if so.
fn has_userfaultfd_anyway() -> Option<String> {
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if allowed.is_ok_and(|allowed| allowed.trim() == "1") {
        return Some("vm.unprivileged_userfaultfd is 1".to_owned());
    }
    let [program, more @ ..] = WITHOUT_USERFAULTFD;
    let output = Command::new(program).args(more).arg("true").output();
    match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(err) => Some(format!("unshare: {err}")),
    }
}

#[test]
fn without_userfaultfd_it_is_refused_before_anything_moves() {
    crate::harness::require_kvm!();
    if let Some(reason) = has_userfaultfd_anyway() {
        skip(&format!("userfaultfd can't be taken away: {reason}"));
        return;
    }
    let dir = scratch();
    let arguments = ["--incoming", "tcp:127.0.0.1:0"];
    let mut there = Ferry::start_by(&WITHOUT_USERFAULTFD, dir.path(), "dst", &arguments);
    let uri = there.listening_at();
    let on = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
    let refusal = there.refused("migrate-set-capabilities", on);
    for part in [
        "/dev/userfaultfd",
        "vm.unprivileged_userfaultfd",
        "CAP_SYS_PTRACE",
    ] {
        assert!(refusal.contains(part), "{part}: {refusal}");
    }
    let mut source = source(dir.path(), "src", idle());
    source.migrate(&uri);
    let info = source.wait_migrated("failed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("postcopy-ram"), "{reason}");
    assert_eq!(info["ram"]["normal"].as_u64().unwrap_or(0), 0, "{info:#}");
    assert_eq!(source.status(), "running");
    source.wait_heartbeats(20);
}

#[test]
fn a_file_is_refused() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    let file = format!("file:{}", dir.path().join("saved").display());
    let refusal = source.refused("migrate", json!({ "uri": file }));
    assert!(refusal.contains("postcopy-ram"), "{refusal}");
    let mut destination = Ferry::start(dir.path(), "dst", &["--incoming", "defer"]);
    super::enable(&mut destination);
    let refusal = destination.refused("migrate-incoming", json!({ "uri": file }));
    assert!(refusal.contains("postcopy-ram"), "{refusal}");
}

#[test]
fn what_is_refused_meanwhile_and_why() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), idle());
    for (command, reason) in [
        ("migrate_cancel", "cannot cancel"),
        ("cont", "never run twice"),
        ("quit", "still needs"),
        ("system_reset", "not here"),
    ] {
        let refusal = source.refused(command, Value::Null);
        assert!(refusal.contains(reason), "{command}: {refusal}");
    }
    let elsewhere = json!({ "uri": "tcp:127.0.0.1:1" });
    let refusal = source.refused("migrate", elsewhere.clone());
    assert!(refusal.contains("in progress"), "{refusal}");
    let refusal = destination.refused("migrate", elsewhere);
    assert!(refusal.contains("have not come yet"), "{refusal}");
    let refusal = destination.refused("quit", Value::Null);
    assert!(refusal.contains("guest would be lost"), "{refusal}");
    let saved = json!({ "command-line": "savevm a" });
    for side in [&mut source, &mut destination] {
        let refusal = side.execute("human-monitor-command", saved.clone());
        assert!(
            refusal.as_str().unwrap().contains("Error"),
            "savevm: {refusal}"
        );
        let off = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": false }] });
        let refusal = side.refused("migrate-set-capabilities", off);
        assert!(refusal.contains("in progress"), "{refusal}");
    }
    let refusal = destination.refused("migrate-recover", json!({ "uri": "tcp:127.0.0.1:0" }));
    assert!(refusal.contains("paused"), "{refusal}");
    let again = json!({ "uri": "tcp:127.0.0.1:1", "resume": true });
    let refusal = source.refused("migrate", again);
    assert!(refusal.contains("no paused migration"), "{refusal}");
    // None of it has changed anything.
    push_fast(&mut source);
    arrived(&mut source, &mut destination);
}

#[test]
fn a_reset_waits_for_the_memory() {
    require_postcopy!();
    let dir = scratch();
    for by_guest in [true, false] {
        let dir = dir.path().join(format!("{by_guest}"));
        std::fs::create_dir(&dir).unwrap();
        let (mut source, mut destination, _crossing) = in_postcopy(&dir, idle());
        if by_guest {
            destination.serial.send(&[command::RESET]).unwrap();
        } else {
            destination.execute("system_reset", Value::Null);
        }
        push_fast(&mut source);
        let event = destination.qmp.wait_event("RESET", PATIENCE).unwrap();
        assert_eq!(event.data["guest"], by_guest);
        destination.wait_migrated("completed");
        source.wait_migrated("completed");
        destination.wait_for(|report| matches!(report, Report::Ready { .. }).then_some(()));
        destination.verify();
    }
}

#[test]
fn a_guest_that_powers_off_ends_the_migration() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), idle());
    destination.serial.send(&[command::QUIT]).unwrap();
    let (success, output) = destination.wait_exit();
    assert!(success, "{output}");
    // Nothing is left to be done at the source, which says so and can end.
    let info = source.wait_migrated("completed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("has shut down"), "{reason}");
    let output = source.process.output();
    assert!(output.contains("has shut down"), "{output}");
    assert_eq!(source.status(), "postmigrate");
    source.refused("cont", Value::Null);
    source.execute("quit", Value::Null);
    assert!(source.wait_exit().0);
}

/// The guest has shut down at its destination, which stays, while most of its memory is missing.
fn shut_down_and_kept(dir: &Path) -> (Ferry, Ferry) {
    let mut source = source(dir, "src", idle());
    let (mut destination, uri) = destination_with(dir, "dst", &["--no-shutdown"]);
    push_slowly(&mut source);
    switch_at_once(&mut source, &uri);
    wait_state(&mut destination, "postcopy-active");
    destination.serial.send(&[command::QUIT]).unwrap();
    destination.wait_status("shutdown");
    (source, destination)
}

#[test]
fn with_no_shutdown_the_process_stays_after_a_power_off() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination) = shut_down_and_kept(dir.path());
    // Its memory goes on to come: it may be reset, and run again.
    wait_state(&mut destination, "postcopy-active");
    destination.execute("system_reset", Value::Null);
    assert_eq!(destination.status(), "shutdown");
    push_fast(&mut source);
    let info = source.wait_migrated("completed");
    assert!(info["error-desc"].is_null(), "{info:#}");
    destination.qmp.wait_event("RESET", PATIENCE).unwrap();
    destination.execute("cont", Value::Null);
    destination.wait_for(|report| matches!(report, Report::Ready { .. }).then_some(()));
    destination.verify();
}

#[test]
fn a_guest_that_has_shut_down_holds_nobody_up() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination) = shut_down_and_kept(dir.path());
    destination.execute("quit", Value::Null);
    let (success, output) = destination.wait_exit();
    assert!(success, "{output}");
    let info = source.wait_migrated("completed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("process ends"), "{reason}");
}

#[test]
fn a_process_that_is_told_to_end_twice_does_and_the_other_learns_of_it() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), idle());
    destination.execute("quit", json!({ "force": true }));
    destination.wait_exit();
    let info = source.wait_migrated("failed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(
        reason.contains("the guest is lost") && reason.contains("process ends"),
        "{reason}"
    );
    let output = source.process.output();
    assert!(output.contains("the guest is lost"), "{output}");
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("never run twice"), "{refusal}");
    source.execute("quit", Value::Null);
    assert!(source.wait_exit().0);
}
