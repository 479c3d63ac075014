//! Guests that move before their memory, with nothing in the way.

use std::io::Write;

use guest_tests::dirtier::{Options, Rate};
use guest_tests::virtio;
use serde_json::{Value, json};

use super::{
    arrived, destination, destination_with, enable, furious, idle, in_postcopy, push_fast,
    push_slowly, require_postcopy, set, source, switch_at_once, wait_state,
};
use crate::guests::{self, Done, state_guest};
use crate::harness::{Ferry, busy, scratch};
use crate::shuttle::{ConsoleEnd, MEMORY, until, virtio_guest};

#[test]
fn switched_at_once_and_back_and_on() {
    require_postcopy!();
    let dir = scratch();
    let mut here = source(dir.path(), "a", furious());
    // Twice by post-copy: who has just received a guest sends it on.
    for name in ["b", "c"] {
        let (mut there, uri) = destination(dir.path(), name);
        switch_at_once(&mut here, &uri);
        let (info, _) = arrived(&mut here, &mut there);
        // Before the end of a round: most of it came after the guest.
        assert_eq!(info["ram"]["dirty-sync-count"], 2, "{info:#}");
        let late = info["ram"]["postcopy-bytes"].as_u64().unwrap();
        assert!(late > 32 << 20, "{info:#}");
        here.execute("quit", Value::Null);
        here.wait_exit();
        here = there;
    }
    // Then as a whole.
    let (mut last, uri) = destination(dir.path(), "d");
    set(
        &mut here,
        json!({ "max-bandwidth": 0, "downtime-limit": 10_000 }),
    );
    here.migrate(&uri);
    let info = here.wait_migrated("completed");
    assert!(info["x-ferry"]["postcopy"].is_null(), "{info:#}");
    last.wait_heartbeats(20);
    last.verify();
}

#[test]
fn switched_in_the_middle_of_a_round() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", furious());
    let (mut destination, uri) = destination(dir.path(), "dst");
    set(&mut source, json!({ "max-bandwidth": 40 << 20 }));
    source.migrate(&uri);
    let info = source.wait_migration("first pages", |info| {
        info["ram"]["transferred"].as_u64() > Some(10 << 20)
    });
    assert_eq!(info["status"], "active");
    source.execute("migrate-start-postcopy", Value::Null);
    let (info, _) = arrived(&mut source, &mut destination);
    assert!(
        info["ram"]["precopy-bytes"].as_u64() > Some(10 << 20),
        "{info:#}"
    );
}

/// Of the second guest, most pages are clean when it switches, and some of them no longer when it
/// stops.
#[test]
fn switched_after_some_rounds() {
    require_postcopy!();
    let steady = Options {
        rate: Rate::PerSecond(30_000),
        ..furious()
    };
    for options in [furious(), steady] {
        let dir = scratch();
        let mut source = source(dir.path(), "src", options);
        let (mut destination, uri) = destination(dir.path(), "dst");
        set(&mut source, json!({ "downtime-limit": 0 }));
        source.migrate(&uri);
        source.wait_migration("third round", |info| {
            info["ram"]["dirty-sync-count"].as_u64() >= Some(3)
        });
        source.execute("migrate-start-postcopy", Value::Null);
        arrived(&mut source, &mut destination);
    }
}

#[test]
fn it_switches_by_itself_if_it_is_to() {
    require_postcopy!();
    let dir = scratch();
    let mut here = source(dir.path(), "m0", furious());
    for (hop, when) in [
        json!({ "x-postcopy-after-rounds": 2 }),
        json!({ "x-postcopy-after-time": 100 }),
        json!({ "x-postcopy-no-convergence": true }),
    ]
    .into_iter()
    .enumerate()
    {
        let (mut there, uri) = destination(dir.path(), &format!("m{}", hop + 1));
        // It would never end otherwise.
        set(
            &mut here,
            json!({ "downtime-limit": 0, "max-bandwidth": 50 << 20 }),
        );
        set(&mut here, when.clone());
        here.migrate(&uri);
        let (info, _) = arrived(&mut here, &mut there);
        let rounds = info["ram"]["dirty-sync-count"].as_u64().unwrap();
        if when["x-postcopy-after-rounds"].is_u64() {
            assert_eq!(rounds, 3, "{info:#}");
        }
        here.execute("quit", Value::Null);
        here.wait_exit();
        here = there;
    }
}

