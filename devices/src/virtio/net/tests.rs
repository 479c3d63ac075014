//! The device against a socket that keeps packets apart, as a tap does.

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::saved::SavedNet;
use super::spec::{control, feature, header};
use super::*;
use crate::state::{StateError, decode, encode};
use crate::virtio::F_EVENT_IDX;
use crate::virtio::test_driver::TestDriver;

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
const OFFLOADS: u64 =
    feature::CSUM | feature::HOST_TSO4 | feature::GUEST_CSUM | feature::GUEST_TSO4;
const MERGED: u64 = feature::MRG_RXBUF | feature::GUEST_CSUM | feature::GUEST_TSO4;
const ANNOUNCE: u64 = feature::GUEST_ANNOUNCE | feature::CTRL_VQ | feature::STATUS;

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
    let tap = Tap::of_socket(near, 1500, OFFLOADS);
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
        Tap::of_socket(near, mtu, 0)
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
fn packets_go_out_as_they_are() {
    let (driver, net, far) = started(0);
    for len in [14, 60, 1514] {
        let packet = packet(len);
        // However it is cut.
        let (head, tail) = packet.split_at(len / 2);
        let used = driver.request(TRANSMIT, &[head, tail], &[]);
        assert_eq!(used.written, 0);
        assert_eq!(get(&far), packet);
    }
    assert_eq!(net.packets().sent, 3);
}

#[test]
fn packets_that_can_not_be_are_dropped() {
    let (driver, net, far) = started(0);
    let with = |flags, gso| {
        let mut packet = packet(100);
        packet[..2].copy_from_slice(&[flags, gso]);
        packet
    };
    let bad = [
        vec![],
        packet(0)[..5].to_vec(),
        packet(13),
        packet(65_536 + 18),
        with(header::FLAG_NEEDS_CSUM, 0),
        with(0, header::GSO_TCPV4),
        with(0, 77),
        with(0, header::GSO_ECN),
    ];
    for packet in &bad {
        driver.request(TRANSMIT, &[packet], &[]);
    }
    driver.request(TRANSMIT, &[], &[64]);
    assert!(is_empty(&far));
    assert_eq!(net.packets().send_dropped, bad.len() as u64 + 1);
    driver.request(TRANSMIT, &[&packet(60)], &[]);
    assert_eq!(get(&far), packet(60));
}

#[test]
fn offloads_are_the_drivers_to_use() {
    let (driver, _net, far) = started(OFFLOADS);
    let mut packet = packet(60_000);
    packet[..2].copy_from_slice(&[header::FLAG_NEEDS_CSUM, header::GSO_TCPV4]);
    driver.request(TRANSMIT, &[&packet], &[]);
    assert_eq!(get(&far), packet);
}

#[test]
fn packets_come_in_as_they_are() {
    let (driver, net, far) = started(0);
    let first = driver.add(RECEIVE, &[], &[12, 2000]);
    let second = driver.add(RECEIVE, &[], &[2000]);
    driver.notify(RECEIVE);
    put(&far, &packet(1514));
    let used = driver.wait_for(RECEIVE, &first);
    assert_eq!(used.written as usize, header::LEN + 1514);
    assert_eq!(used.data[..1526], merged(packet(1514), 1));
    // It is read by the device, so what it writes must be sent in a migration.
    let region = driver
        .memory
        .find_region(vm_memory::GuestAddress(0))
        .unwrap();
    assert!(region.bitmap().dirty_at(8 << 20));
    put(&far, &packet(60));
    assert_eq!(
        driver.wait_for(RECEIVE, &second).data[..72],
        merged(packet(60), 1)
    );
    assert_eq!(net.packets().received, 2);
}

#[test]
fn a_packet_waits_for_buffers() {
    let (driver, _net, far) = started(0);
    put(&far, &packet(60));
    let used = driver.request(RECEIVE, &[], &[1526]);
    assert_eq!(used.data[..72], merged(packet(60), 1));
}

#[test]
fn a_long_packet_fills_several_buffers_at_once() {
    let (driver, _net, far) = started(MERGED);
    let buffers: Vec<_> = (0..60).map(|_| driver.add(RECEIVE, &[], &[1526])).collect();
    driver.notify(RECEIVE);
    let len = 5000 + header::LEN;
    put(&far, &packet(5000));
    put(&far, &packet(60));
    let mut used = Vec::new();
    while used.len() < 5 {
        driver.wait_interrupt();
        let now = driver.take_used(RECEIVE);
        assert!(used.len() + now.len() >= 4, "a packet is seen whole");
        used.extend(now);
    }
    let written = used.iter().map(|(_, written)| *written as usize);
    assert_eq!(
        written.collect::<Vec<_>>(),
        [1526, 1526, 1526, len - 3 * 1526, 72]
    );
    let data: Vec<u8> = buffers
        .iter()
        .take(4)
        .flat_map(|b| driver.data(b))
        .collect();
    assert_eq!(data[..len], merged(packet(5000), 4));
    assert_eq!(driver.data(&buffers[4])[..72], merged(packet(60), 1));
}

/// Buffers for the longest packet are there before one is read, so that it finds room.
#[test]
fn long_packets_wait_for_as_much_room_as_there_was() {
    let (driver, net, far) = started(MERGED);
    let buffers: Vec<_> = (0..4).map(|_| driver.add(RECEIVE, &[], &[1526])).collect();
    driver.notify(RECEIVE);
    put(&far, &packet(60));
    driver.wait_for(RECEIVE, &buffers[0]);
    put(&far, &packet(5000));
    driver.add(RECEIVE, &[], &[1526]);
    driver.notify(RECEIVE);
    driver.wait_interrupt();
    assert_eq!(driver.take_used(RECEIVE).len(), 4);
    assert_eq!(net.packets().receive_dropped, 0);
}

