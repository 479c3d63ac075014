//! Pauses, migrations, and the saved state.

use super::super::saved::SavedNet;
use super::*;
use crate::state::{StateError, decode, encode};

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
    let golden = include_bytes!("../../../../golden/virtio-net-1.bin");
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
    let poor = of_socket(near, 1500, feature::CSUM | feature::GUEST_CSUM);
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
