//! What becomes of the guest's memory at its source.

use guest_tests::dirtier::command;
use serde_json::{Value, json};

use super::{arrived, idle, in_postcopy, push_fast, require_postcopy};
use crate::harness::{Ferry, PATIENCE, scratch};

/// What the guest fills at least.
const FILLED: u64 = 64 << 20;

/// The resident memory of a process, in bytes.
pub(super) fn resident(ferry: &Ferry) -> u64 {
    let path = format!("/proc/{}/smaps_rollup", ferry.process.id());
    let smaps = std::fs::read_to_string(path).unwrap();
    let line = smaps.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() << 10
}

/// A process has the guest's memory.
pub(super) fn has_memory(ferry: &Ferry) -> bool {
    resident(ferry) > FILLED
}

fn wait_given_back(ferry: &Ferry) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while resident(ferry) > FILLED / 2 {
        let output = ferry.process.output();
        assert!(
            std::time::Instant::now() < deadline,
            "{} bytes are still resident\n{output}",
            resident(ferry)
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn the_source_gives_it_back_when_all_has_arrived() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), idle());
    destination.wait_heartbeats(20);
    assert!(has_memory(&source), "not before");
    push_fast(&mut source);
    arrived(&mut source, &mut destination);
    wait_given_back(&source);
    assert!(has_memory(&destination));

    // Nothing that could use it is possible there.
    for (command, arguments) in [
        ("cont", Value::Null),
        ("system_reset", Value::Null),
        ("system_powerdown", Value::Null),
        ("migrate", json!({ "uri": "tcp:127.0.0.1:1" })),
        (
            "migrate",
            json!({ "uri": "tcp:127.0.0.1:1", "resume": true }),
        ),
    ] {
        source.refused(command, arguments);
    }
    for line in ["savevm a", "loadvm a", "delvm a"] {
        let arguments = json!({ "command-line": line });
        let said = source.execute("human-monitor-command", arguments);
        assert!(said.as_str().unwrap().contains("Error"), "{line}: {said}");
    }
    // What can be looked at can be.
    let registers = json!({ "command-line": "info registers" });
    let said = source.execute("human-monitor-command", registers);
    assert!(said.as_str().unwrap().contains("RIP"), "{said}");
    source.execute("stop", Value::Null);
    assert_eq!(source.status(), "postmigrate");
    wait_given_back(&source);
    source.execute("quit", Value::Null);
    let (success, output) = source.wait_exit();
    assert!(success, "{output}");
    destination.verify();
}

#[test]
fn the_source_gives_it_back_when_the_guest_has_ended() {
    require_postcopy!();
    let dir = scratch();
    let (mut source, mut destination, _crossing) = in_postcopy(dir.path(), idle());
    destination.serial.send(&[command::QUIT]).unwrap();
    source.wait_migrated("completed");
    wait_given_back(&source);
}
