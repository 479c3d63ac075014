//! Disks that wait for memory which can't come: no query waits with them, and the process ends
//! when it is told to, without harm to what the guest has written.

use std::io::IoSliceMut;
use std::path::Path;
use std::time::Duration;

use devices::image::{Cache, Format, Image, ImageConfig};
use guest_tests::Size;
use guest_tests::block::{self, Contents, Mark};
use guest_tests::disk::{Mode, Options};
use migration::frame::Kind;
use serde_json::{Value, json};

use super::crossing::{Crossing, Then};
use super::{
    enable, push_fast, recover, require_postcopy, set, switch_at_once, wait_paused, wait_state,
};
use crate::disk::{busy, drive, finish, incoming, new_image, run, wait_progress};
use crate::harness::{Ferry, scratch};

/// Bytes of each disk that the guest uses.
const AREA: u64 = 4 << 20;

/// The requests for memory at which the connection breaks, until a disk is found to wait in a
/// request of its own: before, it waits for its queue, and there may be none later.
const BREAKS: [usize; 8] = [12, 20, 30, 40, 16, 25, 35, 50];

/// Reads and writes all the time, and leaves nothing empty that was not.
fn work(seed: u64) -> Options {
    Options {
        area: Size(AREA),
        max: Size(128 << 10),
        depth: 16,
        discards: 0,
        zeroes: 0,
        seed,
        ..busy()
    }
}

/// An image whose area has been filled by a guest with the seed 1.
fn filled(dir: &Path, format: Format) -> std::path::PathBuf {
    let path = new_image(dir, "disk", format);
    let fill = Options {
        mode: Mode::Fill,
        ..work(1)
    };
    finish(run(dir, "fill", fill, &[drive(&path, "")]), &[&path]);
    path
}

fn image(path: &Path, readonly: bool) -> Image {
    let config = ImageConfig {
        path: path.to_owned(),
        format: None,
        readonly,
        cache: Cache::Writeback,
    };
    Image::open(&config).unwrap()
}

/// What each sector of the area holds, all of which guests have written.
fn area(path: &Path) -> Vec<Mark> {
    let image = image(path, true);
    let mut bytes = vec![0; AREA as usize];
    image
        .read_at(&mut [IoSliceMut::new(&mut bytes)], 0)
        .unwrap();
    let sectors = bytes.chunks_exact(block::BYTES).map(|bytes| {
        let mut sector = [0; block::BYTES / 8];
        for (word, bytes) in sector.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        block::read(&sector)
    });
    (0..)
        .zip(sectors)
        .map(|(number, contents)| match contents {
            Contents::Written(mark) if mark.sector == number => mark,
            other => panic!("sector {number} of {}: {other:?}", path.display()),
        })
        .collect()
}

/// Whether a disk's thread is in a read or write of the image, and waits for guest memory there.
fn disk_waits(ferry: &Ferry) -> bool {
    // pread64, pwrite64, preadv, pwritev, preadv2, pwritev2.
    let calls = ["17", "18", "295", "296", "327", "328"];
    let tasks = std::fs::read_dir(format!("/proc/{}/task", ferry.process.id())).unwrap();
    tasks.flatten().any(|task| {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let call = read("syscall");
        read("comm").starts_with("virtio-blk")
            && read("wchan") == "handle_userfault"
            && calls.contains(&call.split(' ').next().unwrap_or_default())
    })
}

/// A guest that has moved, without its connection, a disk of which waits for memory.
struct Waiting {
    source: Ferry,
    destination: Ferry,
    /// What the disk held when the guest moved.
    before: Vec<Mark>,
}

