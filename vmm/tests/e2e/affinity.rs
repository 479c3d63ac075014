//! Which CPUs threads run on.

use std::collections::BTreeMap;

use serde_json::json;

use crate::harness::{Ferry, Guest, busy, require_kvm, scratch, skip};

/// The CPUs of each thread of a process, by the thread's name.
fn cpus(ferry: &Ferry) -> BTreeMap<String, String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", ferry.process.id())).unwrap();
    let of = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim().to_owned()
    };
    tasks
        // A thread may end meanwhile.
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
        .map(|status| (of(&status, "Name:"), of(&status, "Cpus_allowed_list:")))
        .collect()
}

#[test]
fn threads_run_where_they_were_put() {
    require_kvm!();
    let available = rustix::thread::sched_getaffinity(None).unwrap();
    if !(available.is_set(0) && available.is_set(1)) {
        return skip("CPUs 0 and 1");
    }
    let dir = scratch();
    let guest = Guest::dirtier("128M", busy());
    let affinity = [
        "--cpu-affinity",
        "0@1,io@0",
        "--cpu-affinity",
        "migration@1",
        "--rng",
    ];
    let mut source = Ferry::run(dir.path(), "src", &guest, &affinity);
    let (mut there, uri) = Ferry::incoming_with(
        dir.path(),
        "dst",
        &["--cpu-affinity", "0@0,io@1,migration@0", "--rng"],
    );
    let seen = cpus(&source);
    assert_eq!(seen["vcpu0"], "1", "{seen:?}");
    assert_eq!(seen["ferry"], "0", "{seen:?}");
    assert_eq!(seen["virtio-rng"], "0", "{seen:?}");
    assert_eq!(cpus(&there)["incoming"], "0");

    source.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 1 << 20 }),
    );
    source.migrate(&uri);
    source.wait_migration("transfer", |info| info["status"] == "active");
    assert_eq!(cpus(&source)["migration"], "1");
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }));
    source.wait_migrated("completed");
    there.wait_heartbeats(20);
    // The machine was built by a thread of the migration.
    let seen = cpus(&there);
    assert_eq!(seen["vcpu0"], "0", "{seen:?}");
    assert_eq!(seen["virtio-rng"], "1", "{seen:?}");
    there.verify();
}

#[test]
fn nothing_is_pinned_that_was_not_named() {
    require_kvm!();
    let dir = scratch();
    let guest = Guest {
        smp: 2,
        ..crate::guests::state_guest()
    };
    let ours = cpus(&Ferry::run(dir.path(), "none", &guest, &[]));
    let all = &ours["vcpu0"];
    assert!(ours.values().all(|cpus| cpus == all), "{ours:?}");
    let first = all.split(['-', ',']).next().unwrap();
    let one = format!("0@{first}");
    let one = cpus(&Ferry::run(
        dir.path(),
        "one",
        &guest,
        &["--cpu-affinity", &one],
    ));
    assert_eq!(one["vcpu0"], first);
    assert_eq!(one["vcpu1"], *all);
    assert_eq!(one["ferry"], *all);
}

#[test]
fn what_cannot_be_is_refused_at_the_start() {
    require_kvm!();
    let dir = scratch();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, guest_tests::DIRTIER).unwrap();
    let kernel = kernel.display().to_string();
    for (affinity, part) in [
        (
            "0@1000",
            "vCPU 0 can't run on CPU 1000: this process may use",
        ),
        ("3@0", "names vCPU 3, but the guest has 1"),
    ] {
        let options = ["--serial", "none", "--cpu-affinity", affinity];
        let arguments = [&["run", "--kernel", &kernel], &options[..]].concat();
        let log = dir.path().join("log");
        let ferry = crate::harness::ferry();
        let process = guest_tests::driver::process::Process::spawn(ferry, &arguments, &log);
        let mut process = process.unwrap();
        let status = process.wait(crate::harness::PATIENCE).unwrap().unwrap();
        assert!(!status.success());
        let output = process.output();
        assert!(output.contains(part), "{affinity}: {output}");
    }
}
