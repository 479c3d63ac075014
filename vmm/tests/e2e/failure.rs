//! Migrations that fail: the guest stays where it was, unharmed, and can still move later.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::harness::{Ferry, busy, furious, require_kvm, scratch};
use crate::proxy::{Proxy, Tamper};

/// After a failure: the source's guest runs, its memory is whole, and it can still move.
fn unharmed(source: &mut Ferry, dir: &std::path::Path, retry: &str) {
    assert_eq!(source.status(), "running");
    source.wait_heartbeats(20);
    source.verify();
    let (mut destination, uri) = Ferry::incoming(dir, retry);
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_heartbeats(20);
    destination.verify();
}

#[test]
fn a_connection_cut_anywhere_leaves_the_guest_at_the_source() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    // In the greeting, the offer, the first pages, in the middle, and late.
    for (index, at) in [0, 3, 30, 200, 5_000, 100_000, 20 << 20, 60 << 20]
        .into_iter()
        .enumerate()
    {
        let (mut destination, uri) = Ferry::incoming(dir.path(), &format!("d{index}"));
        let proxy = Proxy::to(&uri, Tamper::CutAfter(at));
        source.migrate(&proxy.uri);
        let info = source.wait_migrated("failed");
        assert!(info["error-desc"].is_string(), "{info:#}");
        assert_eq!(source.status(), "running", "cut after {at} bytes");
        source.wait_heartbeats(20);
        assert_eq!(destination.serial.heartbeats().count, 0);
        if at > 200 {
            let (success, output) = destination.wait_exit();
            assert!(!success, "{output}");
        }
    }
    unharmed(&mut source, dir.path(), "last");
}

#[test]
fn answers_cut_anywhere_leave_the_guest_at_the_source() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    for (index, at) in [0, 5, 40].into_iter().enumerate() {
        let (_destination, uri) = Ferry::incoming(dir.path(), &format!("d{index}"));
        let proxy = Proxy::to(&uri, Tamper::CutAnswerAfter(at));
        source.migrate(&proxy.uri);
        source.wait_migrated("failed");
        assert_eq!(source.status(), "running", "cut after {at} bytes");
    }
    unharmed(&mut source, dir.path(), "last");
}

#[test]
fn a_bit_that_flips_is_found_before_the_guest_moves() {
    require_kvm!();
    let dir = scratch();
    // A guest that is idle: no page is sent twice, which could repair it.
    let options = guest_tests::dirtier::Options {
        rate: guest_tests::dirtier::Rate::PerSecond(0),
        ..busy()
    };
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", options);
    for (index, at) in [0, 9, 40, 2_000, 1 << 20, 30 << 20].into_iter().enumerate() {
        let (destination, uri) = Ferry::incoming(dir.path(), &format!("d{index}"));
        let proxy = Proxy::to(&uri, Tamper::FlipAt(at));
        source.migrate(&proxy.uri);
        // A damaged greeting is no migration's: the destination goes on listening, and drops it.
        let info = source.wait_migrated("failed");
        assert!(info["error-desc"].is_string(), "{info:#}");
        assert_eq!(source.status(), "running", "bit flipped at {at}");
        assert_eq!(destination.serial.heartbeats().count, 0);
    }
    unharmed(&mut source, dir.path(), "last");
}

#[test]
fn a_killed_destination_leaves_the_guest_at_the_source() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "256M", furious());
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 0 }));
    for (index, status) in ["setup", "active"].into_iter().enumerate() {
        let (mut destination, uri) = Ferry::incoming(dir.path(), &format!("d{index}"));
        source.migrate(&uri);
        if status == "active" {
            source.wait_migration("second round", |info| {
                info["ram"]["dirty-sync-count"].as_u64() >= Some(2)
            });
        }
        destination.process.kill().unwrap();
        source.wait_migrated("failed");
        assert_eq!(source.status(), "running");
        source.wait_heartbeats(20);
    }
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 2000 }));
    unharmed(&mut source, dir.path(), "last");
}

#[test]
fn cancel_works_while_pages_move_and_while_the_network_stands_still() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "256M", furious());
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 0 }));

    let (mut destination, uri) = Ferry::incoming(dir.path(), "d0");
    source.migrate(&uri);
    let refusal = source.refused("migrate", json!({ "uri": uri }));
    assert!(
        refusal.contains("migration process in progress"),
        "{refusal}"
    );
    source.wait_migration("third round", |info| {
        info["ram"]["dirty-sync-count"].as_u64() >= Some(3)
    });
    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    assert_eq!(source.status(), "running");
    let (success, output) = destination.wait_exit();
    assert!(!success && output.contains("cancel"), "{output}");

    let (_destination, uri) = Ferry::incoming(dir.path(), "d1");
    let proxy = Proxy::to(&uri, Tamper::StallAfter(10 << 20));
    source.migrate(&proxy.uri);
    source.wait_migration("stall", |_| {
        proxy.forwarded.load(Ordering::SeqCst) >= 10 << 20
    });
    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    // Once more without a migration: nothing to do, no error.
    source.execute("migrate_cancel", Value::Null);

    source.execute("migrate-set-parameters", json!({ "downtime-limit": 2000 }));
    unharmed(&mut source, dir.path(), "last");
}

#[test]
fn a_guest_that_never_converges_is_told_and_runs_on() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "256M", furious());
    let slow = json!({ "downtime-limit": 1, "max-bandwidth": 50 << 20 });
    source.execute("migrate-set-parameters", slow);
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    source.migrate(&uri);
    let info = source.wait_migration("third round", |info| {
        info["ram"]["dirty-sync-count"].as_u64() >= Some(3)
    });
    assert_eq!(info["status"], "active");
    assert!(info["expected-downtime"].as_u64() > Some(1), "{info:#}");
    assert!(
        info["ram"]["dirty-pages-rate"].as_u64() > Some(0),
        "{info:#}"
    );
    source.wait_heartbeats(50);
    // The user loses patience, and allows more: it finishes.
    let fast = json!({ "downtime-limit": 60_000, "max-bandwidth": 0 });
    source.execute("migrate-set-parameters", fast);
    source.wait_migrated("completed");
    destination.wait_heartbeats(20);
    destination.verify();
}

#[test]
fn strangers_at_the_listener_are_dropped_and_it_goes_on() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let address = uri.strip_prefix("tcp:").unwrap();
    let silent = TcpStream::connect(address).unwrap();
    let mut web = TcpStream::connect(address).unwrap();
    web.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a stranger\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    // Closed, or reset: what was sent was not read to its end.
    let _ = web.read_to_end(&mut answer);
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_heartbeats(20);
    destination.verify();
    drop(silent);
}

#[test]
fn what_is_given_on_both_sides_and_differs_is_named() {
    require_kvm!();
    let dir = scratch();
    let arguments = [
        "--incoming",
        "tcp:127.0.0.1:0",
        "--memory",
        "256M",
        "--smp",
        "2",
        "--append",
        "rate=1",
    ];
    let mut destination = Ferry::start(dir.path(), "dst", &arguments);
    let uri = destination.listening_at();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    source.migrate(&uri);
    let info = source.wait_migrated("failed");
    let reason = info["error-desc"].as_str().unwrap();
    for option in ["--memory", "--smp", "--append"] {
        assert!(reason.contains(option), "{reason}");
    }
    unharmed(&mut source, dir.path(), "last");
}

#[test]
fn nobody_there_is_an_error() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    source.migrate(&format!("tcp:{free}"));
    let info = source.wait_migrated("failed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("refused"), "{reason}");
    unharmed(&mut source, dir.path(), "last");
}
