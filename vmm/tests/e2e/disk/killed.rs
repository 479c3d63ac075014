//! Processes that are killed while their guest writes: the image can be used again.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use guest_tests::Size;
use guest_tests::disk::Options;
use guest_tests::driver::skip;

use super::{CAPACITY, busy, drive, finish, run, wait_progress};
use crate::harness::{require_kvm, scratch};

/// How often a process is killed.
const TIMES: u64 = 6;

fn qemu_img(arguments: &[&str], path: &Path) -> Option<Output> {
    let mut command = Command::new("qemu-img");
    let answer = command.args(arguments).arg(path).output();
    answer
        .map_err(|err| skip(&format!("qemu-img: {err}; install the package qemu-utils")))
        .ok()
}

/// An image of QEMU's. Small clusters make for many tables.
fn new_image(dir: &Path, options: &str) -> Option<PathBuf> {
    let path = dir.join("disk");
    let options = format!("size={CAPACITY},{options}");
    let made = qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options], &path)?;
    assert!(made.status.success(), "{made:?}");
    Some(path)
}

/// After how many requests a process is killed: anything will do.
fn some_requests(round: u64) -> u64 {
    let now = std::time::SystemTime::now();
    let since = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    1 + (u64::from(since.subsec_nanos()) / 1000 + round * 97) % 400
}

fn killed_and_used_again(options: &str, marked: bool) {
    for round in 0..TIMES {
        let dir = scratch();
        let Some(path) = new_image(dir.path(), options) else {
            return;
        };
        let drives = [drive(&path, ",format=qcow2")];
        let work = Options {
            max: Size(32 << 10),
            seed: 1 + round,
            interval: 10,
            ..busy()
        };
        for killed in ["a", "b"] {
            let mut ferry = run(dir.path(), killed, work, &drives);
            wait_progress(&ferry, some_requests(round));
            ferry.process.kill().unwrap();
            assert_eq!(is_dirty(&path), marked, "{options}");
        }
        let last = run(dir.path(), "c", work, &drives);
        wait_progress(&last, 200);
        let output = last.process.output();
        assert_eq!(
            output.contains("have been put right"),
            marked || output.contains("raised")
        );
        finish(last, &[&path]);
        let check = qemu_img(&["check"], &path).unwrap();
        assert!(check.status.success(), "{options}: {check:?}\n{output}");
    }
}

fn is_dirty(path: &Path) -> bool {
    let header = std::fs::read(path).unwrap();
    header[7] == 3 && header[79] & 1 != 0
}

#[test]
fn a_qcow2_image_is_repaired() {
    require_kvm!();
    killed_and_used_again("cluster_size=4k", true);
    killed_and_used_again("cluster_size=64k", true);
}

#[test]
fn a_qcow2_image_of_version_2_is_counted_anew() {
    require_kvm!();
    killed_and_used_again("cluster_size=4k,compat=0.10", false);
    killed_and_used_again("cluster_size=64k,compat=0.10", false);
}
