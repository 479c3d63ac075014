//! A guest goes into a file, and comes out of it; and files that are not what they should be.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use guest_tests::driver::skip;
use migration::destination::Arrival;
use migration::layout::PAGE_SIZE;
use migration::progress::Status;
use migration::snapshot::{self, LoadError, Snapshot, SnapshotError, TransferError};
use migration::source::{Guest, Outcome};
use tempfile::TempDir;

use crate::disks::FakeDisk;
use crate::machine::{Destination, Source, Writes, address, assert_same};
use crate::whole::{BUSY_SMALL, destination_job, source_job};

const HEADER: u64 = 4096;
const ENTRY: u64 = 2116;

fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.snapshot");
    (directory, path)
}

/// What is in the directory of the snapshot.
fn files(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path.parent().unwrap()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

fn save(vm: &mut Source, path: &Path) {
    let outcome = snapshot::save(vm, path, &source_job());
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert!(!vm.is_running());
}

fn try_load(path: &Path) -> (Destination, Result<Arrival, LoadError>) {
    let mut destination = Destination::default();
    let result = Snapshot::open(path)
        .map_err(|error| LoadError::File(error.into()))
        .and_then(|file| snapshot::load(&mut destination, file, &destination_job()));
    (destination, result)
}

/// Loads a file that must be refused, and returns why.
fn refused(path: &Path) -> SnapshotError {
    let (destination, result) = try_load(path);
    assert!(destination.started.is_none() && destination.ram.is_none());
    match result {
        Err(LoadError::File(TransferError::Snapshot(error))) => error,
        other => panic!("{other:?}"),
    }
}

fn assert_loads(path: &Path, vm: &Source, ran: bool) {
    let (destination, result) = try_load(path);
    result.unwrap();
    assert_same(&vm.ram, destination.ram.as_ref().unwrap());
    assert!(destination.sections == vm.state);
    assert!(destination.offer.as_ref().unwrap().configuration == vm.configuration);
    for (blob, (_, data)) in destination.blobs.iter().zip(&vm.blobs) {
        assert!(*blob.lock().unwrap() == *data);
    }
    let start = destination.started.unwrap();
    assert_eq!(start.run, ran);
    // The guest is not told of the time in the file.
    assert!(start.stopped_for < Duration::from_secs(1), "{start:?}");
}

/// A guest so small that its file can be damaged everywhere, saved.
fn small() -> (TempDir, PathBuf, Source) {
    let (directory, path) = place();
    let mut vm = Source::new(20, 4);
    vm.blobs = vec![("kernel".to_owned(), vec![5; 100])];
    for section in &mut vm.state {
        section.body.truncate(50);
    }
    save(&mut vm, &path);
    (directory, path, vm)
}

#[test]
fn an_idle_guest_is_loaded_as_it_was() {
    let (_directory, path) = place();
    let mut vm = Source::new(1000, 700);
    save(&mut vm, &path);
    assert_loads(&path, &vm, false);
    // As often as one likes.
    assert_loads(&path, &vm, false);
    assert_eq!(files(&path), ["guest.snapshot"]);
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    // Two thirds of the pages are zero, and take no place.
    let allocated = metadata.blocks() * 512;
    assert!(allocated < 700 * PAGE_SIZE + 4_000_000, "{allocated}");
}

#[test]
fn a_guest_that_runs_is_stopped_last() {
    let (_directory, path) = place();
    let mut vm = Source::new(1111, 3333);
    vm.run(BUSY_SMALL);
    let job = source_job();
    let outcome = snapshot::save(&mut vm, &path, &job);
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert_loads(&path, &vm, true);
    let told = job.progress.snapshot();
    assert_eq!(told.status, Status::Completed);
    assert_eq!(told.ram.total, 4444 * PAGE_SIZE);
    assert!(
        told.rounds.len() >= 2 && told.downtime.is_some(),
        "{told:?}"
    );
    let calls = [
        "offer",
        "start_dirty_log",
        "pause",
        "save",
        "release",
        "stop_dirty_log",
    ];
    assert_eq!(vm.calls(), calls);
}

#[test]
fn a_file_is_replaced_only_by_a_whole_one() {
    let (directory, path) = place();
    let mut first = Source::new(100, 0);
    save(&mut first, &path);
    let mut second = Source::new(400, 150);
    second.hook = Box::new(|call| match call {
        "save" => Err("this device can't be saved".into()),
        _ => Ok(()),
    });
    second.run(BUSY_SMALL);
    let outcome = snapshot::save(&mut second, &path, &source_job());
    let Outcome::Failed { error, guest } = outcome else {
        panic!("{outcome:?}")
    };
    assert!(error.to_string().contains("this device"), "{error}");
    assert!(matches!(guest, Guest::Resumed) && second.is_running());
    assert_loads(&path, &first, false);
    assert_eq!(files(&path), ["guest.snapshot"]);

    // Through a link, which stays one.
    second.hook = Box::new(|_| Ok(()));
    let link = directory.path().join("link");
    symlink(&path, &link).unwrap();
    save(&mut second, &link);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_loads(&path, &second, true);
}

#[test]
fn pages_that_become_zero_are_zero() {
    let (_directory, path) = place();
    let mut vm = Source::new(600, 0);
    let (ram, layout) = (vm.ram.clone(), vm.layout.clone());
    let write = vm.writer();
    let mut harvests = 0;
    vm.hook = Box::new(move |call| {
        if call == "harvest" && harvests < 2 {
            harvests += 1;
            // Page 3 has data; it is logged as written, then cleared.
            write(3);
            let zeroes = [0; PAGE_SIZE as usize];
            vm_memory::Bytes::write_slice(&ram, &zeroes, address(&layout, 3)).unwrap();
        }
        Ok(())
    });
    vm.run(Writes {
        pages: 300,
        ..BUSY_SMALL
    });
    save(&mut vm, &path);
    assert_loads(&path, &vm, true);
}

#[test]
fn cancelled_in_any_step_nothing_is_left() {
    for step in [
        "offer",
        "start_dirty_log",
        "protect",
        "harvest",
        "pause",
        "save",
        "release",
    ] {
        let (_directory, path) = place();
        let mut vm = Source::new(400, 100);
        vm.run(BUSY_SMALL);
        let job = source_job();
        let cancel = job.cancel.clone();
        vm.hook = Box::new(move |call| {
            if call == step {
                let _ = cancel.cancel("by the user");
            }
            Ok(())
        });
        let outcome = snapshot::save(&mut vm, &path, &job);
        assert!(
            matches!(&outcome, Outcome::Cancelled { reason, .. } if reason == "by the user"),
            "{step}: {outcome:?}"
        );
        assert!(vm.is_running(), "{step}");
        assert!(files(&path).is_empty(), "{step}: {:?}", files(&path));
    }
}

#[test]
fn what_cannot_be_saved_is_told() {
    let (directory, path) = place();
    let told = |vm: &mut Source, path: &Path| {
        let outcome = snapshot::save(vm, path, &source_job());
        let Outcome::Failed { error, guest } = outcome else {
            panic!("{outcome:?}")
        };
        assert!(matches!(guest, Guest::Untouched), "{guest:?}");
        error.to_string()
    };
    let mut vm = Source::new(10, 0);
    let error = told(&mut vm, directory.path());
    assert!(error.contains("is not a regular file"), "{error}");
    let error = told(&mut vm, &directory.path().join("missing/file"));
    assert!(error.contains("No such file"), "{error}");
    let mut vm = Source::with_disks(10, vec![FakeDisk::sparse("vda", 1 << 20)]);
    let error = told(&mut vm, &path);
    assert!(error.contains("disks can't travel in a file"), "{error}");
    assert!(files(&path).is_empty());
}

/// A file system of 2 MiB, unmounted in the end.
struct Tiny(TempDir);

impl Tiny {
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
            .arg(directory.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(directory)),
            other => {
                skip(&format!("cannot mount a small tmpfs: {other:?}"));
                None
            }
        }
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).output();
    }
}