/// Tries until a disk waits.
fn waiting(dir: &Path, path: &Path) -> Waiting {
    let drives = [drive(path, "")];
    for (round, nth) in BREAKS.into_iter().enumerate() {
        let mut source = run(dir, &format!("s{round}"), work(2 + round as u64), &drives);
        wait_progress(&source, 100);
        // Stopped, so that it can be seen what its disk holds.
        source.execute("stop", Value::Null);
        let (mut destination, uri) = incoming(dir, &format!("d{round}"), &drives);
        enable(&mut source);
        enable(&mut destination);
        set(&mut source, json!({ "max-postcopy-bandwidth": 64 << 10 }));
        let at = (Kind::Request as u8, nth, Then::CutBefore);
        let crossing = Crossing::to(&uri, Some(at));
        switch_at_once(&mut source, &crossing.uri);
        wait_state(&mut destination, "postcopy-active");
        destination.wait_status("paused");
        let before = area(path);
        destination.execute("cont", Value::Null);
        crossing.wait_reached();
        wait_paused(&mut source, &mut destination);
        for _ in 0..100 {
            if disk_waits(&destination) {
                return Waiting {
                    source,
                    destination,
                    before,
                };
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        destination.process.kill().unwrap();
    }
    panic!("no disk has ever waited for memory");
}

/// All that can be asked answers, whatever waits.
#[test]
fn queries_answer_while_a_disk_waits() {
    require_postcopy!();
    for format in [Format::Raw, Format::Qcow2] {
        let dir = scratch();
        let path = filled(dir.path(), format);
        let Waiting {
            mut source,
            mut destination,
            ..
        } = waiting(dir.path(), &path);
        let queries = destination.execute("query-commands", Value::Null);
        let queries = queries.as_array().unwrap().iter();
        let queries = queries.map(|command| command["name"].as_str().unwrap().to_owned());
        let queries: Vec<_> = queries.filter(|name| name.starts_with("query-")).collect();
        for known in ["query-block", "query-status", "query-migrate"] {
            assert!(queries.iter().any(|name| name == known), "{known}");
        }
        for query in queries.iter().filter(|name| *name != "query-balloon") {
            destination.execute(query, Value::Null);
        }
        let disks = destination.execute("query-block", Value::Null);
        let image = &disks[0]["inserted"]["image"];
        assert!(image["actual-size"].as_u64() >= Some(AREA), "{disks:#}");
        for topic in [
            "block",
            "cpus",
            "migrate",
            "name",
            "network",
            "snapshots",
            "status",
        ] {
            let arguments = json!({ "command-line": format!("info {topic}") });
            let said = destination.execute("human-monitor-command", arguments);
            assert!(!said.as_str().unwrap().contains("Error"), "{topic}: {said}");
        }
        // Whatever would have to wait is refused.
        for command in ["stop", "system_reset"] {
            let refusal = destination.refused(command, Value::Null);
            assert!(refusal.contains("are missing"), "{command}: {refusal}");
        }
        assert!(disk_waits(&destination), "it waits no more");

        push_fast(&mut source);
        let _crossing = recover(&mut source, &mut destination, None);
        source.wait_migrated("completed");
        destination.wait_migrated("completed");
        wait_progress(&destination, 200);
        finish(destination, &[&path]);
    }
}

/// What was written stays; what was under way is there or is not.
#[test]
fn a_process_ends_by_force_while_a_disk_waits() {
    require_postcopy!();
    for format in [Format::Raw, Format::Qcow2] {
        let dir = scratch();
        let path = filled(dir.path(), format);
        let Waiting {
            source: _source,
            mut destination,
            before,
        } = waiting(dir.path(), &path);
        let refusal = destination.refused("quit", Value::Null);
        assert!(refusal.contains("guest would be lost"), "{refusal}");
        destination.execute("quit", json!({ "force": true }));
        let (success, output) = destination.wait_exit();
        assert!(success, "{output}");
        assert!(output.contains("the guest is lost"), "{output}");

        // Who has it next puts it right, if that is needed.
        let next = image(&path, false);
        next.lock().unwrap();
        next.unlock().unwrap();
        for (before, after) in before.iter().zip(&area(&path)) {
            let written = |mark: &Mark| (mark.seed, mark.generation);
            assert!(
                written(after) >= written(before),
                "{before:?}, then {after:?}"
            );
        }
    }
}
