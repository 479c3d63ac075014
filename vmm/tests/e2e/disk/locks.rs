//! One image belongs to one process at any time.

use std::path::Path;
use std::process::Command;

use devices::image::Format;
use guest_tests::driver::skip;
use serde_json::Value;

use super::{DiskGuest, busy, slowly, wait_progress};
use crate::frames::{FrameProxy, Then, kind};
use crate::harness::require_kvm;

const IN_USE: &str = "is another process using the image?";

#[test]
fn nobody_else_gets_the_image_before_during_and_after_a_migration() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw,id=root")]);
    let mut count = 0;
    let mut nobody = |when: &str| {
        count += 1;
        let output = guest.refused_start(&format!("x{count}"));
        assert!(
            output.contains(IN_USE) && output.contains("disk 'root'"),
            "{when}: {output}"
        );
        qemu_is_refused(&guest.paths[0], when);
    };
    let mut source = guest.run("src", busy());
    nobody("while the guest runs");
    source.execute("stop", Value::Null);
    nobody("while it is stopped");
    source.execute("cont", Value::Null);

    let (mut destination, uri) = guest.incoming("dst");
    nobody("while a destination waits");
    slowly(&mut source);
    let proxy = FrameProxy::to(&uri, Some((kind::PAGES, 1, Then::Wait)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    nobody("while pages move");
    proxy.go_on();
    source.wait_migrated("completed");
    nobody("right after the hand-over");
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains("never run twice"), "{refusal}");
    wait_progress(&destination, 200);
    source.quit();
    nobody("at the destination");
    destination.execute("query-status", Value::Null);
    guest.finish(destination);
}

#[test]
fn a_source_that_does_not_know_can_t_take_the_image_from_the_destination() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Qcow2, "")]);
    let mut source = guest.run("src", busy());
    let (destination, uri) = guest.incoming("dst");
    let proxy = FrameProxy::to(&uri, Some((kind::RUNNING, 0, Then::Cut)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    source.wait_status("postmigrate");
    source.wait_migrated("failed");
    // Its user overrides the hand-over, but the image's lock does not give way.
    let refusal = source.refused("cont", Value::Null);
    assert!(refusal.contains(IN_USE), "{refusal}");
    assert_eq!(source.status(), "postmigrate");
    wait_progress(&destination, 200);
    guest.finish(destination);
}

#[test]
fn the_image_is_free_for_whoever_is_told_to_go() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw")]);
    let mut source = guest.run("src", busy());
    let (mut destination, uri) = guest.incoming("dst");
    let proxy = FrameProxy::to(&uri, Some((kind::GO, 0, Then::Hold)));
    source.migrate(&proxy.uri);
    proxy.wait_reached();
    assert_eq!(source.status(), "finish-migrate");
    // GO is lost, with the destination: the source's user decides, and the image is free.
    destination.process.kill().unwrap();
    drop(proxy);
    source.wait_status("postmigrate");
    source.wait_migrated("failed");
    source.execute("cont", Value::Null);
    wait_progress(&source, 200);
    guest.finish(source);
}

/// QEMU's tools respect the same locks.
fn qemu_is_refused(path: &Path, when: &str) {
    let answer = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(path)
        .output();
    match answer {
        Err(err) => skip(&format!("qemu-io: {err}")),
        Ok(answer) => {
            let said = String::from_utf8_lossy(&answer.stderr).into_owned();
            assert!(
                !answer.status.success() && said.contains("lock"),
                "{when}: {said}"
            );
        }
    }
}
