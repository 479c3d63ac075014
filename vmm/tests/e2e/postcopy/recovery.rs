//! Connections that break in post-copy: both sides pause, and go on over another one.

use std::time::{SystemTime, UNIX_EPOCH};

use guest_tests::dirtier::{Options, Rate, Report, command};
use serde_json::{Value, json};

use super::crossing::{Crossing, Then};
use super::{
    arrived, destination, furious, idle, in_postcopy, push_fast, recover, recover_and_arrive,
    require_postcopy, resume, set, source, switch_at_once, wait_paused, wait_state,
};
use crate::frames::kind;
use crate::harness::{Ferry, scratch};

/// Numbers that differ from run to run; the seed is printed, to see a failure again.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = now.as_nanos() as u64 | 1;
        println!("seed {seed}");
        Self(seed)
    }

    /// One below `end`.
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 as usize % end
    }
}

/// A guest that goes through its memory without haste.
fn strolling() -> Options {
    Options {
        rate: Rate::PerSecond(2_000),
        ..furious()
    }
}

#[test]
fn cut_twenty_times_nothing_is_lost() {
    require_postcopy!();
    let dir = scratch();
    let mut random = Random::new();
    let mut source = source(dir.path(), "src", strolling());
    let (mut destination, uri) = destination(dir.path(), "dst");
    // Before and after a frame with pages, of the stream or of the fault channel: of more than 256,
    // so that something is left in the end.
    let mut stop = || {
        let then = [Then::CutBefore, Then::CutAfter][random.below(2)];
        Some((kind::PAGES, random.below(10), then))
    };
    set(&mut source, json!({ "max-postcopy-bandwidth": 16 << 20 }));
    let mut crossing = Crossing::to(&uri, stop());
    switch_at_once(&mut source, &crossing.uri);
    let mut missing = u64::MAX;
    for _ in 0..20 {
        crossing.wait_reached();
        wait_paused(&mut source, &mut destination);
        assert_eq!(destination.status(), "running");
        let info = destination.query_migrate();
        let now = info["x-ferry"]["postcopy"]["missing-pages"]
            .as_u64()
            .unwrap();
        assert!(0 < now && now <= missing, "{now} of {missing} are missing");
        missing = now;
        crossing = recover(&mut source, &mut destination, stop());
    }
    crossing.wait_reached();
    wait_paused(&mut source, &mut destination);
    recover_and_arrive(&mut source, &mut destination);
}

#[test]
fn paused_by_either_side_and_recovered() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, mut crossing) = in_postcopy(dir.path(), idle());
    for at_source in [true, false] {
        let side = if at_source {
            &mut source
        } else {
            &mut destination
        };
        side.execute("migrate-pause", Value::Null);
        wait_paused(&mut source, &mut destination);
        for side in [&mut source, &mut destination] {
            let refusal = side.refused("migrate-pause", Value::Null);
            assert!(refusal.contains("postcopy-active"), "{refusal}");
        }
        crossing = recover(&mut source, &mut destination, None);
        for side in [&mut source, &mut destination] {
            let info = wait_state(side, "postcopy-active");
            assert!(info["error-desc"].is_null(), "{info:#}");
        }
    }
    // A destination that waits for its source can be sent to another address. Until one has come
    // there is nothing to be paused.
    crossing.cut();
    wait_paused(&mut source, &mut destination);
    let nowhere = json!({ "uri": "tcp:127.0.0.1:0" });
    destination.execute("migrate-recover", nowhere);
    assert_eq!(destination.query_migrate()["status"], "postcopy-paused");
    let refusal = destination.refused("migrate-pause", Value::Null);
    assert!(refusal.contains("postcopy-active"), "{refusal}");
    recover_and_arrive(&mut source, &mut destination);
}

