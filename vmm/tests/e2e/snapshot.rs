//! Guests that are saved to a file and loaded from it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use guest_tests::disk::{self, Holds};
use guest_tests::driver::process::Process;
use guest_tests::{Size, image};
use serde_json::{Value, json};

use crate::harness::{Ferry, Guest, PATIENCE, busy, ferry, require_kvm, scratch};

/// A process that has loaded the guest and does not run it yet: its serial port keeps nothing.
fn load(dir: &Path, name: &str, uri: &str, more: &[&str]) -> Ferry {
    let mut arguments = vec!["--incoming", uri, "--paused"];
    arguments.extend_from_slice(more);
    let mut loaded = Ferry::start(dir, name, &arguments);
    loaded.wait_migrated("completed");
    assert_eq!(loaded.status(), "paused");
    loaded
}

fn uri(dir: &Path) -> String {
    format!("file:{}", dir.join("snapshot").display())
}

#[test]
fn a_working_guest_goes_on_in_another_process() {
    require_kvm!();
    let dir = scratch();
    let uri = uri(dir.path());
    let mut source = Ferry::run_dirtier(dir.path(), "src", "128M", busy());
    source.wait_heartbeats(100);
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    assert_eq!(source.status(), "postmigrate");
    assert_eq!(info["ram"]["total"], 128 << 20);
    assert_eq!(info["ram"]["remaining"], 0);
    assert!(info["ram"]["normal"].as_u64().unwrap() >= 64 << 8);

    let mut loaded = load(dir.path(), "dst", &uri, &[]);
    assert_eq!(loaded.serial.heartbeats().count, 0);
    loaded.execute("cont", Value::Null);
    loaded.wait_heartbeats(100);
    loaded.verify();

    // Nobody took it away from here: it may run on too, and be saved again.
    source.execute("cont", Value::Null);
    source.wait_heartbeats(100);
    source.verify();
    source.migrate(&uri);
    source.wait_migrated("completed");
    let mut again = load(dir.path(), "again", &uri, &[]);
    again.execute("cont", Value::Null);
    again.verify();
}

#[test]
fn a_guest_runs_after_loading_only_if_it_ran_before() {
    require_kvm!();
    let dir = scratch();
    let uri = uri(dir.path());
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", small());
    source.execute("stop", Value::Null);
    source.migrate(&uri);
    source.wait_migrated("completed");
    let mut loaded = Ferry::start(dir.path(), "paused", &["--incoming", &uri]);
    loaded.wait_status("paused");
    loaded.execute("cont", Value::Null);
    loaded.wait_heartbeats(50);
    loaded.verify();

    source.execute("cont", Value::Null);
    source.migrate(&uri);
    source.wait_migrated("completed");
    let mut loaded = Ferry::start(dir.path(), "running", &["--incoming", "defer"]);
    let channels = json!([{
        "channel-type": "main",
        "addr": { "transport": "file", "filename": uri.strip_prefix("file:"), "offset": 0 },
    }]);
    loaded.execute("migrate-incoming", json!({ "channels": channels }));
    loaded.wait_status("running");
    loaded.wait_heartbeats(50);
    loaded.verify();
}

