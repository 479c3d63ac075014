//! The device against a socket that keeps packets apart, as a tap does.

mod receive;
mod saved;
mod transmit;

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::spec::{control, feature, header};
use super::*;
use crate::virtio::test_driver::TestDriver;

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
const OFFLOADS: u64 =
    feature::CSUM | feature::HOST_TSO4 | feature::GUEST_CSUM | feature::GUEST_TSO4;
const MERGED: u64 = feature::MRG_RXBUF | feature::GUEST_CSUM | feature::GUEST_TSO4;
const ANNOUNCE: u64 = feature::GUEST_ANNOUNCE | feature::CTRL_VQ | feature::STATUS;

fn of_socket(fd: OwnedFd, mtu: u16, offloads: u64) -> Arc<Tap> {
    Arc::new(Tap::of_socket(fd, mtu, offloads))
}

fn config() -> NetConfig {
    NetConfig {
        mac: MAC,
        mtu: None,
    }
}

/// A device, and the other end of its tap.
fn net() -> (Arc<Net>, OwnedFd) {
    let none = SocketFlags::empty();
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, none, None).unwrap();
    let tap = of_socket(near, 1500, OFFLOADS);
    (Arc::new(Net::new(0, config(), tap).unwrap()), far)
}

fn started(features: u64) -> (TestDriver, Arc<Net>, OwnedFd) {
    let (net, far) = net();
    let driver = TestDriver::new(net.clone());
    driver.start(features);
    driver.run();
    (driver, net, far)
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0; header::LEN];
    packet.extend((0..len).map(|i| (i / 7) as u8));
    packet
}

fn put(far: &OwnedFd, packet: &[u8]) {
    assert_eq!(rustix::io::write(far, packet).unwrap(), packet.len());
}

fn get(far: &OwnedFd) -> Vec<u8> {
    let mut packet = vec![0; 1 << 17];
    let len = rustix::io::read(far, &mut packet).unwrap();
    packet.truncate(len);
    packet
}

fn is_empty(far: &OwnedFd) -> bool {
    rustix::io::ioctl_fionread(far).unwrap() == 0
}

/// The packet as the guest gets it, in one buffer.
fn merged(mut packet: Vec<u8>, buffers: u8) -> Vec<u8> {
    packet[header::NUM_BUFFERS as usize] = buffers;
    packet
}

#[test]
fn the_configuration_tells_of_the_card() {
    let (driver, net, _far) = started(0);
    assert_eq!(driver.config::<6>(0), MAC.0);
    assert_eq!(driver.config::<2>(6), [1, 0], "the link is up");
    assert_eq!(driver.config::<4>(8), [1, 0, 0, 0]);
    assert_eq!(driver.offered() & feature::MTU, 0);
    assert_eq!(driver.offered() & OFFLOADS, OFFLOADS);
    assert_eq!(driver.offered() & feature::HOST_USO, 0);
    assert_eq!(net.tap_name(), "fake0");
}

#[test]
fn a_tap_must_take_packets_as_long_as_the_guests() {
    let tap = |mtu| {
        let none = SocketFlags::empty();
        let (near, _) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, none, None).unwrap();
        of_socket(near, mtu, 0)
    };
    let jumbo = NetConfig {
        mac: MAC,
        mtu: Some(9000),
    };
    let error = Net::new(0, jumbo, tap(1500)).unwrap_err().to_string();
    assert!(error.contains("ip link set fake0 mtu 9000"), "{error}");
    assert!(Net::new(0, config(), tap(1280)).is_err());
    let driver = TestDriver::new(Arc::new(Net::new(0, jumbo, tap(9001)).unwrap()));
    assert_eq!(driver.config::<2>(10), 9000_u16.to_le_bytes());
    assert_eq!(driver.offered() & feature::MTU, feature::MTU);
}