#[test]
fn cut_at_each_frame_of_a_recovery() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, crossing) = in_postcopy(dir.path(), idle());
    // Where nothing has arrived there is no ARRIVED to cut at.
    destination.wait_migration("pages", |info| {
        let missing = info["x-ferry"]["postcopy"]["missing-pages"].as_u64();
        let total = info["ram"]["total"].as_u64().unwrap_or(0);
        missing.is_some_and(|pages| pages * 4096 < total)
    });
    crossing.cut();
    for kind in [
        kind::RESUME,
        kind::ARRIVED,
        kind::LEFT,
        kind::JOIN,
        kind::CONTINUE,
    ] {
        for then in [Then::CutBefore, Then::CutAfter] {
            wait_paused(&mut source, &mut destination);
            let crossing = recover(&mut source, &mut destination, Some((kind, 0, then)));
            crossing.wait_reached();
        }
    }
    wait_paused(&mut source, &mut destination);
    recover_and_arrive(&mut source, &mut destination);
}

#[test]
fn a_wrong_address_or_a_stranger_changes_nothing() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, crossing) = in_postcopy(dir.path(), idle());
    crossing.cut();
    wait_paused(&mut source, &mut destination);
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    resume(&mut source, &format!("tcp:{free}"));
    let info = source.wait_migration("failed recovery", |info| {
        info["status"] == "postcopy-paused"
            && info["error-desc"]
                .as_str()
                .is_some_and(|reason| reason.contains("refused"))
    });
    assert_eq!(source.status(), "postmigrate", "{info:#}");
    // Somebody else's guest is not taken for this one's.
    destination.execute("migrate-recover", json!({ "uri": "tcp:127.0.0.1:0" }));
    let uri = destination.listening_at();
    let mut other = super::source(dir.path(), "other", idle());
    other.migrate(&uri);
    other.wait_migrated("failed");
    assert_eq!(other.status(), "running");
    // Nor does it stop waiting because a connection breaks too early.
    let crossing = Crossing::to(&uri, Some((kind::RESUME, 0, Then::CutBefore)));
    resume(&mut source, &crossing.uri);
    crossing.wait_reached();
    wait_state(&mut source, "postcopy-paused");
    wait_state(&mut destination, "postcopy-paused");
    push_fast(&mut source);
    resume(&mut source, &uri);
    arrived(&mut source, &mut destination);
}

#[test]
fn while_it_is_paused_everybody_answers_and_the_guest_waits_for_what_is_missing() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, crossing) = in_postcopy(dir.path(), idle());
    destination.wait_heartbeats(20);
    crossing.cut();
    wait_paused(&mut source, &mut destination);
    // It has what it needs for this.
    destination.wait_heartbeats(20);
    // But not for this, and waits.
    destination.serial.send(&[command::VERIFY]).unwrap();
    destination.wait_migration("waiting vCPU", |_| true);
    for (command, arguments) in [
        ("stop", Value::Null),
        ("system_reset", Value::Null),
        ("migrate", json!({ "uri": "tcp:127.0.0.1:1" })),
        ("quit", Value::Null),
    ] {
        let refusal = destination.refused(command, arguments);
        assert!(
            refusal.contains("pages of the guest's memory"),
            "{command}: {refusal}"
        );
    }
    for command in [
        "query-status",
        "query-cpus-fast",
        "query-migrate",
        "query-block",
        "query-migrate-parameters",
    ] {
        destination.execute(command, Value::Null);
        source.execute(command, Value::Null);
    }
    let registers = monitor(&mut destination, "info registers");
    assert!(registers.contains("recover the migration"), "{registers}");
    assert!(monitor(&mut destination, "info migrate").contains("postcopy-paused"));
    assert_eq!(destination.status(), "running");
    for (command, arguments) in [
        ("migrate_cancel", Value::Null),
        ("quit", Value::Null),
        ("cont", Value::Null),
        ("system_reset", Value::Null),
        ("migrate", json!({ "uri": "tcp:127.0.0.1:1" })),
    ] {
        source.refused(command, arguments);
    }

    push_fast(&mut source);
    let _crossing = recover(&mut source, &mut destination, None);
    let errors = destination.wait_for(|report| match report {
        Report::Verified { errors, .. } => Some(*errors),
        _ => None,
    });
    assert_eq!(errors, 0);
    arrived(&mut source, &mut destination);
}