/// The driver may ask to be interrupted about a buffer in the middle of a packet.
#[test]
fn an_interrupt_comes_for_any_buffer_of_a_packet() {
    for event in 0..4 {
        let (driver, _net, far) = started(MERGED | F_EVENT_IDX);
        driver.set_used_event(RECEIVE, event);
        for _ in 0..8 {
            driver.add(RECEIVE, &[], &[1526]);
        }
        driver.notify(RECEIVE);
        put(&far, &packet(5000));
        assert_eq!(driver.wait_interrupt(), 1, "{event}");
        assert_eq!(driver.take_used(RECEIVE).len(), 4, "{event}");
    }
}

#[test]
fn what_finds_no_room_is_dropped() {
    let (driver, net, far) = started(0);
    let small = driver.add(RECEIVE, &[], &[100]);
    driver.notify(RECEIVE);
    put(&far, &packet(200));
    put(&far, &packet(60));
    let used = driver.wait_for(RECEIVE, &small);
    assert_eq!(used.data[..72], merged(packet(60), 1));
    assert_eq!(net.packets().receive_dropped, 1);
    // A buffer that nothing fits into goes back.
    assert_eq!(driver.request(RECEIVE, &[], &[8]).written, 0);
    assert_eq!(driver.request(RECEIVE, &[&[1, 2, 3]], &[]).written, 0);
}

#[test]
fn a_paused_device_leaves_everything_where_it_is() {
    let (driver, _net, far) = started(feature::MRG_RXBUF);
    let buffers: Vec<_> = (0..4).map(|_| driver.add(RECEIVE, &[], &[1526])).collect();
    driver.notify(RECEIVE);
    put(&far, &packet(60));
    driver.wait_for(RECEIVE, &buffers[0]);
    driver.pause();
    put(&far, &packet(61));
    driver.add(TRANSMIT, &[&packet(62)], &[]);
    driver.notify(TRANSMIT);

    // At the destination the queues are as at the source, less what it had taken.
    let (there, far_there) = net();
    let moved = driver.migrate_to(there);
    put(&far_there, &packet(63));
    assert!(moved.take_used(RECEIVE).is_empty(), "not before it runs");
    moved.run();
    let used = moved.wait_for(RECEIVE, &buffers[1]);
    assert_eq!(used.data[..75], merged(packet(63), 1));
    assert_eq!(get(&far_there), packet(62));
    assert!(is_empty(&far), "the source sends nothing");

    driver.run();
    assert_eq!(
        driver.wait_for(RECEIVE, &buffers[1]).data[..73],
        merged(packet(61), 1)
    );
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

fn saved(net: &Net) -> SavedNet {
    decode("test", &net.save().unwrap()).unwrap()
}

#[test]
fn what_the_driver_has_set_moves_along() {
    let (driver, here, _far) = started(ANNOUNCE | feature::CTRL_MAC_ADDR);
    let mac = [2, 0, 0, 0, 0, 9];
    command(
        &driver,
        &[&[control::MAC, control::MAC_ADDR_SET][..], &mac].concat(),
    );
    here.set_link(false);
    driver.pause();
    here.shared.state().announce = true;
    here.shared.state().guest_offloads = Some(0);
    let (there, _far_there) = net();
    let moved = driver.migrate_to(there.clone());
    assert_eq!(there.save().unwrap(), here.save().unwrap());
    assert_eq!(moved.config::<8>(0), [2, 0, 0, 0, 0, 9, 2, 0]);
}

/// The first version's bytes: they must load for ever.
#[test]
fn version_1_still_loads() {
    let golden = include_bytes!("../golden/virtio-net-1.bin");
    let (net, _far) = net();
    net.restore(1, golden).unwrap();
    assert_eq!(net.save().unwrap(), golden);
    assert_eq!(net.mac().0, [2, 0, 0, 0, 0, 9]);
    assert!(net.link_is_up());
}

#[test]
fn every_field_is_checked() {
    let (net, _far) = net();
    let good = saved(&net);
    type Corrupt = fn(&mut SavedNet);
    let ways: [(&str, Corrupt); 5] = [
        ("mac", |s| s.mac[0] |= 1),
        ("mac", |s| s.mac = [0; 6]),
        ("status", |s| s.status |= 4),
        ("mtu", |s| s.mtu = 9000),
        ("guest_offloads", |s| s.guest_offloads = Some(feature::CSUM)),
    ];
    for (field, corrupt) in ways {
        let mut bad = good.clone();
        corrupt(&mut bad);
        let error = net.restore(1, &encode("test", &bad).unwrap()).unwrap_err();
        let expected = format!("virtio-net.0: saved field '{field}' is ");
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert_eq!(saved(&net), good, "after an error it is as it was");
    }
    let mut short = encode("test", &good).unwrap();
    short.pop();
    let error = net.restore(1, &short).unwrap_err();
    assert!(matches!(error, StateError::Decode { .. }), "{error}");
}

#[test]
fn a_host_without_an_offload_in_use_is_told() {
    let (driver, _net, _far) = started(OFFLOADS);
    driver.pause();
    let none = SocketFlags::empty();
    let (near, _) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, none, None).unwrap();
    let poor = Tap::of_socket(near, 1500, feature::CSUM | feature::GUEST_CSUM);
    let there = TestDriver::new(Arc::new(Net::new(0, config(), poor).unwrap()));
    let state = driver.transport.save().unwrap();
    let error = there.transport.restore(1, &state).unwrap_err().to_string();
    assert!(
        error.ends_with(
            "the guest's driver uses VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4, which this \
             host's kernel lacks"
        ),
        "{error}"
    );
}