#[test]
fn with_the_link_down_packets_are_lost() {
    let (driver, net, far) = started(feature::STATUS);
    let pending = driver.add(RECEIVE, &[], &[1526]);
    driver.notify(RECEIVE);
    net.set_link(false);
    assert_eq!(driver.wait_interrupt(), 2, "the configuration has changed");
    assert_eq!(driver.config::<2>(6), [0, 0]);
    driver.request(TRANSMIT, &[&packet(60)], &[]);
    put(&far, &packet(61));
    net.announce();
    while net.packets().receive_dropped == 0 {
        std::thread::yield_now();
    }
    assert!(is_empty(&far));
    assert_eq!(net.packets().send_dropped, 1);
    net.set_link(true);
    assert_eq!(driver.wait_interrupt() & 2, 2);
    put(&far, &packet(62));
    let used = driver.wait_for(RECEIVE, &pending);
    assert_eq!(used.data[..74], merged(packet(62), 1));
}

/// A command on the control queue, and its answer.
fn command(driver: &TestDriver, command: &[u8]) -> u8 {
    let used = driver.request(CONTROL, &[command], &[1]);
    assert_eq!(used.written, 1);
    used.data[0]
}

#[test]
fn a_guest_is_announced_until_it_says_so_itself() {
    let (driver, net, far) = started(ANNOUNCE);
    net.announce();
    assert_eq!(driver.wait_interrupt(), 2);
    assert_eq!(driver.config::<2>(6), [3, 0]);
    let rarp = get(&far);
    assert_eq!(rarp.len(), header::LEN + 60);
    let frame = &rarp[header::LEN..];
    assert_eq!(frame[..6], [0xff; 6]);
    assert_eq!(frame[6..12], MAC.0);
    assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!((&frame[22..28], &frame[32..38]), (&MAC.0[..], &MAC.0[..]));
    assert_eq!(
        command(&driver, &[control::ANNOUNCE, control::ANNOUNCE_ACK]),
        0
    );
    assert_eq!(driver.config::<2>(6), [1, 0]);
}

#[test]
fn a_driver_that_can_not_is_not_asked_to_announce() {
    let (driver, net, far) = started(feature::STATUS);
    net.announce();
    assert_eq!(get(&far).len(), header::LEN + 60);
    assert_eq!(driver.config::<2>(6), [1, 0]);
    assert_eq!(driver.get(0x60), 0);
}

#[test]
fn commands_are_answered() {
    let (driver, net, far) = started(ANNOUNCE | feature::CTRL_MAC_ADDR);
    let other = [2, 0, 0, 0, 0, 9];
    let set = |mac: &[u8]| [&[control::MAC, control::MAC_ADDR_SET], mac].concat();
    assert_eq!(command(&driver, &set(&other)), control::OK);
    assert_eq!(driver.config::<6>(0), other);
    net.announce();
    assert_eq!(get(&far)[header::LEN + 6..][..6], other);
    for bad in [
        &[][..],
        &[control::MAC],
        &set(&other[..5]),
        &set(&[1, 0, 0, 0, 0, 9]),
        &set(&[2; 30]),
        &[77, 0],
        // Not negotiated.
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(command(&driver, bad), control::ERR, "{bad:?}");
    }
    // No room for an answer.
    assert_eq!(driver.request(CONTROL, &[&[control::MAC]], &[]).written, 0);
    assert_eq!(net.mac().0, other);
    driver.set(0x70, 0);
    assert_eq!(net.mac(), MAC, "a reset brings the card's own back");
}

#[test]
fn a_tap_that_goes_takes_nothing_else_along() {
    let (driver, net, far) = started(0);
    let pending = driver.add(RECEIVE, &[], &[1526]);
    driver.notify(RECEIVE);
    drop(far);
    driver.request(TRANSMIT, &[&packet(60)], &[]);
    assert_eq!(net.packets().send_dropped, 1);
    driver.pause();
    assert!(driver.take_used(RECEIVE).is_empty());
    drop(pending);
}
