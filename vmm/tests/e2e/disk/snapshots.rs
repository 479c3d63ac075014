//! `savevm`, `loadvm`, `delvm`, `info snapshots` and `--loadvm`, with the guest that knows what its
//! disks must hold.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use devices::image::{Cache, Format, Image, NewBacking};
use guest_tests::Size;
use guest_tests::disk::{Options, Report};
use serde_json::{Value, json};

use super::space::Small;
use super::{
    CAPACITY, DiskGuest, arguments, busy, drive, finish, guest, incoming, new_image, run, slowly,
    wait_progress, wait_report,
};
use crate::harness::{Ferry, PATIENCE, require_kvm, scratch};

/// Runs a line of the monitor's; returns what it prints.
fn monitor(ferry: &mut Ferry, line: &str) -> String {
    let answer = ferry.execute("human-monitor-command", json!({ "command-line": line }));
    answer.as_str().unwrap().to_owned()
}

/// The same for one that must succeed and then says nothing.
fn does(ferry: &mut Ferry, line: &str) {
    let answer = monitor(ferry, line);
    assert_eq!(answer, "", "{line}\n{}", ferry.process.output());
}

/// What is beside the images of the snapshots and their makings, by name.
fn files(dir: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            [".snapshot", ".state", ".disk", ".tmp"]
                .iter()
                .any(|end| name.ends_with(end))
        })
        .collect();
    files.sort();
    files
}

/// The file of that kind.
fn file(dir: &Path, end: &str) -> PathBuf {
    let files = files(dir);
    let mut found = files
        .iter()
        .filter(|path| path.to_string_lossy().ends_with(end));
    match (found.next(), found.next()) {
        (Some(path), None) => path.clone(),
        _ => panic!("not one {end}: {files:?}"),
    }
}

/// The guest's disk goes back with it again and again, here and in another process.
fn goes_back(dir: &Path, drives: &[String], paths: &[&Path]) {
    let mut ferry = run(dir, "first", busy(), drives);
    wait_progress(&ferry, 500);
    assert_eq!(
        monitor(&mut ferry, "info snapshots"),
        "There is no snapshot available.\n"
    );
    does(&mut ferry, "savevm before");
    assert_eq!(ferry.status(), "running");
    wait_progress(&ferry, 500);
    for _ in 0..2 {
        does(&mut ferry, "loadvm before");
        assert_eq!(ferry.status(), "running");
        wait_progress(&ferry, 500);
    }
    // It replaces the first one.
    does(&mut ferry, "savevm before");
    wait_progress(&ferry, 500);
    does(&mut ferry, "loadvm before");
    wait_progress(&ferry, 500);
    // It is killed: whatever its images are like now, they are replaced.
    drop(ferry);

    let mut options = vec!["--loadvm", "before"];
    options.extend(arguments(drives));
    let mut ferry = Ferry::start(dir, "second", &options);
    ferry.wait_status("running");
    wait_progress(&ferry, 500);
    let list = monitor(&mut ferry, "info snapshots");
    assert!(
        list.lines().count() == 3 && list.contains(" before "),
        "{list}"
    );
    does(&mut ferry, "loadvm before");
    wait_progress(&ferry, 500);
    assert_eq!(files(dir).len(), 2 + paths.len());
    does(&mut ferry, "delvm before");
    assert!(files(dir).is_empty(), "{:?}", files(dir));
    let gone = monitor(&mut ferry, "loadvm before");
    assert!(gone.contains("does not exist"), "{gone}");
    finish(ferry, paths);
}

#[test]
fn a_raw_disk_goes_back_with_its_guest() {
    require_kvm!();
    let dir = scratch();
    let path = new_image(dir.path(), "disk", Format::Raw);
    goes_back(dir.path(), &[drive(&path, ",format=raw")], &[&path]);
}

#[test]
fn qcow2_disks_go_back_with_their_guest() {
    require_kvm!();
    let dir = scratch();
    let base = new_image(dir.path(), "base", Format::Raw);
    let above = dir.path().join("above");
    let backing = NewBacking {
        name: base.display().to_string(),
        format: Format::Raw,
    };
    Image::create(
        &above,
        Format::Qcow2,
        CAPACITY,
        Some(&backing),
        Cache::Writeback,
    )
    .unwrap();
    let direct = new_image(dir.path(), "direct", Format::Qcow2);
    let drives = [
        drive(&above, ",format=qcow2"),
        drive(&direct, ",format=qcow2,cache=none"),
    ];
    goes_back(dir.path(), &drives, &[&above, &direct]);
}

