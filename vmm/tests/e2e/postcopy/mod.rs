//! Post-copy: the guest runs at the destination before its memory is there.

mod backing;
mod commands;
mod crossing;
mod disks;
mod kills;
mod memory;
mod moving;
mod multifd;
mod network;
mod recovery;
mod sockets;
mod waiting;

use std::path::Path;
use std::time::Instant;

use guest_tests::Size;
use guest_tests::dirtier::{Options, Rate};
use serde_json::{Value, json};

use self::crossing::{Crossing, Stop};
use crate::harness::{Ferry, LOOK, PATIENCE, busy};

/// Ends the calling test, loudly, where a guest can't be had or can't wait for its memory.
macro_rules! require_postcopy {
    () => {
        crate::harness::require_kvm!();
        if let Err(err) = migration::userfault::Userfault::probe() {
            crate::harness::skip(&format!("{err}"));
            return;
        }
    };
}
use require_postcopy;

/// A guest that writes faster than anything sends.
fn furious() -> Options {
    Options {
        fill: Size(64 << 20),
        ws: Size(64 << 20),
        ..crate::harness::furious()
    }
}

/// A guest that touches little of its memory by itself: its heart beats.
fn idle() -> Options {
    Options {
        rate: Rate::PerSecond(0),
        sweep: 0,
        ..busy()
    }
}

/// Switches the capability on.
fn enable(ferry: &mut Ferry) {
    let on = json!({ "capabilities": [{ "capability": "postcopy-ram", "state": true }] });
    ferry.execute("migrate-set-capabilities", on);
}

fn set(ferry: &mut Ferry, parameters: Value) {
    ferry.execute("migrate-set-parameters", parameters);
}

/// A dirtier that works, and may move by post-copy.
fn source(dir: &Path, name: &str, options: Options) -> Ferry {
    let mut source = Ferry::run_dirtier(dir, name, "128M", options);
    enable(&mut source);
    source
}

/// A destination for it, and its address.
fn destination(dir: &Path, name: &str) -> (Ferry, String) {
    destination_with(dir, name, &[])
}

fn destination_with(dir: &Path, name: &str, more: &[&str]) -> (Ferry, String) {
    let (mut destination, uri) = Ferry::incoming_with(dir, name, more);
    enable(&mut destination);
    (destination, uri)
}

/// Begins a migration that switches before it has sent much: it would take long otherwise.
fn switch_at_once(source: &mut Ferry, uri: &str) {
    set(source, json!({ "max-bandwidth": 1 << 20 }));
    source.migrate(uri);
    source.execute("migrate-start-postcopy", Value::Null);
}

/// Has what the guest doesn't wait for come slowly.
fn push_slowly(source: &mut Ferry) {
    set(source, json!({ "max-postcopy-bandwidth": 1 << 20 }));
}

/// Has it come as fast as it goes.
fn push_fast(source: &mut Ferry) {
    set(source, json!({ "max-postcopy-bandwidth": 0 }));
}

fn wait_state(ferry: &mut Ferry, status: &str) -> Value {
    ferry.wait_migration(status, |info| info["status"] == status)
}

/// A guest in post-copy whose memory comes slowly, through a proxy.
fn in_postcopy(dir: &Path, options: Options) -> (Ferry, Ferry, Crossing) {
    let mut source = source(dir, "src", options);
    let (mut destination, uri) = destination(dir, "dst");
    push_slowly(&mut source);
    let crossing = Crossing::to(&uri, None);
    switch_at_once(&mut source, &crossing.uri);
    wait_state(&mut source, "postcopy-active");
    wait_state(&mut destination, "postcopy-active");
    (source, destination, crossing)
}

/// Both sides have noticed that the connection is gone, and say why.
fn wait_paused(source: &mut Ferry, destination: &mut Ferry) {
    for side in [source, destination] {
        let info = side.wait_migration("pause", |info| {
            info["status"] == "postcopy-paused" || is_over(info)
        });
        assert_eq!(
            info["status"],
            "postcopy-paused",
            "{info:#}\n{}",
            side.process.output()
        );
        let reason = info["error-desc"].as_str();
        assert!(reason.is_some_and(|reason| !reason.is_empty()), "{info:#}");
    }
}

fn is_over(info: &Value) -> bool {
    matches!(
        info["status"].as_str(),
        Some("completed" | "failed" | "cancelled")
    )
}

/// Has both sides, which are paused, go on over another connection.
fn recover(source: &mut Ferry, destination: &mut Ferry, stop: Option<Stop>) -> Crossing {
    let anywhere = json!({ "uri": "tcp:127.0.0.1:0" });
    let deadline = Instant::now() + PATIENCE;
    // What arrived before the connection broke may just make it leave its pause for a moment.
    while let Err(refusal) = destination.attempt("migrate-recover", anywhere.clone()) {
        assert!(refusal.contains("paused"), "{refusal}");
        assert!(Instant::now() < deadline, "{refusal}");
        std::thread::sleep(LOOK);
    }
    let crossing = Crossing::to(&destination.listening_at(), stop);
    resume(source, &crossing.uri);
    crossing
}

fn resume(source: &mut Ferry, uri: &str) {
    source.execute("migrate", json!({ "uri": uri, "resume": true }));
}

/// Has both sides, which are paused, go on, and all of the guest arrive.
fn recover_and_arrive(source: &mut Ferry, destination: &mut Ferry) {
    push_fast(source);
    let _crossing = recover(source, destination, None);
    arrived(source, destination);
}

/// The migration ends, and the guest is whole and at the destination only; what both sides say.
fn arrived(source: &mut Ferry, destination: &mut Ferry) -> (Value, Value) {
    let there = destination.wait_migrated("completed");
    let here = source.wait_migrated("completed");
    assert_eq!(source.status(), "postmigrate");
    assert!(
        here["x-ferry"]["postcopy"].is_object(),
        "not by post-copy: {here:#}"
    );
    destination.wait_status("running");
    destination.verify();
    destination.wait_heartbeats(20);
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("never run twice"), "{refusal}");
    (here, there)
}
