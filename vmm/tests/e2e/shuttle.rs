//! Guests that go to and fro between two hosts, with something going on at every device. For disks
//! on shared storage see `disk::moving`.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

use devices::image::{Cache, Format, Image};
use guest_tests::mmio::Wait;
use guest_tests::{Size, VIRTIO, disk, net, virtio};
use serde_json::{Value, json};

use crate::frames::{FrameProxy, Then, kind};
use crate::harness::{Ferry, Guest, PATIENCE, require_kvm, scratch};
use crate::net::{in_a_network, net_guest, with_tap};

const HOPS: usize = 20;

pub const MEMORY: u64 = 64 << 20;

/// The name of the process after so many hops.
fn host(hop: usize) -> String {
    format!(
        "{}{hop}",
        if hop.is_multiple_of(2) {
            "here"
        } else {
            "there"
        }
    )
}

/// Moves a guest to a process that waits for it, and ends this one.
fn move_to(mut source: Ferry, uri: &str, more: &Value) {
    let mut arguments = json!({ "uri": uri });
    if let (Some(all), Some(more)) = (arguments.as_object_mut(), more.as_object()) {
        all.extend(more.clone());
    }
    source.execute("migrate", arguments);
    source.wait_migrated("completed");
    source.quit();
}

/// rng, console and balloon.
pub fn virtio_guest(tick: u64) -> Guest<'static> {
    let options = virtio::Options {
        interval: 20,
        tick,
        wait: Wait::Irq,
        ..virtio::Options::default()
    };
    Guest::new(VIRTIO, "64M", options)
}

/// What a status says that a test looks at.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub rng_requests: u64,
    pub console_received: u64,
    pub console_sent: u64,
    pub ticks: u64,
    pub balloon_target: u64,
    pub balloon_actual: u64,
}

/// Waits for a status that `reached` takes. Nothing was wrong until then, and no interrupt was lost.
pub fn until(ferry: &Ferry, reached: impl Fn(&Seen) -> bool) -> Seen {
    ferry.wait_line(|line| match virtio::Report::parse(line)? {
        virtio::Report::Error { .. } => panic!("{line}"),
        virtio::Report::Status {
            rng_requests,
            console_received,
            console_sent,
            ticks,
            balloon_target,
            balloon_actual,
            errors,
            lost_interrupts,
            ..
        } => {
            assert_eq!((errors, lost_interrupts), (0, 0), "{line}");
            let seen = Seen {
                rng_requests,
                console_received,
                console_sent,
                ticks,
                balloon_target,
                balloon_actual,
            };
            reached(&seen).then_some(seen)
        }
        virtio::Report::Ready { .. } | virtio::Report::Verified { .. } => None,
    })
}

/// One end of the virtio console: what it hears until the process ends.
pub struct ConsoleEnd {
    pub stream: UnixStream,
    pub hears: JoinHandle<String>,
}

impl ConsoleEnd {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        let mut from = stream.try_clone().unwrap();
        let hears = std::thread::spawn(move || {
            let mut text = String::new();
            from.read_to_string(&mut text).unwrap();
            text
        });
        Self { stream, hears }
    }
}