/// Both check their registers, and wait for memory each for itself.
#[test]
fn a_guest_with_two_vcpus() {
    require_postcopy!();
    let dir = scratch();
    let mut here = Ferry::run(dir.path(), "s0", &state_guest(), &[]);
    enable(&mut here);
    let mut done = guests::wait_state(&here, [Done::default(); 2]);
    for hop in 1..=2 {
        let (mut there, uri) = destination(dir.path(), &format!("s{hop}"));
        push_slowly(&mut here);
        switch_at_once(&mut here, &uri);
        done = guests::wait_state(&there, done);
        push_fast(&mut here);
        here.wait_migrated("completed");
        let info = there.wait_migrated("completed");
        let waited = info["x-ferry"]["postcopy"]["vcpu-blocktime"].as_array();
        let waited: Vec<_> = waited.unwrap().iter().map(|us| us.as_u64()).collect();
        assert_eq!(waited.len(), 2, "{info:#}");
        assert!(waited.iter().all(|us| *us > Some(0)), "{info:#}");
        here.execute("quit", Value::Null);
        here.wait_exit();
        here = there;
    }
    guests::wait_state(&here, done);
}

#[test]
fn a_paused_guest_stays_paused_and_gets_its_memory() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", busy());
    let (mut destination, uri) = destination(dir.path(), "dst");
    source.execute("stop", Value::Null);
    switch_at_once(&mut source, &uri);
    source.wait_migrated("completed");
    destination.wait_migrated("completed");
    destination.wait_status("paused");
    assert_eq!(destination.serial.heartbeats().count, 0);
    destination.execute("cont", Value::Null);
    arrived(&mut source, &mut destination);
}

#[test]
fn one_that_was_paused_can_be_continued_before_its_memory_is_there() {
    require_postcopy!();
    let dir = scratch();
    let mut source = source(dir.path(), "src", busy());
    let (mut destination, uri) = destination(dir.path(), "dst");
    source.execute("stop", Value::Null);
    push_slowly(&mut source);
    switch_at_once(&mut source, &uri);
    wait_state(&mut destination, "postcopy-active");
    destination.wait_status("paused");
    destination.execute("cont", Value::Null);
    destination.wait_heartbeats(20);
    // And stopped, looked at and continued again.
    destination.execute("stop", Value::Null);
    assert_eq!(destination.status(), "paused");
    destination.execute("cont", Value::Null);
    wait_state(&mut destination, "postcopy-active");
    push_fast(&mut source);
    arrived(&mut source, &mut destination);
}

#[test]
fn events_and_figures_tell_of_it() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), busy());
    // The guest is there already, and its downtime is over, while most of its memory is not.
    destination.wait_heartbeats(20);
    assert_eq!(source.status(), "postmigrate");
    let during = source.query_migrate();
    let downtime = during["downtime"].as_u64().unwrap();
    assert!(during["ram"]["remaining"].as_u64() > Some(0), "{during:#}");
    let there = destination.query_migrate();
    assert_eq!(there["status"], "postcopy-active");
    assert!(there["x-ferry"]["postcopy"]["missing-pages"].as_u64() > Some(0));
    push_fast(&mut source);
    let (here, there) = arrived(&mut source, &mut destination);

    assert_eq!(here["downtime"], downtime, "{here:#}");
    assert!(here["total-time"].as_u64() > Some(downtime), "{here:#}");
    for info in [&here, &there] {
        let ferry = &info["x-ferry"]["postcopy"];
        assert_eq!(ferry["missing-pages"], 0, "{info:#}");
        assert_eq!(info["ram"]["remaining"], 0, "{info:#}");
        assert!(
            info["ram"]["postcopy-requests"].as_u64() > Some(0),
            "{info:#}"
        );
        assert!(
            info["ram"]["postcopy-bytes"].as_u64() > Some(32 << 20),
            "{info:#}"
        );
        assert!(
            ferry["time"].as_u64() > Some(1000 * downtime),
            "{downtime}: {info:#}"
        );
        assert!(ferry["requested-pages"].as_u64() > Some(0), "{info:#}");
    }
    for figure in ["postcopy-blocktime", "postcopy-latency"] {
        assert!(there[figure].is_u64(), "{figure}: {there:#}");
        assert!(here[figure].is_null(), "{figure}: {here:#}");
    }
    assert!(there["postcopy-latency"].as_u64() > Some(0), "{there:#}");
    let faults = there["postcopy-latency-dist"].as_array().unwrap();
    let faults: u64 = faults.iter().map(|count| count.as_u64().unwrap()).sum();
    assert!(faults > 0, "{there:#}");

    for (side, other) in [(&mut source, "STOP"), (&mut destination, "RESUME")] {
        let events = side.qmp.take_events();
        let statuses: Vec<_> = events
            .iter()
            .filter(|event| event.name == "MIGRATION")
            .map(|event| event.data["status"].as_str().unwrap())
            .collect();
        let expected = ["setup", "active", "device", "postcopy-active", "completed"];
        assert_eq!(statuses, expected);
        assert!(events.iter().any(|event| event.name == other), "{other}");
    }
}

