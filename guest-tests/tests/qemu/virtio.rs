//! The guest that uses a virtio-rng, a virtio-console and a virtio-balloon.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use guest_tests::VIRTIO;
use guest_tests::mmio::Wait;
use guest_tests::virtio::{Options, Report};
use serde_json::json;

use crate::machine::{PATIENCE, Qemu, require_qemu, scratch, start};

const MEMORY: u64 = 128 << 20;

fn devices(console: &Path) -> Vec<String> {
    let console = format!("socket,id=c0,server=on,wait=off,path={}", console.display());
    [
        "-object",
        "rng-random,id=r0,filename=/dev/urandom",
        "-device",
        "virtio-rng-device,rng=r0",
        "-chardev",
        &console,
        "-device",
        "virtio-serial-device",
        "-device",
        "virtconsole,chardev=c0",
        "-device",
        "virtio-balloon-device",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Waits for a status that `reached` takes; nothing may be wrong until then.
fn until(machine: &Qemu, reached: impl Fn(&Report) -> bool) {
    machine.wait_for(|line| {
        let report = Report::parse(line)?;
        match report {
            Report::Error { .. } => panic!("{line}"),
            Report::Status {
                lost_interrupts, ..
            } => assert_eq!(lost_interrupts, 0, "{line}"),
            Report::Ready { .. } | Report::Verified { .. } => {}
        }
        reached(&report).then_some(())
    });
}

fn balloon(machine: &mut Qemu, pages: u64) {
    let value = MEMORY - pages * 4096;
    machine
        .qmp
        .execute("balloon", json!({ "value": value }))
        .unwrap();
    until(machine, |report| {
        matches!(*report, Report::Status { balloon_target, balloon_actual, .. }
            if balloon_target == pages && balloon_actual == pages)
    });
}

/// Uses everything.
fn exercise(machine: &mut Qemu, console: &Path) {
    until(machine, |report| {
        matches!(*report, Report::Status { rng_requests, rng_bytes, .. }
            if rng_requests > 50 && rng_bytes >= rng_requests * 16)
    });
    let mut stream = UnixStream::connect(console).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let sent: Vec<u8> = (0..100_000u32)
        .map(|index| (index.wrapping_mul(index) >> 3) as u8)
        .collect();
    let mut echoed = vec![0; sent.len()];
    std::thread::scope(|scope| {
        let mut writer = stream.try_clone().unwrap();
        let sent = &sent;
        scope.spawn(move || writer.write_all(sent).unwrap());
        stream.read_exact(&mut echoed).unwrap();
    });
    assert!(sent == echoed);
    for pages in [5000, 1234, 8000, 0] {
        balloon(machine, pages);
    }
}

#[test]
fn rng_console_and_balloon_work_before_and_after_a_migration() {
    let qemu = require_qemu!();
    for (wait, event_idx) in [(Wait::Poll, true), (Wait::Irq, true), (Wait::Irq, false)] {
        let dir = scratch();
        let at = |name: &str| dir.path().join(name);
        let options = Options {
            wait,
            event_idx,
            interval: 20,
            ..Options::default()
        };
        let append = options.to_string();
        let mut machine = start(&qemu, dir.path(), "a", VIRTIO, &append, &devices(&at("ca")));
        machine.cont();
        until(&machine, |report| {
            matches!(
                report,
                Report::Ready {
                    rng: true,
                    console: true,
                    balloon: true,
                    ..
                }
            )
        });
        exercise(&mut machine, &at("ca"));

        let uri = format!("unix:{}", at("migration").display());
        let mut incoming = devices(&at("cb"));
        incoming.extend(["-incoming".to_owned(), uri.clone()]);
        let mut destination = start(&qemu, dir.path(), "b", VIRTIO, &append, &incoming);
        machine
            .qmp
            .execute("migrate", json!({ "uri": uri }))
            .unwrap();
        machine.qmp.wait_event("STOP", PATIENCE).unwrap();
        destination.cont();
        exercise(&mut destination, &at("cb"));
    }
}

#[test]
fn ticks_come_in_order() {
    let qemu = require_qemu!();
    let dir = scratch();
    let console = dir.path().join("c");
    let options = Options {
        tick: 500,
        wait: Wait::Irq,
        ..Options::default()
    };
    let append = options.to_string();
    let mut machine = start(&qemu, dir.path(), "a", VIRTIO, &append, &devices(&console));
    let mut stream = UnixStream::connect(&console).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    machine.cont();
    let expected: String = (1..=500).map(|number| format!("tick {number}\n")).collect();
    let mut found = vec![0; expected.len()];
    stream.read_exact(&mut found).unwrap();
    assert_eq!(String::from_utf8(found).unwrap(), expected);
}
