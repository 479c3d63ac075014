//! The memory balloon: its commands, its guest, and both in a migration.

use guest_tests::VIRTIO;
use guest_tests::driver::hugepages::HugePages;
use guest_tests::driver::qmp::QmpError;
use guest_tests::virtio::{Options, Report, command};
use serde_json::{Value, json};

use crate::harness::{Ferry, Guest, PATIENCE, require_kvm, scratch, skip};

const MEMORY: u64 = 128 << 20;

fn guest() -> Guest<'static> {
    let options = Options {
        interval: 20,
        ..Options::default()
    };
    Guest::new(VIRTIO, "128M", options)
}

/// Waits for a status that `reached` takes; nothing may be wrong until then.
fn until(ferry: &Ferry, reached: impl Fn(&Report) -> bool) {
    ferry.wait_line(|line| {
        let report = Report::parse(line)?;
        assert!(!matches!(report, Report::Error { .. }), "{line}");
        reached(&report).then_some(())
    });
}

/// Has the guest put so many pages into the balloon.
fn inflate(ferry: &mut Ferry, pages: u64) {
    ferry.execute("balloon", json!({ "value": MEMORY - pages * 4096 }));
    until(ferry, |report| {
        matches!(*report, Report::Status { balloon_target, balloon_actual, .. }
            if balloon_target == pages && balloon_actual == pages)
    });
}

fn actual(ferry: &mut Ferry) -> u64 {
    ferry.execute("query-balloon", Value::Null)["actual"]
        .as_u64()
        .unwrap()
}

/// The memory of a process that is no file's, in bytes.
fn resident(ferry: &Ferry) -> u64 {
    let path = format!("/proc/{}/status", ferry.process.id());
    let status = std::fs::read_to_string(path).unwrap();
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap()
    };
    (kib("RssAnon:") + kib("RssShmem:")) << 10
}

#[test]
fn shared_memory_goes_back_too_and_huge_pages_stay() {
    require_kvm!();
    let dir = scratch();
    let guest = Guest {
        memory: "128M,shared=on",
        ..guest()
    };
    let mut ferry = Ferry::run(dir.path(), "a", &guest, &["--balloon"]);
    inflate(&mut ferry, 16_000);
    inflate(&mut ferry, 0);
    let full = resident(&ferry);
    inflate(&mut ferry, 16_000);
    let less = resident(&ferry);
    let dropped = full.saturating_sub(less);
    assert!(dropped > 15_000 * 4096, "{full} bytes, then {less}");
    ferry.quit();

    let _pages = match HugePages::reserve(64) {
        Ok(pages) => pages,
        Err(error) => return skip(&format!("in part: huge pages: {error}")),
    };
    let guest = Guest {
        memory: "128M,hugepage-size=2M",
        ..guest
    };
    let mut ferry = Ferry::run(dir.path(), "huge", &guest, &["--balloon"]);
    inflate(&mut ferry, 16_000);
    inflate(&mut ferry, 0);
    let output = ferry.process.output();
    assert!(!output.contains("WARN"), "{output}");
}

#[test]
fn the_host_gets_memory_back_and_the_guest_takes_it_again() {
    require_kvm!();
    let dir = scratch();
    let mut ferry = Ferry::run(dir.path(), "a", &guest(), &["--balloon"]);
    until(&ferry, |report| {
        matches!(
            report,
            Report::Ready {
                balloon: true,
                rng: false,
                console: false,
                ..
            }
        )
    });
    assert_eq!(actual(&mut ferry), MEMORY);
    // The guest writes to what it takes back: then it takes room here.
    inflate(&mut ferry, 16_000);
    inflate(&mut ferry, 0);
    let full = resident(&ferry);
    inflate(&mut ferry, 16_000);
    let less = resident(&ferry);
    let dropped = full.saturating_sub(less);
    assert!(dropped > 15_000 * 4096, "{full} bytes, then {less}");
    assert_eq!(actual(&mut ferry), MEMORY - 16_000 * 4096);
    let event = ferry.qmp.wait_event("BALLOON_CHANGE", PATIENCE).unwrap();
    assert!(event.data["actual"].as_u64().unwrap() <= MEMORY);
    let info = json!({ "command-line": "info balloon" });
    let shown = ferry.execute("human-monitor-command", info);
    assert_eq!(shown, json!("balloon: actual=65\n"));
    let set = json!({ "command-line": "balloon 100" });
    assert_eq!(ferry.execute("human-monitor-command", set), json!(""));
    let pages = 28 << 8;
    until(
        &ferry,
        |report| matches!(*report, Report::Status { balloon_actual, .. } if balloon_actual == pages),
    );
    let refusal = ferry.refused("balloon", json!({ "value": 0 }));
    assert_eq!(refusal, "Parameter 'value' expects a size");
}

