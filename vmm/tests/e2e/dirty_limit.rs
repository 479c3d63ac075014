//! vCPUs that are limited in what they write: by their user, and by a migration with the capability
//! `dirty-limit`. Of the guest's two, the first writes as fast as it can, and the second computes.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use guest_tests::Size;
use guest_tests::dirtier::{Options, Rate, Report, command};
use serde_json::{Value, json};

use crate::harness::{Ferry, Guest, PATIENCE, require_kvm, scratch, skip};

const SET: &str = "set-vcpu-dirty-limit";
const CANCEL: &str = "cancel-vcpu-dirty-limit";
const QUERY: &str = "query-vcpu-dirty-limit";

fn run(dir: &Path, name: &str, more: &[&str]) -> Ferry {
    let options = Options {
        fill: Size(16 << 20),
        ws: Size(16 << 20),
        rate: Rate::Max,
        heartbeat: 1_000,
        computers: 1,
        ..Options::default()
    };
    let guest = Guest {
        smp: 2,
        ..Guest::dirtier("64M", options)
    };
    let ferry = Ferry::run(dir, name, &guest, more);
    wait_ready(&ferry);
    ferry
}

fn wait_ready(ferry: &Ferry) {
    ferry.wait_for(|report| matches!(report, Report::Ready { .. }).then_some(()));
}

