//! Disks of guests that move before their memory.

use std::path::Path;

use devices::image::Format;
use guest_tests::Size;
use guest_tests::disk::{Holds, Options};
use serde_json::{Value, json};

use super::{enable, push_fast, push_slowly, require_postcopy, set, wait_state};
use crate::disk::copying::overlay;
use crate::disk::{CAPACITY, busy, drive, finish, incoming, new_image, run, wait_progress};
use crate::harness::{Ferry, scratch};

/// Starts the migration, which switches as soon as it may.
fn migrate(source: &mut Ferry, uri: &str, copy: Option<&str>) {
    enable(source);
    push_slowly(source);
    set(source, json!({ "max-bandwidth": 0 }));
    let mut arguments = json!({ "uri": uri });
    if let Some(copy) = copy {
        arguments[copy] = true.into();
    }
    source.execute("migrate", arguments);
    source.execute("migrate-start-postcopy", Value::Null);
}

/// The guest uses its disks while its memory comes.
fn works_there(mut source: Ferry, destination: &mut Ferry) -> Value {
    let info = wait_state(destination, "postcopy-active");
    wait_progress(destination, 200);
    push_fast(&mut source);
    let here = source.wait_migrated("completed");
    assert!(here["x-ferry"]["postcopy"].is_object(), "{here:#}");
    destination.wait_migrated("completed");
    source.execute("quit", Value::Null);
    source.wait_exit();
    info
}

#[test]
fn on_shared_storage() {
    require_postcopy!();
    let dir = scratch();
    let raw = new_image(dir.path(), "raw", Format::Raw);
    let qcow2 = new_image(dir.path(), "qcow2", Format::Qcow2);
    let drives = [drive(&raw, ""), drive(&qcow2, "")];
    let mut here = run(dir.path(), "m0", busy(), &drives);
    for hop in 1..=3 {
        wait_progress(&here, 100);
        let (mut there, uri) = incoming(dir.path(), &format!("m{hop}"), &drives);
        enable(&mut there);
        migrate(&mut here, &uri, None);
        works_there(here, &mut there);
        here = there;
    }
    wait_progress(&here, 200);
    finish(here, &[&raw, &qcow2]);
}

fn travels(copy: &str, source: &Path, there: &Path, dir: &Path, options: Options) {
    let mut here = run(dir, "src", options, &[drive(source, "")]);
    wait_progress(&here, 200);
    let (mut destination, uri) = incoming(dir, "dst", &[drive(there, "")]);
    enable(&mut destination);
    migrate(&mut here, &uri, Some(copy));
    let info = works_there(here, &mut destination);
    // All of it had come before the guest did.
    assert_eq!(info["disk"]["remaining"], 0, "{info:#}");
    assert_eq!(info["disk"]["total"], CAPACITY, "{info:#}");
    wait_progress(&destination, 200);
    finish(destination, &[there]);
}

#[test]
fn a_disk_comes_whole_before_the_guest() {
    require_postcopy!();
    let dir = scratch();
    let here = new_image(dir.path(), "here", Format::Raw);
    let options = Options {
        holds: Holds::Zero,
        ..busy()
    };
    let there = dir.path().join("there");
    travels("blk", &here, &there, dir.path(), options);
}

#[test]
fn an_overlay_comes_whole_before_the_guest() {
    require_postcopy!();
    let dir = scratch();
    let here = overlay(dir.path(), "base", "here", CAPACITY, 0x17);
    let there = overlay(dir.path(), "base", "there", CAPACITY, 0x17);
    // The backing file holds what is not the guest's in its second half.
    let options = Options {
        area: Size(CAPACITY / 2),
        ..busy()
    };
    travels("inc", &here, &there, dir.path(), options);
}
