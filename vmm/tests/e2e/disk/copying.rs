//! Disks that travel with their guest: `migrate -b` and `migrate -i`.

use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use devices::image::{Cache, Format, Image, ImageConfig, NewBacking};
use guest_tests::Size;
use guest_tests::disk::{Holds, Mode, Options, Report};
use serde_json::{Value, json};

use super::space::Small;
use super::{
    CAPACITY, busy, drive, finish, incoming, new_image, refused_start, run, wait_progress,
    wait_report,
};
use crate::frames::{FrameProxy, Then, kind};
use crate::harness::{Ferry, require_kvm, scratch};

fn open(path: &Path) -> Image {
    Image::open(&ImageConfig {
        path: path.to_owned(),
        format: None,
        readonly: true,
        cache: Cache::Writeback,
    })
    .unwrap()
}

/// The two disks hold the same.
fn assert_equal(here: &Path, there: &Path) {
    let (here, there) = (open(here), open(there));
    assert_eq!(here.capacity(), there.capacity());
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut offset = 0;
    while offset < here.capacity() {
        let len = (here.capacity() - offset).min(a.len() as u64) as usize;
        for (image, data) in [(&here, &mut a), (&there, &mut b)] {
            let mut slices = [IoSliceMut::new(&mut data[..len])];
            image.read_at(&mut slices, offset).unwrap();
        }
        assert!(a[..len] == b[..len], "they differ from {offset} on");
        offset += len as u64;
    }
}

/// A backing file with something in its second half, and an overlay on it.
pub fn overlay(dir: &Path, base: &str, name: &str, capacity: u64, seed: u8) -> PathBuf {
    let backing = dir.join(base);
    if !backing.exists() {
        let image = Image::create(&backing, Format::Raw, capacity, None, Cache::Writeback).unwrap();
        for at in (capacity / 2..capacity).step_by(capacity as usize / 16) {
            let data = vec![seed ^ (at >> 20) as u8; 100 << 10];
            image.write_at(&[IoSlice::new(&data)], at).unwrap();
        }
    }
    let path = dir.join(name);
    let backing = NewBacking {
        name: base.to_owned(),
        format: Format::Raw,
    };
    Image::create(
        &path,
        Format::Qcow2,
        capacity,
        Some(&backing),
        Cache::Writeback,
    )
    .unwrap();
    path
}

fn migrate(source: &mut Ferry, uri: &str, copy: &str) {
    let mut arguments = json!({ "uri": uri });
    arguments[copy] = true.into();
    source.execute("migrate", arguments);
}

/// The guest has come and waits: both disks are the same, and it finds nothing wrong afterwards.
fn arrived(source: Ferry, mut destination: Ferry, here: &Path, there: &Path) {
    destination.wait_status("paused");
    assert!(!there.with_extension("before").exists());
    assert_equal(here, there);
    source.quit();
    destination.execute("cont", Value::Null);
    wait_progress(&destination, 500);
    finish(destination, &[there]);
}

/// A whole disk goes, with its guest stopped at the end of it.
fn moves_whole(from: Format, to: &str, given: bool) {
    let dir = scratch();
    let here = new_image(dir.path(), "here", from);
    let there = dir.path().join("there");
    if given {
        // An image that somebody has used before.
        let image = Image::create(&there, Format::Raw, CAPACITY, None, Cache::Writeback).unwrap();
        let data = vec![0xee; CAPACITY as usize];
        image.write_at(&[IoSlice::new(&data)], 0).unwrap();
    }
    let options = Options {
        holds: Holds::Zero,
        ..busy()
    };
    let mut source = run(dir.path(), "src", options, &[drive(&here, "")]);
    wait_progress(&source, 500);
    let (mut destination, uri) = incoming(dir.path(), "dst", &[drive(&there, to)]);
    destination.execute("stop", Value::Null);
    migrate(&mut source, &uri, "blk");
    let info = source.wait_migrated("completed");
    assert_eq!(info["disk"]["total"], CAPACITY, "{info:#}");
    assert_eq!(info["disk"]["remaining"], 0, "{info:#}");
    assert!(info["disk"]["transferred"].as_u64() > Some(0), "{info:#}");
    assert_eq!(destination.query_migrate()["disk"]["remaining"], 0);
    arrived(source, destination, &here, &there);
}