/// What each vCPU writes, in MB a second, by the dirty log; `None` if this host doesn't tell.
fn measure(ferry: &mut Ferry) -> Option<Vec<u64>> {
    let request = json!({ "calc-time": 1, "mode": "dirty-bitmap" });
    ferry.execute("calc-dirty-rate", request);
    let deadline = Instant::now() + PATIENCE;
    let info = loop {
        let info = ferry.execute("query-dirty-rate", Value::Null);
        if info["status"] != "measuring" {
            break info;
        }
        assert!(Instant::now() < deadline, "{info}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(info["status"], "measured", "{info}");
    let rates = info["vcpu-dirty-rate"].as_array()?;
    let ids: Vec<_> = rates.iter().map(|vcpu| vcpu["id"].as_u64()).collect();
    assert_eq!(ids, [Some(0), Some(1)], "{info}");
    let rate = |vcpu: &Value| vcpu["dirty-rate"].as_u64().unwrap();
    Some(rates.iter().map(rate).collect())
}

/// Ends the calling test, loudly, if this host doesn't tell which vCPU writes.
macro_rules! require_writers_told {
    ($ferry:expr) => {
        match measure($ferry) {
            Some(rates) => rates,
            None => return skip("this host doesn't tell which vCPU writes"),
        }
    };
}

/// What is said of that vCPU, if it is limited.
fn limited(ferry: &mut Ferry, vcpu: u64) -> Option<Value> {
    let all = ferry.execute(QUERY, Value::Null);
    let mut all = all.as_array().unwrap().iter();
    all.find(|info| info["cpu-index"] == vcpu).cloned()
}

fn share(info: &Value) -> u64 {
    info["x-throttle-percentage"].as_u64().unwrap()
}

/// Waits until what is said of the writing vCPU satisfies the condition. The other one is never
/// slowed down meanwhile, and is never said to write.
fn wait_writer(ferry: &mut Ferry, what: &str, until: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(computer) = limited(ferry, 1) {
            assert_eq!(share(&computer), 0, "{computer}");
            assert_eq!(computer["current-rate"], 0, "{computer}");
        }
        let writer = limited(ferry, 0).unwrap_or_default();
        if until(&writer) {
            return writer;
        }
        assert!(
            Instant::now() < deadline,
            "no '{what}': {writer}\n{}",
            ferry.process.output()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the writing vCPU is kept from running for most of its time. A page counts once a look,
/// so it takes a few of them.
fn wait_slowed_down(ferry: &mut Ferry) {
    let slow = |writer: &Value| !writer.is_null() && share(writer) >= 80;
    wait_writer(ferry, "it is slowed down", slow);
}

/// Pages that the one vCPU has written for each piece that the other has computed, over so much of
/// the latter that it is no matter when either was asked.
fn pages_a_piece(ferry: &mut Ferry) -> f64 {
    let status = |ferry: &mut Ferry| {
        ferry.serial.send(&[command::STATUS]).unwrap();
        ferry.wait_for(|report| match report {
            Report::Status {
                written, computed, ..
            } => Some((*written, *computed)),
            _ => None,
        })
    };
    let (written, computed) = status(ferry);
    loop {
        let now = status(ferry);
        if now.1 - computed > 300 {
            return (now.0 - written) as f64 / (now.1 - computed) as f64;
        }
    }
}

#[test]
fn only_the_vcpu_that_writes_is_slowed_down_by_its_limit_until_that_is_cancelled() {
    require_kvm!();
    let dir = scratch();
    let mut ferry = run(dir.path(), "vm", &[]);
    let rates = require_writers_told!(&mut ferry);
    assert!(rates[0] > 4 && rates[1] == 0, "{rates:?}");
    assert_eq!(ferry.execute(QUERY, Value::Null), json!([]));
    let free = pages_a_piece(&mut ferry);

    for command in [SET, CANCEL] {
        let none = json!({ "dirty-rate": 2, "cpu-index": 2 });
        let none = match command {
            SET => none,
            _ => json!({ "cpu-index": 2 }),
        };
        let refusal = ferry.refused(command, none);
        assert!(refusal.contains("no vCPU 2, but 0 to 1"), "{refusal}");
    }
    ferry.execute(SET, json!({ "dirty-rate": 4 }));
    wait_slowed_down(&mut ferry);
    let limits = ferry.execute(QUERY, Value::Null);
    assert_eq!(limits[0]["limit-rate"], 4, "{limits}");
    assert_eq!(limits[1]["limit-rate"], 4, "{limits}");
    let slow = pages_a_piece(&mut ferry);
    assert!(slow < free / 2.0, "{slow} of {free}");
    let text = json!({ "command-line": "info vcpu_dirty_limit" });
    let text = ferry.execute("human-monitor-command", text);
    let text = text.as_str().unwrap();
    assert!(text.contains("vcpu[0], limit rate 4 (MB/s)"), "{text}");

    // The log is used for that.
    let by_log = json!({ "calc-time": 1, "mode": "dirty-bitmap" });
    let refusal = ferry.refused("calc-dirty-rate", by_log);
    assert!(refusal.contains(CANCEL), "{refusal}");
    // It stays slowed down over a stop and a reset.
    ferry.execute("stop", Value::Null);
    wait_writer(&mut ferry, "nobody writes", |writer| {
        writer["current-rate"] == 0 && share(writer) >= 80
    });
    ferry.execute("cont", Value::Null);
    ferry.execute("system_reset", Value::Null);
    wait_ready(&ferry);
    wait_writer(&mut ferry, "it writes, slowed down", |writer| {
        writer["current-rate"] != 0 && share(writer) >= 80
    });

    ferry.execute(CANCEL, json!({ "cpu-index": 0 }));
    assert_eq!(limited(&mut ferry, 0), None);
    assert!(limited(&mut ferry, 1).is_some());
    let again = pages_a_piece(&mut ferry);
    assert!(again > slow * 2.0, "{again} after {slow}");
    // 0 is no limit.
    ferry.execute(SET, json!({ "dirty-rate": 0 }));
    assert_eq!(ferry.execute(QUERY, Value::Null), json!([]));
    assert!(measure(&mut ferry).is_some(), "the log is free again");
    ferry.verify();
}

#[test]
fn a_migration_with_a_dirty_limit_slows_down_only_the_vcpu_that_writes() {
    require_kvm!();
    let dir = scratch();
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    let mut source = run(dir.path(), "src", &[]);
    require_writers_told!(&mut source);
    let free = pages_a_piece(&mut source);
    // A limit of the user's that holds nobody back stays what it is.
    source.execute(SET, json!({ "dirty-rate": 1000, "cpu-index": 1 }));
    let on = json!({ "capabilities": [{ "capability": "dirty-limit", "state": true }] });
    source.execute("migrate-set-capabilities", on);
    // What it may write in any case is nearly what the link takes, so it goes on for long.
    source.execute(
        "migrate-set-parameters",
        json!({
            "max-bandwidth": 32 << 20, "downtime-limit": 20, "throttle-trigger-threshold": 95,
            "vcpu-dirty-limit": 31, "x-vcpu-dirty-limit-period": 100,
        }),
    );
    source.migrate(&uri);
    for (command, arguments) in [(SET, json!({ "dirty-rate": 5 })), (CANCEL, json!({}))] {
        let refusal = source.refused(command, arguments);
        assert!(refusal.contains("dirty-limit"), "{refusal}");
    }
    wait_slowed_down(&mut source);
    let writer = limited(&mut source, 0).unwrap();
    assert_eq!(writer["limit-rate"], 31, "{writer}");
    let slow = pages_a_piece(&mut source);
    assert!(slow < free / 2.0, "{slow} of {free}");
    assert_eq!(source.query_migrate()["status"], "active");

    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    assert_eq!(limited(&mut source, 0), None);
    let left = limited(&mut source, 1).unwrap();
    assert_eq!(left["limit-rate"], 1000, "{left}");
    let again = pages_a_piece(&mut source);
    assert!(again > slow * 2.0, "{again} after {slow}");

    // And now to its end.
    drop(destination);
    let uri;
    (destination, uri) = Ferry::incoming(dir.path(), "again");
    let less = json!({ "vcpu-dirty-limit": 1, "throttle-trigger-threshold": 50 });
    source.execute("migrate-set-parameters", less);
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_heartbeats(20);
    destination.verify();
}

#[test]
fn a_limit_holds_on_while_others_use_the_log_and_stays_where_it_was_set() {
    require_kvm!();
    let dir = scratch();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let disk = format!("file={},format=raw", image.display());
    let (_destination, uri) = Ferry::incoming_with(dir.path(), "dst", &["--disk", &disk]);
    let mut source = run(dir.path(), "src", &["--disk", &disk]);
    require_writers_told!(&mut source);
    let limit = json!({ "dirty-rate": 2, "cpu-index": 0 });
    source.execute(SET, limit.clone());
    wait_slowed_down(&mut source);

    // Whoever writes is told only if the log is on.
    let wait_held_anew = |source: &mut Ferry| {
        let high = json!({ "dirty-rate": 100_000, "cpu-index": 0 });
        source.execute(SET, high);
        wait_writer(source, "it is let go", |writer| share(writer) == 0);
        source.execute(SET, limit.clone());
        wait_slowed_down(source);
    };
    // Rounds that are short, as a page counts once in each, and no end.
    let endless = json!({ "max-bandwidth": 64 << 20, "downtime-limit": 0 });
    source.execute("migrate-set-parameters", endless);
    source.migrate(&uri);
    source.wait_migration("it is under way", |info| {
        info["ram"]["dirty-sync-count"].as_u64() > Some(2)
    });
    wait_held_anew(&mut source);
    assert_eq!(source.query_migrate()["status"], "active");
    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    wait_held_anew(&mut source);

    for line in ["savevm here", "loadvm here"] {
        let line = json!({ "command-line": line });
        let told = source.execute("human-monitor-command", line);
        assert_eq!(told, "", "{}", source.process.output());
        wait_held_anew(&mut source);
    }

    let (mut destination, uri) = Ferry::incoming_with(dir.path(), "again", &["--disk", &disk]);
    let fast = json!({ "max-bandwidth": 0, "downtime-limit": 2000 });
    source.execute("migrate-set-parameters", fast);
    source.migrate(&uri);
    source.wait_migrated("completed");
    assert_eq!(destination.execute(QUERY, Value::Null), json!([]));
    let refusal = source.refused(SET, limit);
    assert!(refusal.contains("postmigrate"), "{refusal}");
    destination.wait_heartbeats(20);
    destination.verify();
}
