//! What the guest receives.

use super::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::virtio::F_EVENT_IDX;

#[test]
fn packets_come_in_as_they_are() {
    let (driver, net, far) = started(0);
    let first = driver.add(RECEIVE, &[], &[12, 9000]);
    let second = driver.add(RECEIVE, &[], &[2000]);
    driver.notify(RECEIVE);
    put(&far, &packet(8000));
    let used = driver.wait_for(RECEIVE, &first);
    assert_eq!(used.written as usize, header::LEN + 8000);
    assert_eq!(used.data[..8012], merged(packet(8000), 1));
    // The pages of the packet are known to be written, so that they migrate.
    let start = vm_memory::GuestAddress(0);
    let written = driver.memory.find_region(start).unwrap().bitmap();
    let page = |number: usize| written.dirty_at((8 << 20) + number * 4096);
    assert_eq!([0, 1, 2].map(page), [true, true, false]);
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

/// The device keeps buffers until they are enough for the longest packet. A driver that gives more
/// than its queue has descriptors uses one of them twice.
#[test]
fn more_buffers_than_descriptors_break_the_device() {
    let (driver, _net, _far) = started(MERGED | feature::GUEST_TSO4 | feature::GUEST_CSUM);
    let give = || {
        for _ in 0..128 {
            driver.add(RECEIVE, &[], &[header::LEN as u32]);
        }
        driver.notify(RECEIVE);
    };
    let status = || driver.get(0x70);
    give();
    give();
    driver.pause();
    driver.run();
    assert_eq!(status() & 64, 0, "these are as many as there may be");
    give();
    assert_eq!(driver.wait_interrupt(), 2, "the configuration has changed");
    assert_eq!(status() & 64, 64);
    driver.pause();
    let (there, _far) = net();
    let moved = driver.migrate_to(there);
    assert_eq!(
        moved.transport.save().unwrap(),
        driver.transport.save().unwrap()
    );
}