#[test]
fn a_disk_is_as_the_guest_left_it() {
    require_kvm!();
    let dir = scratch();
    let uri = uri(dir.path());
    let path = dir.path().join("image");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let options = disk::Options {
        holds: Holds::Zero,
        // What is discarded may hold anything.
        discards: 0,
        area: Size(8 << 20),
        interval: 20,
        ..disk::Options::default()
    };
    let guest = Guest::new(guest_tests::DISK, "64M", options);
    let option = format!("file={},format=raw", path.display());
    let mut source = Ferry::run(dir.path(), "src", &guest, &["--disk", &option]);
    let wrote = |ferry: &Ferry, enough| {
        ferry.wait_line(|line| match disk::Report::parse(line)? {
            disk::Report::Status { writes, .. } => (writes > enough).then_some(()),
            disk::Report::Error { .. } | disk::Report::IoError { .. } => panic!("{line}"),
            _ => None,
        });
    };
    wrote(&source, 100);
    source.migrate(&uri);
    source.wait_migrated("completed");

    let mut loaded = load(dir.path(), "dst", &uri, &["--disk", &option]);
    loaded.execute("cont", Value::Null);
    // The disk is in use there.
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("lock"), "{refusal}");
    wrote(&loaded, 500);
    loaded.serial.send(&[disk::command::FINISH]).unwrap();
    let verified = loaded.wait_line(|line| {
        disk::Report::parse(line).filter(|report| matches!(report, disk::Report::Verified { .. }))
    });
    let right = matches!(
        verified,
        disk::Report::Verified {
            errors: 0,
            io_errors: 0,
            unknown: 0,
            ..
        }
    );
    assert!(right, "{verified}");
    let found = image::read_reported(&mut File::open(&path).unwrap(), &verified).unwrap();
    assert!(found.agrees_with(&verified), "{found:?}; {verified}");
}

#[test]
fn a_file_that_cannot_be_is_refused_with_its_reason() {
    require_kvm!();
    let dir = scratch();
    let uri = uri(dir.path());
    let path = dir.path().join("snapshot");
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", small());
    source.migrate(&uri);
    source.wait_migrated("completed");

    let ends_with = |what: &str| {
        let arguments = [
            "run",
            "--serial",
            "none",
            "--monitor",
            "none",
            "--incoming",
            &uri,
        ];
        let log = dir.path().join("refused.log");
        let mut process = Process::spawn(ferry(), arguments, &log).unwrap();
        let status = process.wait(PATIENCE).unwrap().expect("it does not end");
        let output = process.output();
        assert!(
            !status.success() && output.contains(what),
            "{what}: {output}"
        );
    };
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    // A page that the guest's own program is in.
    let page = 4096 + (1 << 20);
    let mut byte = [0];
    file.read_exact_at(&mut byte, page).unwrap();
    file.write_all_at(&[!byte[0]], page).unwrap();
    ends_with("the page of memory at 0x100000 doesn't match its checksum");
    file.write_all_at(&byte, page).unwrap();
    file.set_len(len - 1).unwrap();
    ends_with("it was cut off");
    let mut waiting = Ferry::start(dir.path(), "dst", &["--incoming", "defer"]);
    let refusal = waiting.refused("migrate-incoming", json!({ "uri": uri }));
    assert!(refusal.contains("it was cut off"), "{refusal}");
    assert_eq!(waiting.status(), "inmigrate");
    file.write_all_at(b"\x7fELF", 0).unwrap();
    ends_with("is no snapshot of Ferry's: it is an ELF file");
    std::fs::remove_file(&path).unwrap();
    ends_with("No such file");
}

#[test]
fn a_guest_that_cannot_be_saved_runs_on() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run_dirtier(dir.path(), "src", "64M", small());
    source.migrate(&format!("file:{}/missing/snapshot", dir.path().display()));
    let info = source.wait_migrated("failed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(reason.contains("No such file"), "{reason}");
    let refusal = source.refused("migrate", json!({ "uri": "file:a,offset=4096" }));
    assert!(refusal.contains("offset"), "{refusal}");
    let refusal = source.refused("migrate", json!({ "uri": "file:a", "blk": true }));
    assert!(
        refusal.contains("disks can't travel in a file"),
        "{refusal}"
    );
    // Slowly, so that there is time to cancel.
    source.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 1 << 20 }),
    );
    source.migrate(&uri(dir.path()));
    source.wait_migration("some memory", |info| info["status"] == "active");
    source.execute("migrate_cancel", Value::Null);
    source.wait_migrated("cancelled");
    source.wait_heartbeats(50);
    source.verify();
    source.quit();
    let left = std::fs::read_dir(dir.path()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        !left
            .iter()
            .any(|name| name.to_string_lossy().contains("snapshot")),
        "{left:?}"
    );
}

fn small() -> guest_tests::dirtier::Options {
    guest_tests::dirtier::Options {
        fill: Size(8 << 20),
        ws: Size(2 << 20),
        ..busy()
    }
}
