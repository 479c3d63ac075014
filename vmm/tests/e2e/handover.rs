//! Failures at each frame of the stream, and above all at those that decide who runs the guest.

use std::net::TcpListener;

use serde_json::{Value, json};

use crate::frames::{FrameProxy, Then, kind};
use crate::harness::{Ferry, busy, require_kvm, scratch};

#[test]
fn cut_before_any_frame_up_to_ready_the_guest_stays() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    let places = [
        (kind::HELLO, 0),
        (kind::ACCEPT, 0),
        (kind::BLOB, 0),
        (kind::SYNC, 0),
        (kind::SYNC_ACK, 0),
        (kind::ZERO, 0),
        (kind::PAGES, 0),
        (kind::PAGES, 20),
        (kind::SYNC_ACK, 3),
        (kind::STATE, 0),
        (kind::STATE, 3),
        (kind::END, 0),
        (kind::READY, 0),
    ];
    for (index, (kind, nth)) in places.into_iter().enumerate() {
        let (mut destination, uri) = Ferry::incoming(dir.path(), &format!("d{index}"));
        let proxy = FrameProxy::to(&uri, Some((kind, nth, Then::Cut)));
        source.migrate(&proxy.uri);
        proxy.wait_reached();
        let info = source.wait_migrated("failed");
        assert!(info["error-desc"].is_string(), "{info:#}");
        assert_eq!(source.status(), "running", "cut at {kind:#x}, {nth}");
        source.wait_heartbeats(20);
        let (success, output) = destination.wait_exit();
        assert!(!success, "{output}");
        assert_eq!(destination.serial.heartbeats().count, 0);
    }
    source.verify();
    let (mut destination, _) = source.move_on(dir.path(), "last");
    destination.wait_heartbeats(20);
    destination.verify();
}

/// What the monitor says.
fn monitor(ferry: &mut Ferry, command: &str) -> String {
    let arguments = json!({ "command-line": command });
    let answer = ferry.execute("human-monitor-command", arguments);
    answer.as_str().unwrap().to_owned()
}

/// The source doesn't know who has the guest: it is stopped, and says so everywhere.
fn undecided(source: &mut Ferry) {
    let info = source.wait_migration("the end", |info| info["error-desc"].is_string());
    assert_eq!(info["status"], "failed", "{info:#}");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(
        reason.contains("has not confirmed that it runs there"),
        "{reason}"
    );
    assert!(reason.contains("cont"), "no remedy in: {reason}");
    source.wait_status("postmigrate");
    let told = monitor(source, "info migrate");
    assert!(
        told.contains("has not confirmed that it runs there"),
        "{told}"
    );
    let told = monitor(source, "info status");
    assert!(told.contains("paused (postmigrate)"), "{told}");
    let refusal = source.refused("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
    assert!(refusal.contains("postmigrate"), "{refusal}");
    let refusal = source.refused("system_reset", Value::Null);
    assert!(refusal.contains("postmigrate"), "{refusal}");
}

#[test]
fn go_that_never_arrives_leaves_the_guest_stopped_until_cont() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    let (mut destination, uri) = Ferry::incoming(dir.path(), "d0");
    let proxy = FrameProxy::to(&uri, Some((kind::GO, 0, Then::Cut)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    undecided(&mut source);
    // It had all of the guest, but not the word.
    let (success, output) = destination.wait_exit();
    assert!(!success, "{output}");
    assert_eq!(destination.serial.heartbeats().count, 0);
    let beats = source.serial.heartbeats().count;
    assert_eq!(source.serial.heartbeats().count, beats);

    source.execute("cont", Value::Null);
    assert_eq!(source.status(), "running");
    source.wait_heartbeats(20);
    source.verify();
    let output = source.process.output();
    assert!(output.contains("'cont' overrides"), "{output}");
    let (mut destination, _) = source.move_on(dir.path(), "last");
    destination.wait_heartbeats(20);
    destination.verify();
}

#[test]
fn running_that_never_arrives_leaves_the_guest_at_the_destination() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let proxy = FrameProxy::to(&uri, Some((kind::RUNNING, 0, Then::Cut)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    undecided(&mut source);
    destination.wait_heartbeats(20);
    destination.verify();
    assert_eq!(destination.status(), "running");

    // Its user makes sure that the guest is nowhere else, and takes it back.
    destination.process.kill().unwrap();
    source.execute("cont", Value::Null);
    source.wait_heartbeats(20);
    source.verify();
}

#[test]
fn a_destination_killed_with_all_of_the_guest_never_had_it() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    let (mut destination, uri) = Ferry::incoming(dir.path(), "d0");
    let proxy = FrameProxy::to(&uri, Some((kind::READY, 0, Then::Hold)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    assert_eq!(source.status(), "finish-migrate");
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("handed over"), "{refusal}");
    destination.process.kill().unwrap();
    source.wait_migrated("failed");
    assert_eq!(source.status(), "running");
    source.wait_heartbeats(20);
    source.verify();
    let (mut destination, _) = source.move_on(dir.path(), "last");
    destination.wait_heartbeats(20);
    destination.verify();
}

#[test]
fn cancel_works_in_setup_and_with_the_guest_stopped() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    // Somebody who never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    source.migrate(&format!("tcp:{}", silent.local_addr().unwrap()));
    let (connection, _) = silent.accept().unwrap();
    assert_eq!(source.query_migrate()["status"], "setup");
    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    assert_eq!(source.status(), "running");
    drop(connection);

    let (mut destination, uri) = Ferry::incoming(dir.path(), "d0");
    let proxy = FrameProxy::to(&uri, Some((kind::READY, 0, Then::Hold)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    assert_eq!(source.status(), "running");
    source.wait_heartbeats(20);
    source.verify();
    let (success, output) = destination.wait_exit();
    assert!(!success && output.contains("cancel"), "{output}");
    let (mut destination, _) = source.move_on(dir.path(), "last");
    destination.wait_heartbeats(20);
    destination.verify();
}

#[test]
fn after_a_failure_another_source_can_be_waited_for() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    let mut destination = Ferry::start(dir.path(), "dst", &["--incoming", "defer"]);
    let listen = json!({ "uri": "tcp:127.0.0.1:0", "exit-on-error": false });
    for kind in [kind::HELLO, kind::PAGES, kind::END, kind::GO] {
        destination.execute("migrate-incoming", listen.clone());
        let uri = destination.listening_at();
        let proxy = FrameProxy::to(&uri, Some((kind, 0, Then::Cut)));
        source.migrate(&proxy.uri);
        proxy.wait_reached();
        destination.wait_migrated("failed");
        assert_eq!(destination.status(), "inmigrate");
        if kind == kind::GO {
            undecided(&mut source);
            source.execute("cont", Value::Null);
        } else {
            source.wait_migrated("failed");
        }
        assert_eq!(source.status(), "running");
    }
    destination.execute("migrate-incoming", listen.clone());
    let uri = destination.listening_at();
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_heartbeats(20);
    destination.verify();
    let refusal = destination.refused("migrate-incoming", listen);
    assert!(refusal.contains("-incoming"), "{refusal}");
    assert_eq!(destination.query_migrate()["status"], "completed");
}
