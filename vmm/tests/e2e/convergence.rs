//! Guests that write faster than their memory moves.

use std::time::{Duration, Instant};

use guest_tests::Size;
use guest_tests::dirtier::{Options, Rate, Report, command};
use serde_json::{Value, json};

use crate::harness::{Ferry, require_kvm, scratch};

/// It rewrites all of its memory many times in a second.
fn writer() -> Options {
    Options {
        fill: Size(16 << 20),
        ws: Size(16 << 20),
        rate: Rate::Max,
        heartbeat: 1_000,
        ..Options::default()
    }
}

/// A link on which that memory takes half a second.
const SLOW: u64 = 32 << 20;

fn begin(source: &mut Ferry, uri: &str, parameters: Value) {
    let slow = json!({ "max-bandwidth": SLOW, "downtime-limit": 50 });
    source.execute("migrate-set-parameters", slow);
    source.execute("migrate-set-parameters", parameters);
    source.migrate(uri);
}

fn switch(source: &mut Ferry, capability: &str) {
    let on = json!({ "capabilities": [{ "capability": capability, "state": true }] });
    source.execute("migrate-set-capabilities", on);
}

fn wait_throttled(source: &mut Ferry) {
    source.wait_migration("the guest is throttled", |info| {
        info["cpu-throttle-percentage"].as_u64() == Some(80)
    });
}

/// How many pages the guest writes in a second.
fn rate(ferry: &mut Ferry) -> f64 {
    let written = |ferry: &mut Ferry| {
        ferry.serial.send(&[command::STATUS]).unwrap();
        let written = ferry.wait_for(|report| match report {
            Report::Status { written, .. } => Some(*written),
            _ => None,
        });
        (written, Instant::now())
    };
    let (before, began) = written(ferry);
    std::thread::sleep(Duration::from_secs(1));
    let (after, ended) = written(ferry);
    (after - before) as f64 / (ended - began).as_secs_f64()
}

#[test]
fn a_guest_that_is_throttled_stops_when_asked_and_is_itself_again_after_a_cancel() {
    require_kvm!();
    let dir = scratch();
    let (_destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", writer());
    let free = rate(&mut source);
    switch(&mut source, "auto-converge");
    // Not enough for it to converge.
    begin(
        &mut source,
        &uri,
        json!({ "cpu-throttle-initial": 80, "max-cpu-throttle": 80 }),
    );
    wait_throttled(&mut source);
    let throttled = rate(&mut source);
    assert!(throttled > 0.0);
    assert!(throttled < free / 2.0, "{throttled} of {free} pages/s");
    let text = source.execute(
        "human-monitor-command",
        json!({ "command-line": "info migrate" }),
    );
    let text = text.as_str().unwrap();
    assert!(text.contains("cpu throttle percentage: 80\n"), "{text}");

    for _ in 0..20 {
        source.execute("stop", Value::Null);
        assert_eq!(source.status(), "paused");
        source.execute("cont", Value::Null);
    }
    source.wait_heartbeats(20);

    source.execute("migrate_cancel", Value::Null);
    let info = source.wait_migrated("cancelled");
    assert_eq!(info["cpu-throttle-percentage"], Value::Null);
    let again = rate(&mut source);
    assert!(again > throttled * 1.5, "{again} after {throttled} pages/s");
    source.verify();
}

#[test]
fn a_guest_that_does_not_converge_does_so_when_it_is_throttled() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", writer());
    switch(&mut source, "auto-converge");
    begin(
        &mut source,
        &uri,
        json!({ "cpu-throttle-initial": 80, "cpu-throttle-increment": 19 }),
    );
    wait_throttled(&mut source);
    let info = source.wait_migrated("completed");
    assert_eq!(info["cpu-throttle-percentage"], Value::Null);
    destination.wait_heartbeats(20);
    destination.verify();
}

#[test]
fn a_migration_ends_when_its_time_is_up() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", writer());
    let postcopy = json!({ "x-migration-timeout": 1000, "x-migration-timeout-action": "postcopy" });
    source.execute("migrate-set-parameters", postcopy);
    let refusal = source.refused("migrate", json!({ "uri": uri }));
    assert!(refusal.contains("postcopy-ram"), "{refusal}");
    // It is cut off in the middle, and finished.
    begin(
        &mut source,
        &uri,
        json!({ "x-migration-timeout-action": "force" }),
    );
    source.wait_migrated("completed");
    destination.wait_heartbeats(20);
    destination.verify();

    // And back, but not in that time.
    let (_back, uri) = Ferry::incoming(dir.path(), "back");
    begin(
        &mut destination,
        &uri,
        json!({ "x-migration-timeout": 1000, "max-bandwidth": 1 << 20 }),
    );
    destination.wait_migrated("cancelled");
    destination.wait_heartbeats(20);
    destination.verify();
}

#[test]
fn what_a_guest_writes_is_measured_in_both_ways() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", writer());
    assert_eq!(
        source.execute("query-dirty-rate", Value::Null)["status"],
        "unstarted"
    );
    let forecast = "x-query-migration-forecast";
    let refusal = source.refused(forecast, json!({ "bandwidth": 1 << 30 }));
    assert!(refusal.contains("calc-dirty-rate"), "{refusal}");
    for (mode, least, most) in [
        // Of all of its 16 MiB, over and over, and of little else; on a machine that is busy the
        // second is a longer one.
        ("page-sampling", 4, 24),
        ("dirty-bitmap", 4, 24),
    ] {
        let one = json!({ "calc-time": 1, "mode": mode, "sample-pages": 16384 });
        source.execute("calc-dirty-rate", one.clone());
        let refusal = source.refused("calc-dirty-rate", one);
        assert!(refusal.contains("already"), "{refusal}");
        let info = loop {
            let info = source.execute("query-dirty-rate", Value::Null);
            if info["status"] != "measuring" {
                break info;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(
            (&info["status"], &info["mode"]),
            (&json!("measured"), &json!(mode))
        );
        let rate = info["dirty-rate"].as_u64().unwrap();
        assert!((least..=most).contains(&rate), "{info}");
    }
    // It writes to 16 MiB a second at most, and has 64.
    let fast = source.execute(forecast, json!({ "bandwidth": 1 << 30 }));
    assert_eq!(fast["converges"], true, "{fast}");
    let memory = fast["memory"].as_u64().unwrap();
    assert!((16 << 20..=64 << 20).contains(&memory), "{fast}");
    let slow = source.execute(forecast, json!({ "bandwidth": 1 << 20 }));
    assert_eq!(slow["converges"], false, "{slow}");
    assert!(slow["throttle-needed"].as_u64() >= Some(50), "{slow}");
    assert!(slow["bandwidth-needed"].as_u64() > Some(2 << 20), "{slow}");
    // A migration needs the log for itself.
    let long = json!({ "calc-time": 60, "mode": "dirty-bitmap" });
    source.execute("calc-dirty-rate", long.clone());
    source.execute("migrate-set-parameters", json!({ "downtime-limit": 2000 }));
    source.migrate(&uri);
    source.wait_migrated("completed");
    let info = source.execute("query-dirty-rate", Value::Null);
    assert_eq!(info["status"], "unstarted");
    destination.wait_heartbeats(20);
    destination.verify();
}