#[test]
fn a_full_disk_leaves_the_guest_running() {
    let Some(tiny) = Tiny::mount() else { return };
    let path = tiny.0.path().join("guest");
    let mut vm = Source::new(3000, 0);
    vm.blobs.clear();
    vm.run(BUSY_SMALL);
    let outcome = snapshot::save(&mut vm, &path, &source_job());
    let Outcome::Failed { error, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert!(error.to_string().contains("No space left"), "{error}");
    assert!(vm.is_running());
    assert!(files(&path).is_empty());
}

#[test]
fn a_truncated_file_is_refused() {
    let (_directory, path, _vm) = small();
    let file = File::options().write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    let copy = path.with_extension("copy");
    for cut in (0..len).step_by(509).chain(len - 20..len) {
        fs::copy(&path, &copy).unwrap();
        File::options()
            .write(true)
            .open(&copy)
            .unwrap()
            .set_len(cut)
            .unwrap();
        match refused(&copy) {
            SnapshotError::Length { len, stated, .. } => assert!(len == cut && stated > cut),
            SnapshotError::Foreign { .. } => assert!(cut < 8),
            other => panic!("{cut}: {other}"),
        }
    }
    file.set_len(len + 1).unwrap();
    let error = refused(&path).to_string();
    assert!(error.contains("added to"), "{error}");
}

/// Calls `check` with the file changed at `at` in one bit, and changes it back.
fn with_flipped(path: &Path, at: u64, check: impl FnOnce()) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
    check();
    file.write_all_at(&byte, at).unwrap();
}

