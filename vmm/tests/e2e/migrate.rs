//! Migrations that succeed.

use guest_tests::dirtier::Report;
use serde_json::{Value, json};

use crate::harness::{Ferry, busy, require_kvm, scratch};

#[test]
fn a_working_guest_moves_and_notices_nothing() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    source.wait_heartbeats(100);
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    assert_eq!(source.status(), "postmigrate");
    destination.wait_heartbeats(100);
    assert_eq!(destination.status(), "running");
    destination.verify();

    assert_eq!(info["ram"]["total"], 128 << 20);
    assert_eq!(info["ram"]["remaining"], 0);
    assert!(info["ram"]["normal"].as_u64().unwrap() >= 64 << 8);
    let there = destination.query_migrate();
    assert_eq!(there["status"], "completed");
    // The guest is there, and nowhere else.
    let beats = source.serial.heartbeats().count;
    destination.wait_heartbeats(100);
    assert_eq!(source.serial.heartbeats().count, beats);
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("never run twice"), "{refusal}");
}

#[test]
fn over_a_unix_socket_too() {
    require_kvm!();
    let dir = scratch();
    let uri = format!("unix:{}", dir.path().join("migration").display());
    let mut destination = Ferry::start(dir.path(), "dst", &["--incoming", &uri]);
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", busy_small());
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_heartbeats(50);
    destination.verify();
}

#[test]
fn the_address_may_come_later() {
    require_kvm!();
    let dir = scratch();
    let mut destination = Ferry::start(dir.path(), "dst", &["--incoming", "defer"]);
    assert_eq!(destination.status(), "inmigrate");
    destination.execute("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    let refusal = destination.refused("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }));
    assert!(refusal.contains("already been started"), "{refusal}");
    let uri = destination.listening_at();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", busy_small());
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_heartbeats(50);
    destination.verify();
}

#[test]
fn to_and_fro_twenty_times_without_a_leak() {
    require_kvm!();
    let dir = scratch();
    let mut here = Ferry::run_dirtier(dir.path(), "m0", "64M", busy_small());
    let mut first = None;
    for hop in 1..=20 {
        let (there, uri) = Ferry::incoming(dir.path(), &format!("m{hop}"));
        here.migrate(&uri);
        here.wait_migrated("completed");
        there.wait_heartbeats(20);
        let resources = Resources::of(there.process.id());
        match &first {
            None => first = Some(resources),
            // The very same, however often the guest has moved.
            Some(first) => assert_eq!(resources, *first, "hop {hop}"),
        }
        here.quit();
        here = there;
    }
    here.verify();
}

#[test]
fn from_one_to_the_next_and_to_a_third() {
    require_kvm!();
    let dir = scratch();
    let mut a = Ferry::run_dirtier(dir.path(), "a", "64M", busy_small());
    let (mut b, to_b) = Ferry::incoming(dir.path(), "b");
    a.migrate(&to_b);
    a.wait_migrated("completed");
    b.wait_heartbeats(20);
    let (mut c, to_c) = Ferry::incoming(dir.path(), "c");
    b.migrate(&to_c);
    b.wait_migrated("completed");
    c.wait_heartbeats(20);
    c.verify();
    let generations = c.wait_status_report();
    assert!(generations > 0);
}

#[test]
fn a_paused_guest_stays_paused() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", busy_small());
    source.execute("stop", Value::Null);
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_status("paused");
    assert_eq!(destination.serial.heartbeats().count, 0);
    destination.execute("cont", Value::Null);
    destination.wait_heartbeats(50);
    destination.verify();
}

#[test]
fn a_destination_started_paused_waits_for_cont() {
    require_kvm!();
    let dir = scratch();
    let arguments = ["--incoming", "tcp:127.0.0.1:0", "--paused"];
    let mut destination = Ferry::start(dir.path(), "dst", &arguments);
    let uri = destination.listening_at();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", busy_small());
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_status("paused");
    assert_eq!(destination.serial.heartbeats().count, 0);
    destination.execute("cont", Value::Null);
    destination.wait_heartbeats(50);
    destination.verify();
}

#[test]
fn memory_beyond_the_hole_moves_too() {
    require_kvm!();
    let dir = scratch();
    let options = guest_tests::dirtier::Options {
        from: guest_tests::Size(4 << 30),
        ..busy()
    };
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "4G", options);
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    destination.wait_heartbeats(20);
    destination.verify();
    // What was never touched is not sent.
    let sent = info["ram"]["transferred"].as_u64().unwrap();
    assert!(sent < 1 << 30, "{sent} bytes for 64 MiB");
}

#[test]
fn events_and_figures_tell_of_it() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", busy_small());
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    source
        .qmp
        .wait_event("STOP", crate::harness::PATIENCE)
        .unwrap();
    destination
        .qmp
        .wait_event("RESUME", crate::harness::PATIENCE)
        .unwrap();
    let events = source.qmp.take_events();
    let statuses: Vec<_> = events
        .iter()
        .filter(|event| event.name == "MIGRATION")
        .map(|event| event.data["status"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(statuses, ["setup", "active", "device", "completed"]);
    assert!(events.iter().any(|event| event.name == "MIGRATION_PASS"));
    for figure in ["total-time", "downtime", "setup-time"] {
        assert!(info[figure].is_u64(), "{figure}: {info:#}");
    }
    let parts = &info["x-ferry"]["downtime"];
    let sum: u64 = ["stop", "last-pages", "save", "send", "load", "start"]
        .iter()
        .map(|part| parts[part].as_u64().unwrap())
        .sum();
    let total = parts["total"].as_u64().unwrap();
    assert!(sum.abs_diff(total) <= 6, "{parts}");
}

fn busy_small() -> guest_tests::dirtier::Options {
    guest_tests::dirtier::Options {
        fill: guest_tests::Size(32 << 20),
        ws: guest_tests::Size(4 << 20),
        ..busy()
    }
}

impl Ferry {
    /// The sum of what the dirtier has written.
    fn wait_status_report(&mut self) -> u64 {
        self.serial
            .send(&[guest_tests::dirtier::command::STATUS])
            .unwrap();
        self.wait_for(|report| match report {
            Report::Status { written, .. } => Some(*written),
            _ => None,
        })
    }
}

/// What a process holds that it could leak.
#[derive(Debug, PartialEq, Eq)]
struct Resources {
    descriptors: usize,
    threads: usize,
    mappings: usize,
}

impl Resources {
    fn of(pid: u32) -> Self {
        let count = |what: &str| {
            std::fs::read_dir(format!("/proc/{pid}/{what}"))
                .unwrap()
                .count()
        };
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        Self {
            descriptors: count("fd"),
            threads: count("task"),
            mappings: maps.lines().count(),
        }
    }
}