#[test]
fn rng_console_and_balloon() {
    require_kvm!();
    let dir = scratch();
    let console = |hop: usize| dir.path().join(format!("c{hop}"));
    let option = |hop: usize| format!("unix:{}", console(hop).display());
    let first = ["--rng", "--balloon", "--console", &option(0), "--paused"];
    let mut ferry = Ferry::run(dir.path(), &host(0), &virtio_guest(500), &first);
    let mut end = ConsoleEnd::connect(&console(0));
    ferry.execute("cont", Value::Null);
    let (mut sent, mut heard) = (String::new(), String::new());
    let mut seen = until(&ferry, |seen| seen.rng_requests > 0);
    for hop in 1..=HOPS {
        // Letters, which a tick has not: what comes back can be told from it.
        let words: String = (0..300).map(|n| format!("[{hop}:{n}]")).collect();
        let words: String = words.bytes().map(|byte| char::from(byte + 0x11)).collect();
        end.stream.write_all(words.as_bytes()).unwrap();
        sent += &words;
        let all = sent.len() as u64;
        let pages = if hop.is_multiple_of(2) { 0 } else { 2_000 };
        until(&ferry, |seen| seen.console_received == all);
        // It may still be sending it back, and it works on the balloon, when it moves.
        ferry.execute("balloon", json!({ "value": MEMORY - pages * 4096 }));
        let arguments = ["--console", &option(hop)];
        let (next, uri) = Ferry::incoming_with(dir.path(), &host(hop), &arguments);
        let next_end = ConsoleEnd::connect(&console(hop));
        move_to(ferry, &uri, &Value::Null);
        heard += &end.hears.join().unwrap();
        (ferry, end) = (next, next_end);
        let before = seen;
        seen = until(&ferry, |seen| {
            seen.rng_requests > before.rng_requests + 20
                && seen.ticks > before.ticks + 20
                && (seen.balloon_target, seen.balloon_actual) == (pages, pages)
        });
    }
    // What is on its way comes before the end.
    let ticks = |seen: &Seen| {
        (1..=seen.ticks)
            .map(|n| format!("tick {n}\n").len() as u64)
            .sum::<u64>()
    };
    until(&ferry, |seen| {
        seen.console_sent + 200 > sent.len() as u64 + ticks(seen)
    });
    ferry.quit();
    heard += &end.hears.join().unwrap();
    let is_ours = |byte: &char| !byte.is_ascii_digit() && !"tick \n".contains(*byte);
    let (echoed, ticked): (String, String) = heard.chars().partition(is_ours);
    assert!(
        echoed == sent,
        "{} bytes of {} came back",
        echoed.len(),
        sent.len()
    );
    let last = ticked.lines().count();
    let expected: String = (1..=last + 1)
        .map(|number| format!("tick {number}\n"))
        .collect();
    assert!(
        last > 20 * HOPS && expected.starts_with(&ticked),
        "{last} ticks"
    );
}

#[test]
fn a_disk_that_travels_along() {
    require_kvm!();
    const CAPACITY: u64 = 16 << 20;
    let dir = scratch();
    let path = |hop: usize| dir.path().join(format!("disk{}", hop % 2));
    for (hop, format) in [Format::Raw, Format::Qcow2].into_iter().enumerate() {
        Image::create(&path(hop), format, CAPACITY, None, Cache::Writeback).unwrap();
    }
    let drive = |hop: usize| {
        let format = if hop.is_multiple_of(2) {
            "raw"
        } else {
            "qcow2"
        };
        format!("file={},format={format},id=d", path(hop).display())
    };
    let options = disk::Options {
        area: Size(CAPACITY),
        max: Size(64 << 10),
        writes: 45,
        discards: 4,
        zeroes: 4,
        flush: 16,
        interval: 50,
        rate: guest_tests::dirtier::Rate::PerSecond(2_000),
        holds: disk::Holds::Zero,
        wait: Wait::Irq,
        ..disk::Options::default()
    };
    let guest = Guest::new(guest_tests::DISK, "64M", options);
    let mut ferry = Ferry::run(dir.path(), &host(0), &guest, &["--disk", &drive(0)]);
    let mut done = 0;
    let more = |ferry: &Ferry, than: u64| {
        ferry.wait_line(|line| match disk::Report::parse(line)? {
            disk::Report::Status {
                reads,
                writes,
                flushes,
                errors,
                io_errors,
                lost_interrupts,
                ..
            } => {
                assert_eq!((errors, io_errors, lost_interrupts), (0, 0, 0), "{line}");
                let done = reads + writes + flushes;
                (done > than).then_some(done)
            }
            disk::Report::Ready { .. } | disk::Report::Disk { .. } => None,
            _ => panic!("{line}"),
        })
    };
    for hop in 1..=HOPS {
        done = more(&ferry, done + 100);
        let (next, uri) = Ferry::incoming_with(dir.path(), &host(hop), &["--disk", &drive(hop)]);
        move_to(ferry, &uri, &json!({ "blk": true }));
        ferry = next;
    }
    more(&ferry, done + 100);
    ferry.serial.send(&[disk::command::FINISH]).unwrap();
    let errors = ferry.wait_line(|line| match disk::Report::parse(line)? {
        disk::Report::Verified {
            errors, io_errors, ..
        } => Some((errors, io_errors)),
        disk::Report::Status { .. } => None,
        _ => panic!("{line}"),
    });
    assert_eq!(errors, (0, 0));
}

