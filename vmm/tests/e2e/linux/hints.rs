//! Linux's balloon driver is asked for free pages when the guest leaves.

use std::time::{Duration, Instant};

use serde_json::json;

use super::small::{boot, echoes, wait_passes};
use super::{BOOT, wait_said};
use crate::harness::{Ferry, PATIENCE, require_kvm, scratch};

/// What ferry logs when hints have come.
const HINTS: &str = "the guest has free pages";

/// The bytes that the guest has named as free, by the log.
fn named(ferry: &Ferry) -> u64 {
    let output = ferry.process.output();
    let lines = output.lines().filter(|line| line.contains(HINTS));
    lines
        .map(|line| {
            let (_, rest) = line.split_once("bytes=").expect(line);
            let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
            digits.unwrap().parse::<u64>().unwrap()
        })
        .sum()
}

#[test]
fn linux_names_its_free_pages_and_runs_on() {
    require_kvm!();
    let dir = scratch();
    let more = ["--log", "info,vmm=debug", "--balloon"];
    let Some(mut source) = boot(dir.path(), "source", &more, "") else {
        return;
    };
    wait_said(&source, BOOT, &["Run /init as init process"]);
    let before = wait_passes(&mut source, 3);
    let (mut destination, uri) = Ferry::incoming(dir.path(), "destination");
    source.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 4 << 20 }),
    );
    source.migrate(&uri);
    // Its first round takes seconds, in which even a kernel that is interpreted answers.
    let deadline = Instant::now() + PATIENCE;
    while named(&source) == 0 {
        assert!(Instant::now() < deadline, "{}", source.process.output());
        std::thread::sleep(Duration::from_millis(5));
    }
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }));
    source.wait_migrated("completed");
    let free = named(&source);
    // Nothing but itself and four MiB are used of its 128 MiB.
    assert!(free > 64 << 20, "{free} bytes were named as free");
    let arrived = wait_passes(&mut destination, before);
    wait_passes(&mut destination, arrived + 100);
    echoes(&mut destination, "typed after the migration");
}
