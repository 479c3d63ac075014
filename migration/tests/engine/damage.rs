//! The stream is damaged on the way.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use migration::frame::{HEADER_LEN, Kind};
use migration::source::{self, Outcome, Peer};
use proptest::prelude::*;

use crate::disks::FakeDisk;
use crate::machine::{Destination, Source};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{BUSY_SMALL, arrive, assert_moved, destination_job, short, source_job};

/// Migrates through a proxy that changes frames, and checks what must hold whatever it does.
/// Returns whether it completed.
///
/// A change with its checksum made right is a lie, which may be believed: then it is enough that
/// the guest runs in one place at most.
fn migrate_damaged(lie: bool, mut change: impl FnMut(&mut Frame) -> bool + Send + 'static) -> bool {
    let mut vm = Source::new(200, 30);
    vm.blobs = vec![("kernel".to_owned(), vec![5; 100])];
    vm.disks = vec![FakeDisk::sparse("vda", 300 << 10)];
    vm.run(BUSY_SMALL_PAGES);
    let done = Arc::new(Mutex::new(None));
    let stream = proxied({
        let done = Arc::clone(&done);
        move |frame: &mut Frame| {
            if change(frame) {
                *done.lock().unwrap() = frame.kind;
            }
            Fate::Pass
        }
    });
    let mut job = source_job();
    job.deadlines = short();
    let mut arriving_job = destination_job();
    arriving_job.deadlines = short();
    let arriving = arrive(Destination::of(&vm), stream.1, arriving_job);
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &job);
    let (destination, arrival) = arriving.join().unwrap();
    let ran = destination.ran.load(Ordering::SeqCst);
    let done = *done.lock().unwrap();
    assert!(!(ran && vm.is_running()), "runs twice");
    match &outcome {
        Outcome::Completed(_) if lie => assert!(ran && !vm.is_running()),
        Outcome::Completed(_) => assert_moved(&vm, &outcome, &destination, &arrival),
        Outcome::HandoverUnknown { .. } => {
            assert!(!vm.is_running());
            assert!(matches!(done, Some(Kind::Go | Kind::Running)), "{done:?}");
        }
        Outcome::Failed { error, .. } => {
            assert!(vm.is_running() && !ran, "{error}");
            assert!(!error.to_string().is_empty());
        }
        Outcome::Cancelled { .. } | Outcome::Abandoned { .. } => panic!("{outcome:?}"),
    }
    matches!(outcome, Outcome::Completed(_))
}

const BUSY_SMALL_PAGES: crate::machine::Writes = crate::machine::Writes {
    pages: 100,
    ..BUSY_SMALL
};

const KINDS: [Kind; 15] = [
    Kind::Hello,
    Kind::Blob,
    Kind::Pages,
    Kind::Zero,
    Kind::Sync,
    Kind::State,
    Kind::End,
    Kind::Go,
    Kind::Accept,
    Kind::SyncAck,
    Kind::Ready,
    Kind::Running,
    Kind::Blocks,
    Kind::Flush,
    Kind::Flushed,
];

#[test]
fn every_byte_of_every_kinds_header() {
    for kind in KINDS {
        for byte in 0..HEADER_LEN {
            let mut armed = true;
            let completed = migrate_damaged(false, move |frame| {
                let hit = frame.kind == Some(kind) && std::mem::take(&mut armed);
                armed &= frame.kind != Some(kind);
                if hit {
                    frame.bytes[byte] ^= 1 << (byte % 8);
                }
                hit
            });
            assert!(!completed, "byte {byte} of a {} header", kind.name());
        }
    }
}

/// The same, with the header's checksum made right: what a hostile peer would do.
#[test]
fn lying_headers() {
    for kind in KINDS {
        for byte in [2, 3, 4, 8, 9, 10, 11, 12, 13, 16] {
            let mut armed = true;
            let completed = migrate_damaged(true, move |frame| {
                if frame.kind != Some(kind) || !std::mem::take(&mut armed) {
                    return false;
                }
                frame.bytes[byte] ^= 0x41;
                let crc = crc32fast::hash(&frame.bytes[..20]);
                frame.bytes[20..24].copy_from_slice(&crc.to_le_bytes());
                true
            });
            assert!(!completed, "byte {byte} of a {} header", kind.name());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Any byte of any frame, its checksum right or wrong.
    #[test]
    fn any_byte(frame_index in 0usize..16, from_source: bool, at: prop::sample::Index, value: u8, lie: bool) {
        migrate_damaged(lie, move |frame| {
            if frame.from_source != from_source || frame.index != frame_index || frame.kind.is_none() {
                return false;
            }
            let at = at.index(frame.bytes.len());
            frame.bytes[at] ^= value;
            if lie {
                let body = crc32fast::hash(&frame.bytes[HEADER_LEN..frame.payload]);
                frame.bytes[16..20].copy_from_slice(&body.to_le_bytes());
                let crc = crc32fast::hash(&frame.bytes[..20]);
                frame.bytes[20..24].copy_from_slice(&crc.to_le_bytes());
            }
            true
        });
    }
}

/// A block is read before it is sent, so that nothing excuses a checksum that doesn't match.
#[test]
fn a_damaged_block_ends_it_at_once() {
    let mut vm = Source::with_disks(100, vec![FakeDisk::sparse("vda", 300 << 10)]);
    vm.run(BUSY_SMALL_PAGES);
    let stream = proxied(move |frame: &mut Frame| {
        if frame.kind == Some(Kind::Blocks) {
            frame.bytes[frame.payload + 17] ^= 1;
        }
        assert_ne!(frame.kind, Some(Kind::Pages));
        Fate::Pass
    });
    let arriving = arrive(Destination::of(&vm), stream.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &source_job());
    let Outcome::Failed { error, .. } = outcome else {
        panic!("{outcome:?}")
    };
    let text = error.to_string();
    let expected = " bytes at offset 0 of the disk 'vda' were damaged on the way";
    assert!(text.ends_with(expected), "{text}");
    assert!(vm.is_running() && arriving.join().unwrap().1.is_err());
}

/// Damages the first page that comes; the guest writes to it again, or doesn't.
fn damage_a_page(again: bool) -> (Source, Outcome, Destination) {
    let mut vm = Source::new(200, 0);
    let writer = vm.writer();
    let mut armed = again;
    vm.hook = Box::new(move |call| {
        if call == "harvest" && std::mem::take(&mut armed) {
            writer(0);
        }
        Ok(())
    });
    let mut seen = HashSet::new();
    let stream = proxied(move |frame: &mut Frame| {
        if seen.insert(frame.kind) && frame.kind == Some(Kind::Pages) {
            frame.bytes[frame.payload + 17] ^= 1;
        }
        Fate::Pass
    });
    let arriving = arrive(Destination::default(), stream.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &source_job());
    let (destination, arrival) = arriving.join().unwrap();
    if again {
        assert_moved(&vm, &outcome, &destination, &arrival);
    }
    (vm, outcome, destination)
}

#[test]
fn a_page_written_while_it_was_sent_is_no_damage() {
    damage_a_page(true);
}

#[test]
fn a_page_damaged_for_good_is_noticed() {
    let (_, outcome, destination) = damage_a_page(false);
    let Outcome::Failed { error, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(
        error.to_string(),
        "the destination failed: 1 pages of guest memory were damaged on the way, the first at 0x0"
    );
    assert!(!destination.ran.load(Ordering::SeqCst));
}
