//! Disks that wait for memory which can't come: no query waits with them, and the process ends
//! when it is told to, without harm to what the guest has written.
//!
//! A guest writes memory before its disk reads that, so its disk seldom waits. Here there was no
//! space for what it wrote, and the disk tries again at the destination, before all others.

use std::io::IoSliceMut;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::image::{Cache, Format, Image, ImageConfig};
use guest_tests::block::{self, Contents};
use migration::frame::Kind;
use serde_json::{Value, json};

use super::crossing::{Crossing, Then};
use super::{
    enable, push_fast, recover, require_postcopy, set, switch_at_once, wait_paused, wait_state,
};
use crate::disk::space::{Small, run_full, wait_filled};
use crate::disk::{CAPACITY, drive, finish, incoming, new_image, wait_progress};
use crate::harness::{Ferry, scratch};

/// The requests for memory at which the connection breaks, until the disk is found to wait in a
/// write: before, it waits for its queue.
const BREAKS: [usize; 8] = [8, 12, 16, 10, 6, 20, 5, 25];

fn image(path: &Path, readonly: bool) -> Image {
    let config = ImageConfig {
        path: path.to_owned(),
        format: None,
        readonly,
        cache: Cache::Writeback,
    };
    Image::open(&config).unwrap()
}

/// What each sector of a disk holds.
fn contents(path: &Path) -> Vec<Contents> {
    let image = image(path, true);
    let mut bytes = vec![0; CAPACITY as usize];
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
    sectors.collect()
}

/// Whether a disk's thread is in a write to the image, and waits for guest memory there.
fn disk_waits(ferry: &Ferry) -> bool {
    // pwrite64, pwritev, pwritev2.
    let writes = ["18", "296", "328"];
    let tasks = std::fs::read_dir(format!("/proc/{}/task", ferry.process.id())).unwrap();
    tasks.flatten().any(|task| {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let call = read("syscall");
        read("comm").starts_with("virtio-blk")
            && read("wchan") == "handle_userfault"
            && writes.contains(&call.split(' ').next().unwrap_or_default())
    })
}

/// A guest that has moved, without its connection, whose disk waits for memory.
struct Waiting {
    source: Ferry,
    destination: Ferry,
    /// What the disk held when the guest had moved.
    before: Vec<Contents>,
    path: PathBuf,
    /// Where the image is.
    _small: Small,
}

/// Tries until the disk waits. `None` where there is no small file system.
fn waiting(dir: &Path, format: Format) -> Option<Waiting> {
    for nth in BREAKS {
        let dir = dir.join(format!("{format}{nth}"));
        std::fs::create_dir(&dir).unwrap();
        let small = Small::mount(&dir)?;
        let path = new_image(&small.0, "disk", format);
        let drives = [drive(&path, &format!(",format={format}"))];
        let mut source = run_full(&dir, &drives);
        small.make_room();
        let (mut destination, uri) = incoming(&dir, "dst", &drives);
        enable(&mut source);
        enable(&mut destination);
        set(&mut source, json!({ "max-postcopy-bandwidth": 64 << 10 }));
        let at = (Kind::Request as u8, nth, Then::CutBefore);
        let crossing = Crossing::to(&uri, Some(at));
        switch_at_once(&mut source, &crossing.uri);
        wait_state(&mut destination, "postcopy-active");
        destination.wait_status("paused");
        let before = contents(&path);
        destination.execute("cont", Value::Null);
        crossing.wait_reached();
        wait_paused(&mut source, &mut destination);
        for _ in 0..100 {
            if disk_waits(&destination) {
                return Some(Waiting {
                    source,
                    destination,
                    before,
                    path,
                    _small: small,
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    panic!("no disk has ever waited for memory");
}

/// All that can be asked answers, whatever waits, and nothing is lost.
#[test]
fn queries_answer_while_a_disk_waits() {
    require_postcopy!();
    for format in [Format::Raw, Format::Qcow2] {
        let dir = scratch();
        let Some(mut waiting) = waiting(dir.path(), format) else {
            return;
        };
        let destination = &mut waiting.destination;
        let commands = destination.execute("query-commands", Value::Null);
        let names = commands.as_array().unwrap().iter();
        let names = names.map(|command| command["name"].as_str().unwrap());
        let queries: Vec<_> = names.filter(|name| name.starts_with("query-")).collect();
        for known in ["query-block", "query-status", "query-migrate"] {
            assert!(queries.contains(&known), "{known}: {queries:?}");
        }
        // There is no balloon.
        for query in queries.iter().filter(|name| **name != "query-balloon") {
            destination.execute(query, Value::Null);
        }
        let disks = destination.execute("query-block", Value::Null);
        let image = &disks[0]["inserted"]["image"];
        assert!(image["actual-size"].as_u64() > Some(0), "{disks:#}");
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
        // What would have to wait is refused.
        for command in ["stop", "system_reset"] {
            let refusal = destination.refused(command, Value::Null);
            assert!(refusal.contains("are missing"), "{command}: {refusal}");
        }
        assert!(disk_waits(destination), "it waits no more");

        push_fast(&mut waiting.source);
        let _crossing = recover(&mut waiting.source, destination, None);
        waiting.source.wait_migrated("completed");
        destination.wait_migrated("completed");
        wait_filled(destination);
        wait_progress(destination, 100);
        finish(waiting.destination, &[&waiting.path]);
    }
}

/// What was written stays; what was under way is there, or not.
#[test]
fn a_process_ends_by_force_while_a_disk_waits() {
    require_postcopy!();
    for format in [Format::Raw, Format::Qcow2] {
        let dir = scratch();
        let Some(mut waiting) = waiting(dir.path(), format) else {
            return;
        };
        let refusal = waiting.destination.refused("quit", Value::Null);
        assert!(refusal.contains("guest would be lost"), "{refusal}");
        let force = json!({ "force": true });
        waiting.destination.execute("quit", force);
        let (success, output) = waiting.destination.wait_exit();
        assert!(success, "{output}");
        assert!(output.contains("the guest is lost"), "{output}");

        // Who has it next puts it right, if that is needed.
        let next = image(&waiting.path, false);
        next.lock().unwrap();
        next.unlock().unwrap();
        let after = contents(&waiting.path);
        let mut written = 0;
        for (sector, (before, after)) in waiting.before.iter().zip(&after).enumerate() {
            let fits = match (before, after) {
                (Contents::Written(_), after) => before == after,
                (Contents::Zero, Contents::Written(mark)) => mark.sector == sector as u64,
                (before, after) => before == after,
            };
            assert!(fits, "sector {sector}: {before:?}, then {after:?}");
            written += usize::from(matches!(before, Contents::Written(_)));
        }
        assert!(written > 0);
    }
}