#[test]
fn a_raw_disk_travels_into_a_new_image() {
    require_kvm!();
    moves_whole(Format::Raw, "", false);
}

#[test]
fn a_qcow2_disk_travels_into_a_new_image() {
    require_kvm!();
    moves_whole(Format::Qcow2, "", false);
}

#[test]
fn a_qcow2_disk_travels_into_a_raw_image_with_something_else_in_it() {
    require_kvm!();
    moves_whole(Format::Qcow2, ",format=raw", true);
}

#[test]
fn of_an_overlay_only_what_is_above_the_backing_file_travels() {
    const DISK: u64 = 2 << 30;
    const AREA: u64 = 50 << 20;
    require_kvm!();
    let dir = scratch();
    let here = overlay(dir.path(), "base", "here", DISK, 1);
    let copy = dir.path().join("elsewhere");
    std::fs::create_dir(&copy).unwrap();
    let there = overlay(&copy, "base", "there", DISK, 1);
    let options = Options {
        area: Size(AREA),
        ..busy()
    };
    let mut source = run(dir.path(), "src", options, &[drive(&here, "")]);
    wait_progress(&source, 2_000);
    // What is written meanwhile is sent again: here it is only about what is there.
    source.execute("stop", Value::Null);
    let held = open(&here).allocated().unwrap();
    let (destination, uri) = incoming(dir.path(), "dst", &[drive(&there, "")]);
    migrate(&mut source, &uri, "inc");
    let info = source.wait_migrated("completed");
    let sent = info["disk"]["transferred"].as_u64().unwrap();
    assert!(sent <= AREA + AREA / 10, "{sent} of {AREA} bytes: {info:#}");
    assert!(sent >= held / 4, "{sent} of {held} bytes");
    arrived(source, destination, &here, &there);
}

#[test]
fn overlays_with_traffic_travel_and_can_again() {
    require_kvm!();
    let dir = scratch();
    let here = overlay(dir.path(), "base", "here", CAPACITY, 1);
    let there = overlay(dir.path(), "base", "there", CAPACITY, 1);
    let options = Options {
        area: Size(CAPACITY / 2),
        ..busy()
    };
    let mut source = run(dir.path(), "src", options, &[drive(&here, "")]);
    wait_progress(&source, 500);
    // The first attempt leaves something in the overlay, which the second must not show.
    for (name, cut) in [("d0", true), ("d1", false)] {
        let (destination, uri) = incoming(dir.path(), name, &[drive(&there, "")]);
        let place = cut.then_some((kind::END, 0, Then::Cut));
        let proxy = FrameProxy::to(&uri, place);
        migrate(&mut source, &proxy.uri, "inc");
        if cut {
            source.wait_migrated("failed");
            wait_progress(&source, 500);
        } else {
            source.wait_migrated("completed");
            source.quit();
            wait_progress(&destination, 500);
            return finish(destination, &[&there]);
        }
    }
}

#[test]
fn another_backing_file_is_refused_before_anything_is_written() {
    require_kvm!();
    let dir = scratch();
    let here = overlay(dir.path(), "base", "here", CAPACITY, 1);
    let there = overlay(dir.path(), "other", "there", CAPACITY, 2);
    let before = std::fs::read(&there).unwrap();
    let plain = new_image(dir.path(), "plain", Format::Qcow2);
    let missing = dir.path().join("missing");
    let mut source = run(dir.path(), "src", busy(), &[drive(&here, "")]);
    for (index, (path, reason)) in [
        (&there, "whose contents are not those of the source's"),
        (&plain, "has no backing file"),
        (&missing, "does not exist"),
    ]
    .into_iter()
    .enumerate()
    {
        let (_destination, uri) = incoming(dir.path(), &format!("d{index}"), &[drive(path, "")]);
        migrate(&mut source, &uri, "inc");
        let info = source.wait_migrated("failed");
        let error = info["error-desc"].as_str().unwrap();
        assert!(error.contains(reason), "{error}");
        assert!(error.contains("\"disk0\""), "{error}");
        wait_progress(&source, 50);
    }
    assert!(std::fs::read(&there).unwrap() == before);
    assert!(!missing.exists());
}