#[test]
fn a_guest_that_does_nothing_waits_for_nothing() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), idle());
    destination.wait_heartbeats(100);
    let info = destination.query_migrate();
    assert_eq!(info["status"], "postcopy-active", "{info:#}");
    push_fast(&mut source);
    arrived(&mut source, &mut destination);
}

/// rng, console and balloon are at work all along, and nothing of the console is lost.
#[test]
fn virtio_devices_at_work() {
    require_postcopy!();
    let dir = scratch();
    let console = |name: &str| dir.path().join(format!("{name}.console"));
    let option = |name: &str| format!("unix:{}", console(name).display());
    let devices = [
        "--rng",
        "--balloon",
        "--console",
        &option("src"),
        "--paused",
    ];
    let mut source = Ferry::run(dir.path(), "src", &virtio_guest(500), &devices);
    let mut end = ConsoleEnd::connect(&console("src"));
    source.execute("cont", Value::Null);
    enable(&mut source);
    let (mut sent, mut heard) = (String::new(), String::new());
    let mut seen = until(&source, |seen| seen.rng_requests > 0);
    let mut here = source;
    for (name, pages) in [("b", 3_000), ("c", 100), ("d", 2_000)] {
        let words = name.to_ascii_uppercase().repeat(3_000);
        end.stream.write_all(words.as_bytes()).unwrap();
        sent += &words;
        let all = sent.len() as u64;
        until(&here, |seen| seen.console_received == all);
        let (mut there, uri) = destination_with(dir.path(), name, &["--console", &option(name)]);
        let there_end = ConsoleEnd::connect(&console(name));
        push_slowly(&mut here);
        // It inflates and deflates while it moves, and while its memory comes.
        here.execute("balloon", json!({ "value": MEMORY - pages * 4096 }));
        switch_at_once(&mut here, &uri);
        wait_state(&mut there, "postcopy-active");
        for pages in [500, pages] {
            there.execute("balloon", json!({ "value": MEMORY - pages * 4096 }));
            until(&there, |seen| seen.balloon_actual == pages);
        }
        let before = seen;
        seen = until(&there, |seen| {
            seen.rng_requests > before.rng_requests + 20 && seen.ticks > before.ticks + 20
        });
        push_fast(&mut here);
        there.wait_migrated("completed");
        here.wait_migrated("completed");
        here.execute("quit", Value::Null);
        here.wait_exit();
        heard += &end.hears.join().unwrap();
        (here, end) = (there, there_end);
    }
    let letters = |text: &str| text.chars().filter(char::is_ascii_uppercase).count();
    // What is on its way comes before the end.
    here.serial.send(&[virtio::command::STATUS]).unwrap();
    let ticks = |seen: &crate::shuttle::Seen| {
        (1..=seen.ticks)
            .map(|n| format!("tick {n}\n").len() as u64)
            .sum::<u64>()
    };
    until(&here, |seen| {
        seen.console_sent + 200 > sent.len() as u64 + ticks(seen)
    });
    here.execute("quit", Value::Null);
    here.wait_exit();
    heard += &end.hears.join().unwrap();
    assert_eq!(letters(&heard), sent.len(), "of the echo");
}