#[test]
fn a_guest_runs_after_loading_only_if_it_ran_before() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw")]);
    let mut ferry = guest.run("src", busy());
    wait_progress(&ferry, 100);
    ferry.execute("stop", Value::Null);
    // A name is made up.
    does(&mut ferry, "savevm");
    assert_eq!(ferry.status(), "paused");
    let list = monitor(&mut ferry, "info snapshots");
    let tag = list.split_whitespace().find(|word| word.starts_with("vm-"));
    let tag = tag.unwrap_or_else(|| panic!("{list}")).to_owned();
    assert_eq!(tag.len(), "vm-YYYYMMDDhhmmss".len());
    ferry.execute("cont", Value::Null);
    wait_progress(&ferry, 100);
    does(&mut ferry, &format!("loadvm {tag}"));
    assert_eq!(ferry.status(), "running");
    wait_progress(&ferry, 100);
    ferry.execute("stop", Value::Null);
    does(&mut ferry, &format!("loadvm {tag}"));
    assert_eq!(ferry.status(), "paused");
    ferry.execute("cont", Value::Null);
    wait_progress(&ferry, 100);
    guest.finish(ferry);
}

#[test]
fn the_network_card_keeps_its_tap() {
    require_kvm!();
    if !crate::net::in_a_network() {
        return;
    }
    let dir = scratch();
    let path = new_image(dir.path(), "disk", Format::Raw);
    let mut options = vec!["--disk".to_owned(), drive(&path, ",format=raw")];
    options.extend(crate::net::with_tap("tap0"));
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let mut ferry = Ferry::run(dir.path(), "src", &guest(busy()), &options);
    wait_progress(&ferry, 100);
    does(&mut ferry, "savevm a");
    for _ in 0..2 {
        does(&mut ferry, "loadvm a");
        wait_progress(&ferry, 100);
    }
    finish(ferry, &[&path]);
}

#[test]
fn what_is_no_snapshot_any_more_is_refused_and_the_guest_runs_on() {
    require_kvm!();
    let guest = DiskGuest::on(&[(Format::Raw, ",format=raw")]);
    let dir = guest.dir.path();
    let mut ferry = guest.run("src", busy());
    wait_progress(&ferry, 100);
    does(&mut ferry, "savevm a");
    let kinds = ["a.snapshot", ".state", ".disk"];
    let paths = kinds.map(|end| file(dir, end));
    let refused = |ferry: &mut Ferry, why: &str| {
        let answer = monitor(ferry, "loadvm a");
        assert!(
            answer.starts_with("Error: Could not load snapshot 'a': ") && answer.contains(why),
            "{why}: {answer}"
        );
        assert_eq!(ferry.status(), "running");
        wait_progress(ferry, 50);
    };
    let listed = |ferry: &mut Ferry, why: &str| {
        let list = monitor(ferry, "info snapshots");
        assert!(
            list.contains("'a' can't be loaded: ") && list.contains(why),
            "{why}: {list}"
        );
    };
    for (path, cut, foreign) in [
        (&paths[0], "corrupted", "is no snapshot of Ferry's"),
        (&paths[1], "cut off", "it is an ELF file"),
        (
            &paths[2],
            "is not the file that was saved",
            "is not the file that was saved",
        ),
    ] {
        let open = || File::options().read(true).write(true).open(path).unwrap();
        // A copy, so that the whole file comes back.
        let whole = dir.join("whole");
        fs::copy(path, &whole).unwrap();
        let len = open().metadata().unwrap().len();
        open().set_len(len - 1).unwrap();
        refused(&mut ferry, cut);
        listed(&mut ferry, cut);
        fs::write(path, b"\x7fELF").unwrap();
        refused(&mut ferry, foreign);
        listed(&mut ferry, foreign);
        fs::remove_file(path).unwrap();
        refused(
            &mut ferry,
            if path == &paths[0] {
                "does not exist"
            } else {
                "No such file"
            },
        );
        fs::rename(&whole, path).unwrap();
    }
    // Where the guest's program is; the image's first bytes; the state of another snapshot.
    for (path, at, why) in [
        (
            &paths[1],
            4096 + (1 << 20),
            "at 0x100000 doesn't match its checksum",
        ),
        (&paths[2], 0, "checksum"),
    ] {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
        refused(&mut ferry, why);
        file.write_all_at(&byte, at).unwrap();
    }
    does(&mut ferry, "savevm b");
    let other = files(dir)
        .into_iter()
        .find(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.contains(".b.") && name.ends_with(".state")
        })
        .unwrap();
    let whole = dir.join("whole");
    fs::rename(&paths[1], &whole).unwrap();
    fs::copy(&other, &paths[1]).unwrap();
    refused(&mut ferry, "is not the file that was saved");
    listed(&mut ferry, "is not the file that was saved");
    fs::rename(&whole, &paths[1]).unwrap();
    does(&mut ferry, "delvm b");

    assert_eq!(files(dir).len(), 3, "{:?}", files(dir));
    does(&mut ferry, "loadvm a");
    wait_progress(&ferry, 100);
    guest.finish(ferry);
}

