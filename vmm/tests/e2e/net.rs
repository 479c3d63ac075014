//! Guests on the network, each test in a network namespace of its own.
#![allow(unsafe_code, reason = "only so can a thread have a namespace")]

mod pinged;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use guest_tests::NET;
use guest_tests::net::{Mac, Numbered, Options, Report};
use rustix::net::{AddressFamily, SocketFlags, SocketType, eth, socket_with, sockopt};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::json;

use crate::harness::{Ferry, Guest, PATIENCE, ferry, require_kvm, scratch, skip};

const MAC: &str = "52:54:00:aa:bb:01";
const GUEST: &str = "10.0.0.2";
const HOST: &str = "10.0.0.1";

/// Moves the calling thread, and what it starts, into a network of its own: the bridge `br0` with
/// the address 10.0.0.1 and the taps `tap0` and `tap1`. The kernel clears up after it.
pub fn in_a_network() -> bool {
    if !Path::new("/dev/net/tun").exists() {
        skip("there is no /dev/net/tun (modprobe tun)");
        return false;
    }
    // SAFETY: no file descriptor is concerned, and sockets that were opened before go on.
    if let Err(err) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
        skip(&format!("no network namespace ({err}): this takes root"));
        return false;
    }
    for line in [
        "link set lo up",
        "link add br0 type bridge",
        "addr add 10.0.0.1/24 dev br0",
        "tuntap add tap0 mode tap",
        "tuntap add tap1 mode tap",
        "link set tap0 master br0 up",
        "link set tap1 master br0 up",
        "link set br0 up",
    ] {
        match Command::new("ip").args(line.split(' ')).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                skip(&format!("ip {line}: {error}"));
                return false;
            }
            Err(err) => {
                skip(&format!("ip: {err} (package iproute2)"));
                return false;
            }
        }
    }
    true
}

/// Hears RARP on all interfaces from now on.
fn hear_rarp() -> File {
    let (family, kind) = (AddressFamily::PACKET, SocketType::RAW);
    let socket = socket_with(family, kind, SocketFlags::empty(), Some(eth::RARP)).unwrap();
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE)).unwrap();
    File::from(socket)
}

/// Whose frame comes next.
fn announced(rarp: &mut File) -> String {
    let mut frame = [0; 2048];
    let len = rarp.read(&mut frame).expect("no RARP frame comes");
    assert!(len >= 42, "{len}");
    assert_eq!(frame[..6], [0xff; 6]);
    let [a, b, c, d, e, f] = frame[6..12] else {
        unreachable!()
    };
    Mac([a, b, c, d, e, f]).to_string()
}

pub fn net_guest(options: &Options) -> Guest<'static> {
    Guest::new(NET, "64M", options)
}

pub fn with_tap(ifname: &str) -> [String; 2] {
    let net = format!("tap,ifname={ifname},mac={MAC}");
    ["--net".to_owned(), net]
}

/// Starts the guest with a card on this tap.
fn run_on(ifname: &str, dir: &Path, name: &str, more: &[&str]) -> Ferry {
    let [option, tap] = with_tap(ifname);
    let arguments = [&[&*option, &*tap], more].concat();
    Ferry::run(dir, name, &net_guest(&Options::default()), &arguments)
}

/// The same, and waits until its driver works.
fn run_ready(ifname: &str, dir: &Path, name: &str) -> Ferry {
    let ferry = run_on(ifname, dir, name, &[]);
    ferry.wait_line(|line| matches!(Report::parse(line), Some(Report::Ready { .. })).then_some(()));
    ferry
}

fn monitor(ferry: &mut Ferry, line: &str) -> String {
    let said = ferry.execute("human-monitor-command", json!({ "command-line": line }));
    said.as_str().unwrap().to_owned()
}

#[test]
fn what_is_wrong_with_a_tap_is_said() {
    require_kvm!();
    if !in_a_network() {
        return;
    }
    let dir = scratch();
    let holder = run_on("tap0", dir.path(), "holder", &["--paused"]);
    let kernel = dir.path().join("holder.elf");
    for (ifname, expected) in [
        ("tap0", "the tap tap0 is in use by another process"),
        ("br0", "the interface br0 is there, but is no tap"),
        ("a-name-that-is-too-long", "is no name of an interface"),
        ("a/b", "is no name of an interface"),
    ] {
        let output = Command::new(ferry())
            .args(["run", "--serial", "none", "--kernel"])
            .arg(&kernel)
            .args(with_tap(ifname))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{ifname}");
        assert!(said.contains(expected), "{ifname}: {said}");
    }
    drop(holder);
}

