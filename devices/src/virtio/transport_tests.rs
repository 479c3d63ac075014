use vm_memory::{Bytes, GuestAddress};

use super::super::rng::Rng;
use super::super::test_driver::TestDriver;
use super::super::{F_EVENT_IDX, F_VERSION_1};
use super::*;

fn driver() -> TestDriver {
    TestDriver::new(Arc::new(Rng::new().unwrap()))
}

#[test]
fn the_registers_say_what_is_there() {
    let driver = driver();
    assert_eq!(driver.get(0), u32::from_le_bytes(*b"virt"));
    assert_eq!((driver.get(4), driver.get(8)), (2, 4));
    assert_eq!(driver.offered(), TRANSPORT_FEATURES);
    driver.set(0x14, 2);
    assert_eq!(driver.get(0x10), 0, "no features from 64 on");
    driver.set(0x30, 0);
    assert_eq!((driver.get(0x34), driver.get(0x44)), (64, 0));
    driver.set(0x30, 1);
    assert_eq!(driver.get(0x34), 0, "there is one queue");
    let mut byte = [0xff];
    driver.transport.read(0, &mut byte);
    assert_eq!(byte, [0], "registers are read whole");
}

#[test]
fn a_driver_that_takes_what_is_not_offered_is_refused() {
    for features in [F_VERSION_1 | 1, F_EVENT_IDX] {
        let driver = driver();
        driver.set(0x70, 3);
        for sel in [0, 1] {
            driver.set(0x24, sel);
            driver.set(0x20, (features >> (32 * sel)) as u32);
        }
        driver.set(0x70, 11);
        assert_eq!(driver.get(0x70), 3, "{features:#x}");
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70) & 4, 0, "not ready without features");
    }
}

#[test]
fn features_and_queues_stay_once_they_are_agreed() {
    let driver = driver();
    driver.start(F_EVENT_IDX);
    driver.set(0x24, 0);
    driver.set(0x20, 0);
    driver.set(0x38, 8);
    driver.set(0x80, 0x1000);
    driver.set(0x44, 0);
    driver.run();
    let used = driver.request(0, &[], &[16]);
    assert_eq!(used.written, 16);
}

#[test]
fn a_reset_forgets_everything() {
    let driver = driver();
    driver.start(0);
    driver.run();
    driver.request(0, &[], &[16]);
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
    assert_eq!((driver.get(0x60), driver.get(0x44)), (0, 0));
    driver.start(F_EVENT_IDX);
    assert_eq!(driver.request(0, &[], &[16]).written, 16);
}

/// What a driver must not do stops the device until it is reset, and nothing else.
#[test]
fn a_driver_that_breaks_the_queue_is_told_to_reset() {
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    type Break = fn(&TestDriver);
    let ways: [(&str, Break); 6] = [
        ("index", |driver| driver.set_available(0, 65)),
        ("not RAM", |driver| {
            driver.add_descriptors(0, &[(1 << 40, 16, WRITE)]);
        }),
        ("across the end", |driver| {
            driver.add_descriptors(0, &[((16 << 20) - 8, 16, WRITE)]);
        }),
        ("order", |driver| {
            driver.add_descriptors(0, &[(0x1000, 16, WRITE), (0x2000, 16, 0)]);
        }),
        ("indirect table of odd length", |driver| {
            driver.add_descriptors(0, &[(0x1000, 24, INDIRECT)]);
        }),
        ("loop", |driver| {
            driver.add_descriptors(0, &[(0x1000, 16, 0)]);
            // The first descriptor goes on with itself.
            let flags = GuestAddress((1 << 20) + 12);
            driver.memory.write_obj(1u32, flags).unwrap();
        }),
    ];
    for (way, break_it) in ways {
        let driver = driver();
        driver.start(0);
        driver.run();
        break_it(&driver);
        driver.notify(0);
        assert_eq!(driver.wait_interrupt(), 2, "{way}");
        assert_eq!(driver.get(0x70), 15 | 64, "{way}");
        assert!(driver.take_used(0).is_empty(), "{way}");
        driver.set(0x70, 0);
        driver.start(0);
        assert_eq!(driver.request(0, &[], &[16]).written, 16, "{way}");
    }
}

