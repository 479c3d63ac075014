//! Migrations that fail: the source runs on with its disks.

use devices::image::{Cache, Format, Image, ImageConfig};
use guest_tests::disk::Options;
use guest_tests::mmio::Wait;
use serde_json::Value;

use super::{DiskGuest, busy, drive, incoming, new_image, wait_progress};
use crate::frames::{FrameProxy, Then, kind};
use crate::harness::require_kvm;

fn open(path: &std::path::Path) -> Image {
    Image::open(&ImageConfig {
        path: path.to_owned(),
        format: None,
        readonly: false,
        cache: Cache::Writeback,
    })
    .unwrap()
}

#[test]
fn cut_before_any_frame_up_to_ready_the_source_keeps_its_disks() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw"), (Format::Qcow2, "")]);
    let options = Options {
        wait: Wait::Irq,
        ..busy()
    };
    let mut source = guest.run("src", options);
    let places = [
        (kind::HELLO, 0),
        (kind::ACCEPT, 0),
        (kind::PAGES, 5),
        (kind::STATE, 0),
        (kind::STATE, 3),
        (kind::END, 0),
        (kind::READY, 0),
    ];
    for (index, (kind, nth)) in places.into_iter().enumerate() {
        let (mut destination, uri) = guest.incoming(&format!("d{index}"));
        let proxy = FrameProxy::to(&uri, Some((kind, nth, Then::Cut)));
        source.migrate(&proxy.uri);
        proxy.wait_reached();
        source.wait_migrated("failed");
        assert_eq!(source.status(), "running", "cut at {kind:#x}, {nth}");
        destination.wait_exit();
        wait_progress(&source, 50);
        let output = guest.refused_start(&format!("x{index}"));
        assert!(output.contains("is another process"), "{output}");
    }
    guest.last_hop(source, 200);
}

#[test]
fn a_destination_killed_with_all_of_the_guest_never_had_its_disks() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Qcow2, "")]);
    let mut source = guest.run("src", busy());
    let (mut destination, uri) = guest.incoming("d0");
    let proxy = FrameProxy::to(&uri, Some((kind::READY, 0, Then::Hold)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    // Until GO they are the source's.
    assert!(open(&guest.paths[0]).lock().is_err());
    destination.process.kill().unwrap();
    source.wait_migrated("failed");
    assert_eq!(source.status(), "running");
    wait_progress(&source, 200);
    guest.last_hop(source, 200);
}

#[test]
fn a_destination_that_can_t_lock_gives_the_guest_back() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw")]);
    // The destination has another file, which somebody else uses.
    let other = new_image(guest.dir.path(), "other", Format::Raw);
    let theirs = open(&other);
    let mut source = guest.run("src", busy());
    let there = [drive(&other, ",format=raw")];
    let (mut destination, uri) = incoming(guest.dir.path(), "d0", &there);
    let proxy = FrameProxy::to(&uri, Some((kind::GO, 0, Then::Wait)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    theirs.lock().unwrap();
    proxy.go_on();
    let info = source.wait_migrated("failed");
    let reason = info["error-desc"].as_str().unwrap();
    assert!(
        reason.contains("disk 'disk0'") && reason.contains("is another process"),
        "{reason}"
    );
    assert_eq!(source.status(), "running");
    let (success, output) = destination.wait_exit();
    assert!(
        !success && output.contains("is another process"),
        "{output}"
    );
    let again = open(&guest.paths[0]).lock();
    assert!(again.is_err(), "the source has its locks back");
    wait_progress(&source, 200);
    guest.last_hop(source, 200);
}

#[test]
fn a_source_that_can_t_take_its_locks_back_waits_for_cont() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw")]);
    let thief = open(&guest.paths[0]);
    let mut source = guest.run("src", busy());
    let (mut destination, uri) = guest.incoming("d0");
    let proxy = FrameProxy::to(&uri, Some((kind::GO, 0, Then::Wait)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    thief.lock().unwrap();
    proxy.go_on();
    source.wait_migrated("failed");
    let (success, _) = destination.wait_exit();
    assert!(!success);
    source.wait_status("paused");
    let output = source.process.output();
    assert!(
        output.contains("the guest can't run on") && output.contains("is another process"),
        "{output}"
    );
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("is another process"), "{refusal}");
    assert_eq!(source.status(), "paused");
    drop(thief);
    source.execute("cont", Value::Null);
    wait_progress(&source, 200);
    guest.last_hop(source, 200);
}
