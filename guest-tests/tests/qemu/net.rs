//! The guest that answers on the network, over a socket that carries its frames.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use guest_tests::mmio::Wait;
use guest_tests::net::{Endpoint, Mac, Numbered, Options, Report, command};
use guest_tests::{Maybe, NET};
use serde_json::json;

use crate::machine::{PATIENCE, Qemu, require_qemu, scratch, start};

const GUEST: [u8; 4] = [10, 0, 0, 2];
const HOST: [u8; 4] = [10, 0, 0, 1];
const GUEST_MAC: Mac = Mac([0x52, 0x54, 0, 0xaa, 0xbb, 0xcc]);
const HOST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// The other end of the guest's cable.
struct Cable(UnixDatagram);

impl Cable {
    fn new(dir: &Path) -> Self {
        let socket = UnixDatagram::bind(dir.join("host")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket)
    }

    fn send(&self, dir: &Path, frame: &[u8]) {
        self.0.send_to(frame, dir.join("guest")).unwrap();
    }

    /// The next frame that `wanted` takes.
    fn wait_for<T>(&self, mut wanted: impl FnMut(&[u8]) -> Option<T>) -> T {
        let mut buffer = [0; 2048];
        loop {
            let length = self
                .0
                .recv(&mut buffer)
                .expect("the guest sends no such frame");
            if let Some(found) = wanted(&buffer[..length]) {
                return found;
            }
        }
    }
}

fn frame(kind: [u8; 2], rest: &[u8]) -> Vec<u8> {
    [&GUEST_MAC.0[..], &HOST_MAC, &kind, rest].concat()
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (!(sum as u16)).to_be_bytes()
}

fn ip(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + payload.len() as u16).to_be_bytes());
    header.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    header.extend(HOST);
    header.extend(GUEST);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    frame([8, 0], &[&header, payload].concat())
}

fn arp(
    operation: u8,
    sender: [u8; 4],
    sender_mac: [u8; 6],
    target: [u8; 4],
    target_mac: [u8; 6],
) -> Vec<u8> {
    [
        &[0, 1, 8, 0, 6, 4, 0, operation][..],
        &sender_mac,
        &sender,
        &target_mac,
        &target,
    ]
    .concat()
}

fn boot(qemu: &Path, dir: &Path, options: &Options) -> Qemu {
    let more = [
        "-netdev".to_owned(),
        format!(
            "dgram,id=n0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            dir.join("guest").display(),
            dir.join("host").display()
        ),
        "-device".to_owned(),
        format!("virtio-net-device,netdev=n0,mac={GUEST_MAC}"),
    ];
    let mut machine = start(qemu, dir, "a", NET, &options.to_string(), &more);
    machine.cont();
    machine.wait_for(|line| match Report::parse(line)? {
        Report::Ready { mac, announce, .. } => {
            assert_eq!((mac, announce), (GUEST_MAC, true));
            Some(())
        }
        _ => None,
    });
    machine
}

#[test]
fn the_guest_answers_arp_ping_and_udp() {
    let qemu = require_qemu!();
    for wait in [Wait::Poll, Wait::Irq] {
        let dir = scratch();
        let dir = dir.path();
        let cable = Cable::new(dir);
        let options = Options {
            wait,
            ..Options::default()
        };
        let mut machine = boot(&qemu, dir, &options);
        let is = |kind: [u8; 2]| move |frame: &[u8]| frame.get(12..14) == Some(&kind[..]);

        let request = frame([8, 6], &arp(1, HOST, HOST_MAC, GUEST, [0; 6]));
        cable.send(dir, &request);
        let reply = arp(2, GUEST, GUEST_MAC.0, HOST, HOST_MAC);
        cable.wait_for(|frame| (is([8, 6])(frame) && frame[14..42] == reply).then_some(()));

        let mut ping = vec![8, 0, 0, 0, 0, 7, 0, 1];
        ping.extend(0..100u8);
        let sum = checksum(&ping);
        ping[2..4].copy_from_slice(&sum);
        cable.send(dir, &ip(1, &ping));
        let pong = cable
            .wait_for(|frame| (is([8, 0])(frame) && frame[23] == 1).then(|| frame[34..].to_vec()));
        assert_eq!(
            (pong[0], &pong[4..], checksum(&pong)),
            (0, &ping[4..], [0, 0])
        );

        let mut datagram = vec![0x30, 0x39, 0, 7, 0, 13, 0, 0];
        datagram.extend(b"hello");
        cable.send(dir, &ip(17, &datagram));
        let echo = cable
            .wait_for(|frame| (is([8, 0])(frame) && frame[23] == 17).then(|| frame[34..].to_vec()));
        assert_eq!(
            (&echo[..4], &echo[8..]),
            (&[0, 7, 0x30, 0x39][..], &b"hello"[..])
        );

        machine.serial.send(&[command::STATUS]).unwrap();
        machine.wait_for(|line| match Report::parse(line)? {
            Report::Status {
                icmp,
                udp,
                echoed,
                lost_interrupts,
                ..
            } => {
                assert_eq!(lost_interrupts, 0);
                ((icmp, udp, echoed) == (1, 1, 1)).then_some(())
            }
            _ => None,
        });
    }
}

#[test]
fn numbered_datagrams_come_without_a_gap() {
    let qemu = require_qemu!();
    let dir = scratch();
    let dir = dir.path();
    let cable = Cable::new(dir);
    let to: Endpoint = "10.0.0.1:9000".parse().unwrap();
    let options = Options {
        to: Maybe(Some(to)),
        every: 500,
        ..Options::default()
    };
    let _machine = boot(&qemu, dir, &options);
    let mut next = 1;
    cable.wait_for(|found| {
        if found.get(12..14) == Some(&[8, 6]) && found[38..42] == HOST {
            cable.send(
                dir,
                &frame([8, 6], &arp(2, HOST, HOST_MAC, GUEST, GUEST_MAC.0)),
            );
        }
        let numbered = found.get(42..).and_then(Numbered::parse)?;
        assert_eq!(numbered.number, next);
        next += 1;
        (next > 500).then_some(())
    });
}

#[test]
fn the_guest_announces_itself_when_the_device_asks() {
    let qemu = require_qemu!();
    let dir = scratch();
    let dir = dir.path();
    let cable = Cable::new(dir);
    let mut machine = boot(&qemu, dir, &Options::default());
    let announcement = arp(1, GUEST, GUEST_MAC.0, GUEST, [0; 6]);
    let announced = |frame: &[u8]| (frame.get(14..42) == Some(&announcement[..])).then_some(());
    // One at its start, by itself.
    cable.wait_for(announced);
    let arguments = json!({ "initial": 50, "max": 100, "rounds": 1, "step": 50 });
    machine.qmp.execute("announce-self", arguments).unwrap();
    machine.wait_for(|line| {
        matches!(Report::parse(line)?, Report::Announced { count: 1 }).then_some(())
    });
    cable.wait_for(announced);
}
