//! The virtio console: its back ends, and its bytes in a migration.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use guest_tests::VIRTIO;
use guest_tests::mmio::Wait;
use guest_tests::virtio::{Options, Report};

use crate::harness::{Ferry, Guest, PATIENCE, require_kvm, scratch};

fn guest(tick: u64, wait: Wait) -> Guest<'static> {
    let options = Options {
        interval: 20,
        tick,
        wait,
        ..Options::default()
    };
    Guest::new(VIRTIO, "64M", options)
}

/// Waits for a status that `reached` takes; nothing may be wrong until then.
fn until(ferry: &Ferry, reached: impl Fn(&Report) -> bool) {
    ferry.wait_line(|line| {
        let report = Report::parse(line)?;
        assert!(!matches!(report, Report::Error { .. }), "{line}");
        reached(&report).then_some(())
    });
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// What is sent comes back.
fn echo(path: &Path) {
    let sent: Vec<u8> = (0..100_000u32)
        .map(|index| (index.wrapping_mul(index) >> 3) as u8)
        .collect();
    let mut stream = connect(path);
    let mut echoed = vec![0; sent.len()];
    std::thread::scope(|scope| {
        let mut writer = stream.try_clone().unwrap();
        let sent = &sent;
        scope.spawn(move || writer.write_all(sent).unwrap());
        stream.read_exact(&mut echoed).unwrap();
    });
    assert!(sent == echoed);
}

#[test]
fn what_is_sent_to_the_guest_comes_back_before_and_after_a_migration() {
    require_kvm!();
    for wait in [Wait::Poll, Wait::Irq] {
        let dir = scratch();
        let at = |name: &str| dir.path().join(name);
        let option = |name: &str| format!("unix:{}", at(name).display());
        let (here, there) = (option("ca"), option("cb"));
        let mut source = Ferry::run(dir.path(), "src", &guest(0, wait), &["--console", &here]);
        until(&source, |report| {
            matches!(report, Report::Ready { console: true, .. })
        });
        echo(&at("ca"));
        let uri = option("m");
        let arguments = ["--incoming", &uri, "--console", &there];
        let destination = Ferry::start(dir.path(), "dst", &arguments);
        source.migrate(&uri);
        source.wait_migrated("completed");
        echo(&at("cb"));
        until(&destination, |report| {
            matches!(
                *report,
                Report::Status {
                    console_received: 200_000,
                    ..
                }
            )
        });
    }
}

/// Each line comes at one of the two, and none at both.
#[test]
fn no_output_is_lost_or_doubled_on_the_way() {
    require_kvm!();
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let option = |name: &str| format!("unix:{}", at(name).display());
    let (here, there) = (option("ca"), option("cb"));
    let more = ["--console", &*here, "--paused"];
    let mut source = Ferry::run(dir.path(), "src", &guest(200, Wait::Irq), &more);
    let mut before = connect(&at("ca"));
    source.execute("cont", serde_json::Value::Null);
    until(
        &source,
        |report| matches!(*report, Report::Status { ticks, .. } if ticks > 500),
    );
    let uri = option("m");
    let arguments = ["--incoming", &uri, "--console", &there, "--paused"];
    let mut destination = Ferry::start(dir.path(), "dst", &arguments);
    let mut after = connect(&at("cb"));
    source.migrate(&uri);
    source.wait_migrated("completed");
    destination.wait_status("paused");
    destination.execute("cont", serde_json::Value::Null);
    until(
        &destination,
        |report| matches!(*report, Report::Status { ticks, .. } if ticks > 2000),
    );
    source.execute("quit", serde_json::Value::Null);
    let mut text = String::new();
    before.read_to_string(&mut text).unwrap();
    let expected: String = (1..=2000)
        .map(|number| format!("tick {number}\n"))
        .collect();
    assert!(
        expected.starts_with(&text),
        "the end: {:?}",
        text.lines().last()
    );
    let mut rest = vec![0; expected.len() - text.len()];
    after.read_exact(&mut rest).unwrap();
    assert_eq!(text + std::str::from_utf8(&rest).unwrap(), expected);
}

#[test]
fn a_guest_brings_a_console_that_is_connected_to_nothing() {
    require_kvm!();
    let dir = scratch();
    let log = dir.path().join("log");
    let file = format!("file:{}", log.display());
    let source = Ferry::run(
        dir.path(),
        "src",
        &guest(500, Wait::Poll),
        &["--console", &file],
    );
    until(
        &source,
        |report| matches!(*report, Report::Status { ticks, .. } if ticks > 100),
    );
    let (destination, _) = source.move_on(dir.path(), "dst");
    until(
        &destination,
        |report| matches!(*report, Report::Status { ticks, .. } if ticks > 1000),
    );
    let text = std::fs::read_to_string(log).unwrap();
    assert!(text.starts_with("tick 1\ntick 2\n"), "{text}");
}