#[test]
fn rings_outside_of_ram_break_the_device() {
    let driver = driver();
    driver.set(0x70, 3);
    driver.set(0x24, 1);
    driver.set(0x20, 1);
    driver.set(0x70, 11);
    driver.set(0x84, 1);
    driver.set(0x44, 1);
    driver.set(0x70, 15);
    assert_eq!(driver.get(0x70) & 64, 64);
}

#[test]
fn what_waits_is_served_after_a_migration() {
    let driver = driver();
    driver.start(F_EVENT_IDX);
    driver.run();
    driver.request(0, &[], &[16]);
    driver.pause();
    // The notification stays behind at the source.
    let pending = driver.add(0, &[], &[32]);
    driver.notify(0);
    let moved = driver.migrate_to(Arc::new(Rng::new().unwrap()));
    assert_eq!(
        moved.transport.save().unwrap(),
        driver.transport.save().unwrap()
    );
    moved.run();
    assert_eq!(moved.wait_for(0, &pending).written, 32);
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again() {
    let driver = driver();
    driver.start(0);
    driver.run();
    driver.transport.interrupt.used_buffer();
    driver.pause();
    let moved = driver.migrate_to(Arc::new(Rng::new().unwrap()));
    moved.run();
    assert_eq!(moved.wait_interrupt(), 1);
}

fn saved(driver: &TestDriver) -> SavedTransport {
    decode("test", &driver.transport.save().unwrap()).unwrap()
}

/// The first version's bytes: they must load for ever.
#[test]
fn version_1_still_loads() {
    let golden = include_bytes!("../../golden/virtio-mmio-1.bin");
    let driver = driver();
    driver.transport.restore(1, golden).unwrap();
    assert_eq!(driver.transport.save().unwrap(), golden);
    assert_eq!(driver.get(0x70), 15);
    assert_eq!(driver.get(0x60), 1);
}

#[test]
fn every_field_is_checked() {
    let driver = driver();
    driver.start(F_EVENT_IDX);
    driver.run();
    driver.request(0, &[], &[16]);
    driver.pause();
    let good = saved(&driver);
    let encoded = |saved: &SavedTransport| encode("test", saved).unwrap();
    type Corrupt = fn(&mut SavedTransport);
    let ways: [(&str, Corrupt); 13] = [
        ("device_kind", |s| s.device_kind = 2),
        ("status", |s| s.status = 16),
        ("status", |s| s.status = 7),
        ("interrupt_status", |s| s.interrupt_status = 4),
        ("driver_features", |s| s.driver_features |= 1 << 3),
        ("driver_features", |s| s.driver_features = 0),
        ("queues", |s| s.queues.clear()),
        ("queues[0].size", |s| s.queues[0].size = 128),
        ("queues[0].size", |s| s.queues[0].size = 3),
        ("queues[0].descriptor_table", |s| {
            s.queues[0].descriptor_table += 1
        }),
        ("queues[0].available_ring", |s| {
            s.queues[0].available_ring += 1
        }),
        ("queues[0].used_ring", |s| s.queues[0].used_ring = 1 << 40),
        ("queues[0].next_used", |s| s.queues[0].next_used += 1),
    ];
    for (field, corrupt) in ways {
        let mut bad = good.clone();
        corrupt(&mut bad);
        let error = driver.transport.restore(1, &encoded(&bad)).unwrap_err();
        let expected = format!("virtio-mmio.0: saved field '{field}' is ");
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert_eq!(saved(&driver), good, "after an error it is as it was");
    }
    let mut short = encoded(&good);
    short.pop();
    assert!(driver.transport.restore(1, &short).is_err());
}