#[test]
fn an_image_that_does_not_fit_is_refused() {
    require_kvm!();
    let dir = scratch();
    let here = new_image(dir.path(), "here", Format::Raw);
    let small = dir.path().join("small");
    Image::create(&small, Format::Raw, CAPACITY / 2, None, Cache::Writeback).unwrap();
    let mut source = run(dir.path(), "src", busy(), &[drive(&here, "")]);
    for (index, (path, reason)) in [
        (&small, "give an image of the right size"),
        // The guest's own image: it is in use.
        (&here, "is another process using the image"),
    ]
    .into_iter()
    .enumerate()
    {
        let (_destination, uri) = incoming(dir.path(), &format!("d{index}"), &[drive(path, "")]);
        migrate(&mut source, &uri, "blk");
        let info = source.wait_migrated("failed");
        let error = info["error-desc"].as_str().unwrap();
        assert!(error.contains(reason), "{error}");
        wait_progress(&source, 50);
    }
    finish(source, &[&here]);
}

#[test]
fn cut_at_any_phase_the_source_goes_on_and_a_retry_gives_equal_disks() {
    require_kvm!();
    fails_at_any_phase(Then::Cut);
}

#[test]
fn with_the_destination_killed_at_any_phase_too() {
    require_kvm!();
    fails_at_any_phase(Then::Wait);
}

/// At each phase the connection is cut, or the destination is killed.
fn fails_at_any_phase(then: Then) {
    let dir = scratch();
    let here = new_image(dir.path(), "here", Format::Qcow2);
    let there = dir.path().join("there");
    let mut source = run(dir.path(), "src", busy(), &[drive(&here, "")]);
    wait_progress(&source, 500);
    let places = [
        (kind::HELLO, 0),
        (kind::BLOCKS, 0),
        (kind::BLOCKS, 3),
        (kind::FLUSH, 0),
        (kind::FLUSHED, 0),
        (kind::PAGES, 1),
        (kind::STATE, 1),
        (kind::END, 0),
        (kind::READY, 0),
    ];
    for (index, (kind, nth)) in places.into_iter().enumerate() {
        if kind == kind::READY && matches!(then, Then::Wait) {
            // It has been said: the source hands over, and doesn't know what became of it.
            continue;
        }
        let (mut destination, uri) =
            incoming(dir.path(), &format!("d{index}"), &[drive(&there, "")]);
        let proxy = FrameProxy::to(&uri, Some((kind, nth, then)));
        migrate(&mut source, &proxy.uri, "blk");
        proxy.wait_reached();
        if matches!(then, Then::Wait) {
            destination.process.kill().unwrap();
            proxy.go_on();
        }
        source.wait_migrated("failed");
        assert_eq!(source.status(), "running", "cut at {kind:#x}, {nth}");
        if matches!(then, Then::Cut) {
            destination.wait_exit();
        }
        wait_progress(&source, 50);
        let output = refused_start(dir.path(), &format!("x{index}"), &[drive(&here, "")]);
        assert!(output.contains("is another process"), "{output}");
    }
    let (mut destination, uri) = incoming(dir.path(), "last", &[drive(&there, "")]);
    destination.execute("stop", Value::Null);
    migrate(&mut source, &uri, "blk");
    source.wait_migrated("completed");
    arrived(source, destination, &here, &there);
}