#[test]
fn a_full_balloon_moves_and_is_emptied_there() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run(dir.path(), "src", &guest(), &["--balloon", "--rng"]);
    inflate(&mut source, 16_000);
    inflate(&mut source, 0);
    inflate(&mut source, 12_000);
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    let normal = info["ram"]["normal"].as_u64().unwrap();
    assert!(normal < 32768 - 12_000, "{normal} pages were sent");
    let refusal = source.refused("balloon", json!({ "value": MEMORY }));
    assert!(refusal.contains("at the destination"), "{refusal}");
    assert_eq!(actual(&mut destination), MEMORY - 12_000 * 4096);
    destination.serial.send(&[command::STATUS]).unwrap();
    inflate(&mut destination, 1_000);
    inflate(&mut destination, 14_000);
    inflate(&mut destination, 0);
    assert_eq!(actual(&mut destination), MEMORY);
}

/// Pages go into and out of the balloon all the time, also while they are being sent.
#[test]
fn a_balloon_that_moves_while_it_is_inflated_and_deflated() {
    require_kvm!();
    let dir = scratch();
    let mut source = Ferry::run(dir.path(), "src", &guest(), &["--balloon"]);
    inflate(&mut source, 20_000);
    let (mut destination, uri) = Ferry::incoming(dir.path(), "dst");
    source.execute("balloon", json!({ "value": MEMORY }));
    source.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 64 << 20 }),
    );
    source.migrate(&uri);
    source.execute("balloon", json!({ "value": MEMORY - 20_000 * 4096 }));
    source.wait_migrated("completed");
    until(&destination, |report| {
        matches!(
            *report,
            Report::Status {
                balloon_actual: 20_000,
                ..
            }
        )
    });
    inflate(&mut destination, 0);
}

#[test]
fn without_a_balloon_its_commands_are_refused() {
    require_kvm!();
    let dir = scratch();
    let mut ferry = Ferry::run(dir.path(), "a", &guest(), &["--rng"]);
    for (name, arguments) in [
        ("query-balloon", Value::Null),
        ("balloon", json!({ "value": MEMORY })),
    ] {
        match ferry.qmp.execute(name, arguments) {
            Err(QmpError::Command { class, desc, .. }) => {
                assert_eq!(class, "DeviceNotActive");
                assert_eq!(desc, "No balloon device has been activated");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn both_sides_must_have_the_same_balloon() {
    require_kvm!();
    let dir = scratch();
    let options = "free-page-hint=off,deflate-on-oom=off";
    let mut source = Ferry::run(dir.path(), "src", &guest(), &["--balloon", options]);
    until(&source, |report| matches!(report, Report::Ready { .. }));
    for (given, part) in [
        (&["--balloon"][..], "deflate-on-oom=off\" at the source"),
        (
            &["--balloon", options, "--console", "none"],
            "--console is given",
        ),
    ] {
        let uri = format!("unix:{}", dir.path().join("m").display());
        let mut arguments = vec!["--incoming", &uri];
        arguments.extend(given);
        let mut destination = Ferry::start(dir.path(), "dst", &arguments);
        source.migrate(&uri);
        let info = source.wait_migrated("failed");
        let error = info["error-desc"].as_str().unwrap();
        assert!(error.contains(part), "{error}");
        destination.wait_exit();
    }
    let uri = format!("unix:{}", dir.path().join("m").display());
    let arguments = ["--incoming", &uri, "--balloon", options];
    let mut destination = Ferry::start(dir.path(), "dst2", &arguments);
    source.migrate(&uri);
    source.wait_migrated("completed");
    inflate(&mut destination, 100);
}
