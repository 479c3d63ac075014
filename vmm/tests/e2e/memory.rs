//! What stands behind guest memory, which is each host's own choice.

use guest_tests::Size;
use guest_tests::dirtier::Options;
use guest_tests::driver::hugepages::HugePages;
use serde_json::{Value, json};

use crate::harness::{Ferry, Guest, busy, require_kvm, scratch, skip};

/// All resident memory of a process, in bytes.
fn resident(ferry: &Ferry) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", ferry.process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() << 10
}

/// What a huge pages' process has of them, in bytes.
fn huge(ferry: &Ferry) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", ferry.process.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("HugetlbPages:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() << 10
}

fn small() -> Options {
    Options {
        fill: Size(32 << 20),
        ws: Size(4 << 20),
        ..busy()
    }
}

/// Moves the guest to a process with that memory.
fn move_to(mut source: Ferry, dir: &std::path::Path, name: &str, memory: &str) -> Ferry {
    let (mut there, uri) = Ferry::incoming_with(dir, name, &["--memory", memory]);
    source.migrate(&uri);
    source.wait_migrated("completed");
    source.quit();
    there.wait_heartbeats(20);
    there.verify();
    there
}

#[test]
fn a_guest_moves_from_any_kind_of_memory_to_any_other() {
    require_kvm!();
    let dir = scratch();
    let mut here = Ferry::run_dirtier(dir.path(), "m", "64M", small());
    let in_file = format!("64M,path={}", dir.path().display());
    for (name, memory) in [
        ("prealloc", "64M,prealloc=on"),
        ("transparent", "hugepages=transparent"),
        ("shared", "64M,shared=on"),
        ("file", &in_file),
        ("reserved", "64M,shared=on,prealloc=on"),
        ("default", "64M"),
    ] {
        here = move_to(here, dir.path(), name, memory);
        // It can be reset where it has come to.
        here.execute("system_reset", Value::Null);
        here.wait_heartbeats(20);
    }
}

#[test]
fn huge_pages_are_a_hosts_own_matter_too() {
    require_kvm!();
    // Those of two processes, at each step.
    let _pages = match HugePages::reserve(64) {
        Ok(pages) => pages,
        Err(error) => return skip(&format!("huge pages: {error}")),
    };
    let dir = scratch();
    let mut here = Ferry::run_dirtier(dir.path(), "m", "64M", small());
    for (name, memory) in [
        ("private", "64M,hugepages=on,hugepage-size=2M"),
        ("shared", "hugepages=on,hugepage-size=2M,shared=on"),
        ("again", "64M,hugepage-size=2M,prealloc=on"),
    ] {
        here = move_to(here, dir.path(), name, memory);
        assert!(huge(&here) >= 32 << 20, "{name}");
    }
    here = move_to(here, dir.path(), "default", "64M");
    assert_eq!(huge(&here), 0);
}

#[test]
fn what_was_never_touched_stays_so() {
    require_kvm!();
    let dir = scratch();
    let mut here = Ferry::run(
        dir.path(),
        "m",
        &Guest::dirtier("512M,shared=on", small()),
        &[],
    );
    here.wait_heartbeats(20);
    for (name, memory) in [("shared", "512M,shared=on"), ("default", "512M")] {
        let (mut there, uri) = Ferry::incoming_with(dir.path(), name, &["--memory", memory]);
        here.migrate(&uri);
        here.wait_migrated("completed");
        there.wait_heartbeats(20);
        // Reading a hole of shared memory would fill it.
        assert!(
            resident(&here) < 256 << 20,
            "{} at the source",
            resident(&here)
        );
        assert!(
            resident(&there) < 256 << 20,
            "{} at {name}",
            resident(&there)
        );
        there.verify();
        here.quit();
        here = there;
    }
}

#[test]
fn preallocated_memory_is_there_before_the_guest() {
    require_kvm!();
    let dir = scratch();
    let (mut there, uri) =
        Ferry::incoming_with(dir.path(), "dst", &["--memory", "512M,prealloc=on"]);
    assert!(resident(&there) > 512 << 20, "{}", resident(&there));
    let mut source = Ferry::run_dirtier(dir.path(), "src", "512M", small());
    source.migrate(&uri);
    source.wait_migrated("completed");
    there.wait_heartbeats(20);
    there.verify();
    // The very same memory, and not as much again.
    let there = resident(&there);
    assert!((512 << 20..700 << 20).contains(&there), "{there}");
}

#[test]
fn a_destination_without_the_memory_refuses_and_the_guest_runs_on() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", small());
    let deferred = [
        "--incoming",
        "defer",
        "--memory",
        "hugepages=on,hugepage-size=2M",
    ];
    let mut there = Ferry::start(dir.path(), "dst", &deferred);
    there.execute(
        "migrate-incoming",
        json!({ "uri": "tcp:127.0.0.1:0", "exit-on-error": false }),
    );
    let uri = there.listening_at();
    // Nobody else of these tests has huge pages meanwhile.
    let pages = match HugePages::reserve(0) {
        Ok(pages) if pages.free() < 32 => pages,
        Ok(_) => return skip("the host has huge pages to spare"),
        Err(error) => return skip(&format!("huge pages: {error}")),
    };
    source.migrate(&uri);
    let info = source.wait_migrated("failed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(
        reason.contains("takes 32 huge pages of 2.0 MiB"),
        "{reason}"
    );
    source.wait_heartbeats(20);
    source.verify();
    drop(pages);
}

#[test]
fn memory_that_cannot_be_is_refused_at_the_start() {
    let dir = scratch();
    require_kvm!();
    for (memory, part) in [
        ("8T,prealloc=on", "the host has only"),
        ("64M,policy=bind,host-nodes=99", "host-nodes:"),
        (
            "65M,hugepages=on,hugepage-size=2M",
            "not a multiple of the size of a huge page",
        ),
    ] {
        let arguments = [
            "run",
            "--incoming",
            "defer",
            "--serial",
            "none",
            "--memory",
            memory,
        ];
        let log = dir.path().join("log");
        let mut process =
            guest_tests::driver::process::Process::spawn(crate::harness::ferry(), arguments, &log)
                .unwrap();
        if !memory.contains("prealloc") {
            // Only a guest that is there needs it.
            drop(process);
            let kernel = dir.path().join("kernel");
            std::fs::write(&kernel, guest_tests::DIRTIER).unwrap();
            let kernel = kernel.display().to_string();
            let arguments = [
                "run", "--kernel", &kernel, "--serial", "none", "--memory", memory,
            ];
            process = guest_tests::driver::process::Process::spawn(
                crate::harness::ferry(),
                arguments,
                &log,
            )
            .unwrap();
        }
        let status = process.wait(crate::harness::PATIENCE).unwrap().unwrap();
        assert!(!status.success());
        let output = process.output();
        assert!(output.contains(part), "{memory}: {output}");
    }
}