#[test]
fn a_guest_is_announced_on_demand() {
    require_kvm!();
    if !in_a_network() {
        return;
    }
    let dir = scratch();
    let mut rarp = hear_rarp();
    let more = ["--net", "tap,ifname=new%d"];
    let mut ferry = run_on("tap0", dir.path(), "a", &more);
    let ready = ferry.wait_line(|line| match Report::parse(line) {
        Some(Report::Ready { mac, .. }) => Some(mac),
        _ => None,
    });
    assert_eq!(ready.to_string(), MAC);
    let shown = monitor(&mut ferry, "info network");
    assert!(shown.contains(&format!("macaddr={MAC},link=up")), "{shown}");
    assert!(shown.contains("type=tap,ifname=tap0"), "{shown}");
    assert!(
        shown.contains("net1: index=1") && shown.contains("ifname=new0"),
        "{shown}"
    );

    ferry.execute(
        "announce-self",
        json!({ "rounds": 1, "interfaces": ["net0"] }),
    );
    assert_eq!(announced(&mut rarp), MAC);
    let count = |line: &str| match Report::parse(line) {
        Some(Report::Announced { count }) => Some(count),
        _ => None,
    };
    assert!(ferry.wait_line(count) >= 1, "the driver was asked as well");

    let unknown = ferry.refused("set_link", json!({ "name": "net7", "up": false }));
    assert_eq!(unknown, "Device 'net7' not found");
    ferry.execute("set_link", json!({ "name": "net0", "up": false }));
    let shown = monitor(&mut ferry, "info network");
    assert!(
        shown.contains(&format!("macaddr={MAC},link=down")),
        "{shown}"
    );
}

/// Sends a numbered datagram to the guest every 10 ms and collects what comes back.
pub fn echo(until: &AtomicBool, answers: &dyn Fn(u64)) -> u64 {
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.connect((GUEST, 7)).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut number = 0;
    while !until.load(Ordering::Relaxed) {
        number += 1;
        let numbered = Numbered { number, sent_us: 0 };
        // Without an answer to ARP there may be errors; the datagram is lost then.
        let _ = socket.send(&numbered.to_bytes());
        std::thread::sleep(Duration::from_millis(10));
        let mut buffer = [0; 2048];
        while let Ok(len) = socket.recv(&mut buffer) {
            answers(Numbered::parse(&buffer[..len]).unwrap().number);
        }
    }
    number
}

#[test]
fn a_guest_keeps_its_connections_when_it_moves() {
    require_kvm!();
    if !in_a_network() {
        return;
    }
    let dir = scratch();
    let mut source = run_ready("tap0", dir.path(), "source");

    let over = Arc::new(AtomicBool::new(false));
    let (answer, answers) = std::sync::mpsc::channel();
    let until = Arc::clone(&over);
    // In this thread's namespace.
    let echo = std::thread::spawn(move || echo(&until, &|number| answer.send(number).unwrap()));
    let mut answered = BTreeMap::new();
    let mut wait_answers = |count: usize| {
        let target = answered.len() + count;
        while answered.len() < target {
            let number = answers
                .recv_timeout(PATIENCE)
                .expect("the guest answers no more");
            *answered.entry(number).or_insert(0) += 1;
        }
        answered.clone()
    };
    wait_answers(20);

    // A tap is each host's own.
    let incoming = ["--incoming", "tcp:127.0.0.1:0"];
    let mut without = Ferry::start(dir.path(), "without", &incoming);
    let uri = without.listening_at();
    source.migrate(&uri);
    let info = source.wait_migrated("failed");
    let error = info["error-desc"].as_str().unwrap();
    assert!(error.contains("--net is given 0 times"), "{error}");
    wait_answers(5);

    let mut rarp = hear_rarp();
    let arguments = [&incoming[..], &["--net", "tap,ifname=tap1"]].concat();
    let mut destination = Ferry::start(dir.path(), "destination", &arguments);
    let uri = destination.listening_at();
    source.migrate(&uri);
    let info = source.wait_migrated("completed");
    assert_eq!(announced(&mut rarp), MAC);
    destination.wait_line(|line| {
        matches!(Report::parse(line), Some(Report::Announced { .. })).then_some(())
    });
    source.quit();
    let answered = wait_answers(50);
    over.store(true, Ordering::Relaxed);
    echo.join().unwrap();

    // What was lost was lost in one piece: while the guest moved.
    let (first, last) = (answered.first_key_value(), answered.last_key_value());
    let (first, last) = (*first.unwrap().0, *last.unwrap().0);
    let lost: Vec<u64> = (first..last)
        .filter(|n| !answered.contains_key(n))
        .collect();
    let downtime = &info["downtime"];
    eprintln!(
        "lost {} datagrams of one in 10 ms, downtime {downtime} ms",
        lost.len()
    );
    if let [from, .., to] = *lost {
        assert_eq!(to - from + 1, lost.len() as u64, "{lost:?}");
    }
    assert!(
        answered.values().all(|&times| times == 1),
        "answers came twice"
    );
    let shown = monitor(&mut destination, "info network");
    assert!(
        shown.contains(MAC) && shown.contains("ifname=tap1"),
        "{shown}"
    );
}