fn monitor(ferry: &mut Ferry, command: &str) -> String {
    let arguments = json!({ "command-line": command });
    let answer = ferry.execute("human-monitor-command", arguments);
    answer.as_str().unwrap().to_owned()
}

#[test]
fn running_that_never_arrives_is_a_pause() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    let (mut destination, uri) = destination(dir.path(), "dst");
    let crossing = Crossing::to(&uri, Some((kind::RUNNING, 0, Then::CutBefore)));
    switch_at_once(&mut source, &crossing.uri);
    crossing.wait_reached();
    wait_paused(&mut source, &mut destination);
    assert_eq!(destination.status(), "running");
    let info = source.query_migrate();
    assert!(
        info["error-desc"].as_str().unwrap().contains("'cont'"),
        "{info:#}"
    );
    let _crossing = recover(&mut source, &mut destination, None);
    arrived(&mut source, &mut destination);
}

/// Cuts the connection when the destination says that all has arrived: nobody hears it.
fn never_told(source: &mut Ferry, destination: &mut Ferry, uri: &str) {
    let crossing = Crossing::to(uri, Some((kind::COMPLETE, 0, Then::CutBefore)));
    switch_at_once(source, &crossing.uri);
    crossing.wait_reached();
    // It has all, whatever the source knows.
    destination.wait_migrated("completed");
    wait_for_doubt(destination);
    wait_state(source, "postcopy-paused");
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("never run twice"), "{refusal}");
}

fn wait_for_doubt(destination: &mut Ferry) {
    let info = destination.wait_migration("doubt", |info| {
        let reason = info["error-desc"].as_str();
        reason.is_some_and(|reason| reason.contains("may not know"))
    });
    assert_eq!(info["status"], "completed");
}

#[test]
fn a_source_that_was_never_told_that_all_has_arrived_can_ask() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    let (mut destination, uri) = destination(dir.path(), "dst");
    never_told(&mut source, &mut destination, &uri);
    destination.verify();
    let refusal = destination.refused("migrate-pause", Value::Null);
    assert!(refusal.contains("postcopy-active"), "{refusal}");
    // It may be lost again.
    let stop = Some((kind::COMPLETE, 0, Then::CutBefore));
    let crossing = recover(&mut source, &mut destination, stop);
    crossing.wait_reached();
    wait_state(&mut source, "postcopy-paused");
    let _crossing = recover(&mut source, &mut destination, None);
    arrived(&mut source, &mut destination);
    let info = destination.wait_migration("no doubt", |info| info["error-desc"].is_null());
    assert_eq!(info["status"], "completed");
    let again = json!({ "uri": "tcp:127.0.0.1:0" });
    let refusal = destination.refused("migrate-recover", again);
    assert!(refusal.contains("paused"), "{refusal}");
}

#[test]
fn a_destination_that_has_all_is_free_whatever_its_source_knows() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", idle());
    let (mut destination, uri) = destination(dir.path(), "dst");
    never_told(&mut source, &mut destination, &uri);
    destination.execute("migrate-recover", json!({ "uri": "tcp:127.0.0.1:0" }));
    for (command, status) in [("stop", "paused"), ("cont", "running")] {
        destination.execute(command, Value::Null);
        destination.wait_status(status);
    }
    let (mut last, uri) = super::destination(dir.path(), "last");
    switch_at_once(&mut destination, &uri);
    arrived(&mut destination, &mut last);
    // Without force, and at once.
    destination.execute("quit", Value::Null);
    let (success, output) = destination.wait_exit();
    assert!(success, "{output}");
    source.execute("quit", json!({ "force": true }));
    source.wait_exit();
    last.wait_heartbeats(20);
}
