//! Processes that are killed: the guest is nowhere twice, and nobody pretends to have it.

use serde_json::{Value, json};

use super::crossing::{Crossing, Then};
use super::{
    destination, idle, in_postcopy, require_postcopy, resume, source, switch_at_once, wait_state,
};
use crate::frames::kind;
use crate::harness::scratch;

#[test]
fn a_killed_source_leaves_a_guest_that_has_what_it_has() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), idle());
    destination.wait_heartbeats(20);
    source.process.kill().unwrap();
    let info = wait_state(&mut destination, "postcopy-paused");
    let missing = info["x-ferry"]["postcopy"]["missing-pages"].as_u64();
    assert!(missing > Some(0), "{info:#}");
    let count = format!("{} pages", missing.unwrap());
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains(&count), "{reason}");
    let output = destination.process.output();
    assert!(output.contains(&count), "{output}");
    destination.wait_heartbeats(20);
    assert_eq!(destination.status(), "running");

    let refusal = destination.refused("quit", Value::Null);
    assert!(refusal.contains(&count), "{refusal}");
    destination.wait_heartbeats(20);
    destination.execute("quit", json!({ "force": true }));
    destination.wait_exit();
}

#[test]
fn a_killed_destination_takes_the_guest_with_it() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), idle());
    destination.wait_heartbeats(20);
    let beats = source.serial.heartbeats().count;
    destination.process.kill().unwrap();
    let info = wait_state(&mut source, "postcopy-paused");
    assert!(info["error-desc"].is_string(), "{info:#}");
    let output = source.process.output();
    assert!(
        output.contains("the guest is lost, and its memory of before is kept here"),
        "{output}"
    );
    assert_eq!(source.status(), "postmigrate");
    assert!(super::memory::has_memory(&source), "it is gone");
    for command in ["cont", "system_reset", "quit"] {
        source.refused(command, Value::Null);
    }
    // Not by way of a recovery that nobody answers, either.
    resume(&mut source, "unix:/nobody/is/here");
    source.wait_migration("failed recovery", |info| {
        info["status"] == "postcopy-paused"
            && info["error-desc"]
                .as_str()
                .is_some_and(|reason| reason.contains("nobody"))
    });
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("never run twice"), "{refusal}");
    assert_eq!(source.serial.heartbeats().count, beats);
    source.execute("quit", json!({ "force": true }));
    let (success, output) = source.wait_exit();
    assert!(success, "{output}");
}

/// The frames of which one is on its way before the guest may run at the destination.
const BEFORE_GO: [u8; 6] = [
    kind::JOIN,
    kind::MISSING,
    kind::LATE,
    kind::STATE,
    kind::END,
    kind::READY,
];

/// Until GO it is a migration like any other.
#[test]
fn a_destination_killed_before_go_never_had_the_guest() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    for (index, kind) in BEFORE_GO.into_iter().enumerate() {
        let (mut destination, uri) = destination(dir.path(), &format!("d{index}"));
        let crossing = Crossing::to(&uri, Some((kind, 0, Then::Hold)));
        switch_at_once(&mut source, &crossing.uri);
        crossing.wait_reached();
        destination.process.kill().unwrap();
        let info = source.wait_migrated("failed");
        assert!(info["error-desc"].is_string(), "{info:#}");
        assert_eq!(source.status(), "running", "killed at {kind:#x}");
        source.wait_heartbeats(20);
        assert_eq!(destination.serial.heartbeats().count, 0);
    }
    source.verify();
}

#[test]
fn a_connection_cut_before_go_leaves_the_guest_at_the_source() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    for (index, kind) in BEFORE_GO.into_iter().enumerate() {
        for then in [Then::CutBefore, Then::CutAfter] {
            if matches!(kind, kind::END | kind::READY) && then == Then::CutAfter {
                // GO may have left by then.
                continue;
            }
            let (mut destination, uri) =
                destination(dir.path(), &format!("d{index}{}", then as u8));
            let crossing = Crossing::to(&uri, Some((kind, 0, then)));
            switch_at_once(&mut source, &crossing.uri);
            crossing.wait_reached();
            source.wait_migrated("failed");
            assert_eq!(source.status(), "running", "cut at {kind:#x}");
            let (success, output) = destination.wait_exit();
            assert!(!success, "{output}");
            assert_eq!(destination.serial.heartbeats().count, 0);
        }
    }
    source.wait_heartbeats(20);
    source.verify();
}

#[test]
fn go_that_never_arrives_leaves_the_guest_to_cont() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    let (mut there, uri) = destination(dir.path(), "d0");
    let crossing = Crossing::to(&uri, Some((kind::GO, 0, Then::CutBefore)));
    switch_at_once(&mut source, &crossing.uri);
    crossing.wait_reached();
    let info = wait_state(&mut source, "postcopy-paused");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("not confirmed"), "{reason}");
    let (success, output) = there.wait_exit();
    assert!(!success, "{output}");
    assert_eq!(there.serial.heartbeats().count, 0);
    assert_eq!(source.status(), "postmigrate");

    source.execute("cont", Value::Null);
    let output = source.process.output();
    assert!(output.contains("'cont' overrides"), "{output}");
    source.wait_migrated("failed");
    assert_eq!(source.status(), "running");
    source.wait_heartbeats(20);
    // What was for the destination is not given any more.
    let arguments = json!({ "uri": uri, "resume": true });
    let refusal = source.refused("migrate", arguments);
    assert!(refusal.contains("no paused migration"), "{refusal}");
    source.verify();
    let (mut last, uri) = destination(dir.path(), "last");
    switch_at_once(&mut source, &uri);
    super::arrived(&mut source, &mut last);
}

/// Once the destination has been heard of, its guest is not run here.
#[test]
fn a_recovery_confirms_that_the_guest_is_there() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    let (mut destination, uri) = destination(dir.path(), "dst");
    super::push_slowly(&mut source);
    let crossing = Crossing::to(&uri, Some((kind::RUNNING, 0, Then::CutBefore)));
    switch_at_once(&mut source, &crossing.uri);
    crossing.wait_reached();
    super::wait_paused(&mut source, &mut destination);
    let crossing = super::recover(&mut source, &mut destination, None);
    wait_state(&mut source, "postcopy-active");
    wait_state(&mut destination, "postcopy-active");
    crossing.cut();
    super::wait_paused(&mut source, &mut destination);
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("never run twice"), "{refusal}");
    super::recover_and_arrive(&mut source, &mut destination);
}
