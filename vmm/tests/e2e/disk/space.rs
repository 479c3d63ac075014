//! A host without space: the guest is stopped, and loses nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use devices::image::Format;
use guest_tests::disk::{Mode, Options, Report};
use guest_tests::driver::skip;
use serde_json::Value;

use super::{
    busy, drive, finish, guest, hop, incoming, new_image, wait_error_event, wait_progress,
    wait_report,
};
use crate::harness::{Ferry, PATIENCE, require_kvm, scratch};

/// A file system in memory that is too small at first.
pub struct Small(pub PathBuf);

impl Small {
    /// `None`, with a word about it, where it can't be mounted.
    pub fn mount(dir: &Path) -> Option<Self> {
        let at = dir.join("small");
        std::fs::create_dir(&at).unwrap();
        if mount(&["-t", "tmpfs", "-o", "size=12M", "tmpfs"], &at) {
            Some(Self(at))
        } else {
            skip("a tmpfs can't be mounted: needs root");
            None
        }
    }

    pub fn make_room(&self) {
        assert!(mount(&["-o", "remount,size=80M"], &self.0));
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily: a process that is being killed may still have it open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(options: &[&str], at: &Path) -> bool {
    let status = Command::new("mount").args(options).arg(at).status();
    status.is_ok_and(|status| status.success())
}

fn fill() -> Options {
    Options {
        mode: Mode::Fill,
        ..busy()
    }
}

/// Starts the guest and waits until there is no space left for it.
pub fn run_full(dir: &Path, drives: &[String]) -> Ferry {
    let mut ferry = Ferry::run(dir, "src", &guest(fill()), &super::arguments(drives));
    let error = wait_error_event(&mut ferry);
    assert_eq!(error["action"], "stop", "{error}");
    assert_eq!(error["nospace"], true, "{error}");
    assert_eq!(error["device"], "disk0", "{error}");
    assert_eq!(error["operation"], "write", "{error}");
    ferry.qmp.wait_event("STOP", PATIENCE).unwrap();
    assert_eq!(ferry.status(), "io-error");
    assert_eq!(io_status(&mut ferry), "nospace");
    ferry
}

/// Of the first disk.
fn io_status(ferry: &mut Ferry) -> String {
    let disks = ferry.execute("query-block", Value::Null);
    assert_eq!(disks[0]["device"], "disk0", "{disks}");
    disks[0]["io-status"].as_str().unwrap().to_owned()
}

pub fn wait_filled(ferry: &Ferry) {
    wait_report(ferry, |report| {
        matches!(report, Report::Filled { .. }).then_some(())
    });
}

fn room_is_made_and_it_goes_on(format: Format) {
    let dir = scratch();
    let Some(small) = Small::mount(dir.path()) else {
        return;
    };
    let path = new_image(&small.0, "disk", format);
    let drives = [drive(&path, &format!(",format={format}"))];
    let mut ferry = run_full(dir.path(), &drives);
    // Too early: it stops again.
    ferry.execute("cont", Value::Null);
    let error = wait_error_event(&mut ferry);
    assert_eq!(error["action"], "stop", "{error}");
    ferry.wait_status("io-error");
    small.make_room();
    ferry.execute("cont", Value::Null);
    wait_filled(&ferry);
    assert_eq!(ferry.status(), "running");
    assert_eq!(io_status(&mut ferry), "ok");
    wait_progress(&ferry, 100);
    finish(ferry, &[&path]);
}

#[test]
fn a_raw_image_goes_on_when_there_is_room() {
    require_kvm!();
    room_is_made_and_it_goes_on(Format::Raw);
}

#[test]
fn a_qcow2_image_goes_on_when_there_is_room() {
    require_kvm!();
    room_is_made_and_it_goes_on(Format::Qcow2);
}

#[test]
fn the_guest_moves_with_the_request_that_found_no_space() {
    require_kvm!();
    let dir = scratch();
    let Some(small) = Small::mount(dir.path()) else {
        return;
    };
    let path = new_image(&small.0, "disk", Format::Raw);
    let drives = [drive(&path, ",format=raw")];
    let source = run_full(dir.path(), &drives);
    let mut destination = hop(source, dir.path(), "dst", &drives);
    assert_eq!(destination.status(), "paused");
    destination.execute("cont", Value::Null);
    let error = wait_error_event(&mut destination);
    assert_eq!(error["action"], "stop", "{error}");
    destination.wait_status("io-error");
    small.make_room();
    destination.execute("cont", Value::Null);
    wait_filled(&destination);
    wait_progress(&destination, 100);
    finish(destination, &[&path]);
}

#[test]
fn a_migration_that_fails_leaves_it_stopped_for_want_of_space() {
    require_kvm!();
    let dir = scratch();
    let Some(small) = Small::mount(dir.path()) else {
        return;
    };
    let path = new_image(&small.0, "disk", Format::Raw);
    let drives = [drive(&path, ",format=raw")];
    let mut source = run_full(dir.path(), &drives);
    let (mut destination, uri) = incoming(dir.path(), "dst", &[]);
    source.migrate(&uri);
    source.wait_migrated("failed");
    destination.wait_exit();
    assert_eq!(source.status(), "io-error");
    small.make_room();
    source.execute("cont", Value::Null);
    wait_filled(&source);
    finish(source, &[&path]);
}