#[test]
fn without_space_guest_and_older_snapshot_stay() {
    require_kvm!();
    let dir = scratch();
    let Some(small) = Small::mount(dir.path()) else {
        return;
    };
    small.make_room();
    let path = new_image(&small.0, "disk", Format::Raw);
    // It takes that much, and stays so.
    fs::write(&path, vec![0; 4 << 20]).unwrap();
    let drives = [drive(&path, ",format=raw")];
    let options = Options {
        area: Size(4 << 20),
        discards: 0,
        zeroes: 0,
        ..busy()
    };
    let mut ferry = run(dir.path(), "src", options, &drives);
    wait_progress(&ferry, 500);
    does(&mut ferry, "savevm a");
    let before = files(&small.0);
    let ballast = small.0.join("ballast");
    let mut file = File::create(&ballast).unwrap();
    // As much as there is, and then room for the state, but not for the copy of the disk.
    let state = before
        .iter()
        .find(|path| path.extension() == Some("state".as_ref()));
    let state = fs::metadata(state.unwrap()).unwrap().blocks() * 512;
    while file.write_all(&[1; 64 << 10]).is_ok() {}
    let len = file.metadata().unwrap().len();
    for room in [0, state / 2, state + (1 << 20)] {
        file.set_len(len - room).unwrap();
        let answer = monitor(&mut ferry, "savevm a");
        assert!(answer.contains("Could not save snapshot 'a'"), "{answer}");
        assert!(
            answer.contains("No space left") || answer.contains("are free"),
            "{answer}"
        );
        assert_eq!(files(&small.0), before);
        if ferry.status() == "io-error" {
            ferry.execute("cont", Value::Null);
        }
    }
    drop(file);
    fs::remove_file(&ballast).unwrap();
    if ferry.status() == "io-error" {
        ferry.execute("cont", Value::Null);
    }
    wait_progress(&ferry, 100);
    does(&mut ferry, "loadvm a");
    wait_progress(&ferry, 100);
    does(&mut ferry, "savevm a");
    does(&mut ferry, "loadvm a");
    wait_progress(&ferry, 100);
    finish(ferry, &[&path]);
}

#[test]
fn what_cannot_be_saved_is_refused() {
    require_kvm!();
    let dir = scratch();
    // Paused: without a disk that guest has nothing to do, and ends.
    let mut none = Ferry::run(dir.path(), "none", &guest(busy()), &["--paused"]);
    for line in ["savevm a", "loadvm a", "delvm a", "info snapshots"] {
        let answer = monitor(&mut none, line);
        assert_eq!(answer, "Error: No block device can accept snapshots\n");
    }
    none.quit();

    let path = new_image(dir.path(), "disk", Format::Raw);
    let drives = [drive(&path, ",format=raw")];
    let mut ferry = run(dir.path(), "src", busy(), &drives);
    for tag in ["../a", ".a", "\"a b\""] {
        let answer = monitor(&mut ferry, &format!("savevm {tag}"));
        assert!(answer.contains("can't be the name"), "{answer}");
    }
    does(&mut ferry, "savevm a");
    let answer = monitor(&mut ferry, "delvm b");
    assert!(answer.contains("'b' does not exist"), "{answer}");

    // Not while it moves, nor where it has gone.
    let (mut destination, uri) = incoming(dir.path(), "dst", &drives);
    let answer = monitor(&mut destination, "loadvm a");
    assert!(answer.contains("incoming migration"), "{answer}");
    ferry.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 1 << 20 }),
    );
    ferry.migrate(&uri);
    for line in ["savevm b", "loadvm a", "delvm a"] {
        let answer = monitor(&mut ferry, line);
        assert!(answer.contains("migration process in progress"), "{answer}");
    }
    slowly(&mut ferry);
    ferry.wait_migrated("completed");
    for line in ["savevm b", "loadvm a", "delvm a"] {
        let answer = monitor(&mut ferry, line);
        assert!(answer.contains("not here any more"), "{answer}");
    }
    wait_progress(&destination, 100);
    does(&mut destination, "loadvm a");
    wait_progress(&destination, 100);

    // Nobody else may have the disks, with a snapshot or without.
    let mut options = vec![
        "run",
        "--serial",
        "none",
        "--monitor",
        "none",
        "--loadvm",
        "a",
    ];
    options.extend(arguments(&drives));
    let log = dir.path().join("second.log");
    let mut second =
        guest_tests::driver::process::Process::spawn(crate::harness::ferry(), options, &log)
            .unwrap();
    let status = second.wait(PATIENCE).unwrap();
    let output = second.output();
    assert!(status.is_some_and(|status| !status.success()), "{output}");
    assert!(output.contains("lock"), "{output}");
    wait_report(&destination, |report| {
        matches!(report, Report::Status { .. }).then_some(())
    });
    finish(destination, &[&path]);
}