#[test]
fn no_byte_can_change() {
    let (_directory, path, vm) = small();
    let table = HEADER + 24 * PAGE_SIZE;
    let blob = table + ENTRY;
    let end = fs::metadata(&path).unwrap().len();
    for at in (0..HEADER).chain(blob + 100..end) {
        with_flipped(&path, at, || {
            let error = Snapshot::open(&path).unwrap_err();
            match at {
                0..8 => assert!(matches!(error, SnapshotError::Foreign { .. }), "{error}"),
                8..12 => assert!(matches!(error, SnapshotError::Version { .. }), "{error}"),
                _ => assert!(
                    matches!(error, SnapshotError::Corrupted { .. }),
                    "{at}: {error}"
                ),
            }
        });
    }
    // What is checked while it is loaded: the table, the blob, and pages with data (every third).
    let pages = [0, 21].map(|page| HEADER + page * PAGE_SIZE);
    let data = pages.map(|page| (page..page + PAGE_SIZE).step_by(333));
    let table_and_blob = (table..blob + 100).step_by(23);
    for at in data.into_iter().flatten().chain(table_and_blob) {
        with_flipped(&path, at, || {
            let error = refused(&path);
            assert!(
                matches!(error, SnapshotError::Corrupted { .. }),
                "{at}: {error}"
            );
            if at >= pages[1] && at < table {
                let error = error.to_string();
                assert!(
                    error.contains("the page of memory at 0x100001000"),
                    "{error}"
                );
            }
        });
    }
    assert_loads(&path, &vm, false);
}

#[test]
fn foreign_files_are_refused_by_what_they_are() {
    let (directory, path) = place();
    for (contents, looks) in [
        (&b""[..], "is no snapshot of Ferry's: it is empty"),
        (b"hi", "it begins with [68, 69]"),
        (b"QEVM\0\0\0\x03", "of QEMU's"),
        (b"QFI\xfb", "a qcow2 image"),
        (b"\x7fELF", "an ELF file"),
        (b"\x89FERRY\r\n", "a recorded migration"),
        (&[0; 5000], "did not finish"),
    ] {
        fs::write(&path, contents).unwrap();
        let error = refused(&path).to_string();
        assert!(error.contains(looks), "{error}");
    }
    let error = refused(directory.path()).to_string();
    assert!(error.contains("is not a regular file"), "{error}");
    let error = refused(&directory.path().join("missing")).to_string();
    assert!(
        error.contains("cannot read") && error.contains("No such file"),
        "{error}"
    );
}

#[test]
fn loading_can_be_cancelled_and_refused() {
    let (_directory, path, vm) = small();
    let job = destination_job();
    let cancel = job.cancel.clone();
    let mut destination = Destination::default();
    destination.hook = Box::new(move |call| {
        if call == "load" {
            let _ = cancel.cancel("the process ends");
        }
        Ok(())
    });
    let snapshot = Snapshot::open(&path).unwrap();
    let error = snapshot::load(&mut destination, snapshot, &job).unwrap_err();
    assert!(error.to_string().contains("the process ends"), "{error}");
    assert!(destination.started.is_none());
    let mut destination = Destination::default();
    destination.hook = Box::new(|call| match call {
        "prepare" => Err("another processor".into()),
        _ => Ok(()),
    });
    let snapshot = Snapshot::open(&path).unwrap();
    let error = snapshot::load(&mut destination, snapshot, &destination_job()).unwrap_err();
    assert_eq!(error.to_string(), "another processor");
    assert_loads(&path, &vm, false);
}