#[test]
fn a_killed_destination_leaves_the_disk_at_the_source() {
    require_kvm!();
    let dir = scratch();
    let here = new_image(dir.path(), "here", Format::Raw);
    let there = dir.path().join("there");
    let mut source = run(dir.path(), "src", busy(), &[drive(&here, "")]);
    wait_progress(&source, 500);
    source.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 4 << 20 }),
    );
    let (mut destination, uri) = incoming(dir.path(), "d0", &[drive(&there, "")]);
    migrate(&mut source, &uri, "blk");
    let moving = |info: &Value| info["disk"]["transferred"].as_u64() > Some(1 << 20);
    source.wait_migration("some of the disk", moving);
    destination.wait_migration("some of the disk", moving);
    destination.process.kill().unwrap();
    source.wait_migrated("failed");
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }));
    wait_progress(&source, 100);
    let (destination, uri) = incoming(dir.path(), "d1", &[drive(&there, "")]);
    migrate(&mut source, &uri, "blk");
    source.wait_migrated("completed");
    wait_progress(&destination, 200);
    finish(destination, &[&there]);
}

#[test]
fn a_disk_that_the_guest_only_reads_does_not_travel() {
    require_kvm!();
    let dir = scratch();
    let path = new_image(dir.path(), "cd", Format::Raw);
    let options = |mode| Options { mode, ..busy() };
    let filling = run(dir.path(), "fill", options(Mode::Fill), &[drive(&path, "")]);
    wait_report(&filling, |report| {
        matches!(report, Report::Filled { .. }).then_some(())
    });
    filling.quit();
    let drives = [drive(&path, ",readonly=on")];
    let mut source = run(dir.path(), "src", options(Mode::Read), &drives);
    wait_progress(&source, 100);
    let (destination, uri) = incoming(dir.path(), "dst", &drives);
    migrate(&mut source, &uri, "blk");
    let info = source.wait_migrated("completed");
    assert_eq!(info["disk"], Value::Null, "{info:#}");
    wait_progress(&destination, 100);
}

#[test]
fn without_room_nothing_is_copied_and_the_source_goes_on() {
    require_kvm!();
    let dir = scratch();
    let Some(small) = Small::mount(dir.path()) else {
        return;
    };
    let here = new_image(dir.path(), "here", Format::Raw);
    let there = small.0.join("there");
    let mut source = run(dir.path(), "src", busy(), &[drive(&here, "")]);
    wait_progress(&source, 1_000);
    // By the disk's size, before the first block.
    let (mut destination, uri) = incoming(dir.path(), "d0", &[drive(&there, "")]);
    migrate(&mut source, &uri, "blk");
    let info = source.wait_migrated("failed");
    let error = info["error-desc"].as_str().unwrap();
    assert!(
        error.contains("the disks need 33554432 bytes in"),
        "{error}"
    );
    assert!(error.contains("overcommit=on"), "{error}");
    assert!(!there.exists());
    destination.wait_exit();
    // By what it takes: that is too much here, too.
    while std::fs::metadata(&here).unwrap().blocks() * 512 < 16 << 20 {
        wait_progress(&source, 100);
    }
    let (mut destination, uri) = incoming(dir.path(), "d1", &[drive(&there, ",overcommit=on")]);
    migrate(&mut source, &uri, "blk");
    source.wait_migrated("failed");
    destination.wait_exit();
    // There was room, but somebody else takes it meanwhile.
    small.make_room();
    source.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 4 << 20 }),
    );
    let (mut destination, uri) = incoming(dir.path(), "d2", &[drive(&there, "")]);
    migrate(&mut source, &uri, "blk");
    source.wait_migration("some of the disk", |info| {
        info["disk"]["transferred"].as_u64() > Some(1 << 20)
    });
    let other = std::fs::File::create(small.0.join("other")).unwrap();
    let mut at = 0;
    while std::os::unix::fs::FileExt::write_at(&other, &[1; 65536], at).is_ok() {
        at += 65536;
    }
    drop(other);
    source.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }));
    let info = source.wait_migrated("failed");
    let error = info["error-desc"].as_str().unwrap();
    assert!(error.contains("No space left on device"), "{error}");
    assert!(error.contains("disk0"), "{error}");
    destination.wait_exit();
    wait_progress(&source, 100);
    std::fs::remove_file(small.0.join("other")).unwrap();
    let (destination, uri) = incoming(dir.path(), "d3", &[drive(&there, "")]);
    migrate(&mut source, &uri, "blk");
    source.wait_migrated("completed");
    wait_progress(&destination, 100);
    finish(destination, &[&there]);
}
