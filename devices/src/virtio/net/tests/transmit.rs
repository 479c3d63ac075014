//! What the guest sends.

use super::*;

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