#[test]
fn a_network_card() {
    require_kvm!();
    if !in_a_network() {
        return;
    }
    let dir = scratch();
    let socket = UdpSocket::bind("10.0.0.1:9000").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let options: net::Options =
        net::Options::parse("to=10.0.0.1:9000 every=2000 wait=irq interval=20").unwrap();
    let [option, tap] = with_tap("tap0");
    let mut ferry = Ferry::run(dir.path(), &host(0), &net_guest(&options), &[&option, &tap]);
    // By their numbers, after how many hops they came.
    let mut came = BTreeMap::new();
    let mut hear = |count: usize, hop: usize| {
        let mut buffer = [0; 2048];
        for _ in 0..count {
            let len = socket.recv(&mut buffer).expect("the guest sends no more");
            let number = net::Numbered::parse(&buffer[..len]).unwrap().number;
            assert_eq!(came.insert(number, hop), None, "{number} came twice");
        }
        came.clone()
    };
    let status = |ferry: &Ferry| {
        ferry.wait_line(|line| match net::Report::parse(line)? {
            net::Report::Status {
                errors,
                lost_interrupts,
                ..
            } => {
                assert_eq!((errors, lost_interrupts), (0, 0), "{line}");
                Some(())
            }
            _ => None,
        });
    };
    hear(50, 0);
    for hop in 1..=HOPS {
        let tap = format!("tap,ifname=tap{}", hop % 2);
        let (next, uri) = Ferry::incoming_with(dir.path(), &host(hop), &["--net", &tap]);
        move_to(ferry, &uri, &Value::Null);
        ferry = next;
        status(&ferry);
        hear(50, hop);
    }
    let came = hear(50, HOPS);
    // A datagram that is lost was sent while the guest changed its tap.
    let numbers: Vec<_> = came.keys().copied().collect();
    let gaps: Vec<_> = numbers
        .windows(2)
        .filter(|pair| pair[1] != pair[0] + 1)
        .map(|pair| (pair[0], pair[1] - pair[0] - 1))
        .collect();
    let lost: u64 = gaps.iter().map(|(_, lost)| lost).sum();
    assert!(
        gaps.len() <= HOPS,
        "{lost} of {} lost: {gaps:?}",
        numbers.len()
    );
}

/// An interrupt that is raised right before a stop may be injected after it.
#[test]
fn no_interrupt_is_lost_by_stops_and_migrations_that_fail() {
    require_kvm!();
    let dir = scratch();
    let devices = ["--rng", "--balloon", "--console", "none"];
    let mut ferry = Ferry::run(dir.path(), "here", &virtio_guest(300), &devices);
    let mut seen = until(&ferry, |seen| seen.rng_requests > 0);
    for round in 0..100 {
        let pages = if round % 2 == 0 { 500 } else { 0 };
        ferry.execute("balloon", json!({ "value": MEMORY - pages * 4096 }));
        ferry.execute("stop", Value::Null);
        ferry.execute("cont", Value::Null);
    }
    let later = |seen: Seen| move |now: &Seen| now.rng_requests > seen.rng_requests + 30;
    seen = until(&ferry, later(seen));
    for round in 0..HOPS {
        let (mut destination, uri) = Ferry::incoming(dir.path(), &format!("d{round}"));
        // After the stop: the destination has all of the guest, but not the word.
        let proxy = FrameProxy::to(&uri, Some((kind::READY, 0, Then::Cut)));
        ferry.migrate(&proxy.uri);
        proxy.wait_reached();
        ferry.wait_migrated("failed");
        ferry.wait_status("running");
        destination.wait_exit();
        seen = until(&ferry, later(seen));
    }
    // A lost interrupt is one after a second.
    until(&ferry, |now| now.rng_requests > seen.rng_requests + 1_500);
}
