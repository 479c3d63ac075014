//! Migrations without checksums of pages: what is still noticed, and what isn't.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use migration::compression::Method;
use migration::frame::{HEADER_LEN, Kind};
use migration::layout::PAGE_SIZE;
use migration::message::{AddressRun, Preamble, UNCHECKED, encode_pages};
use migration::parameters::Parameters;
use migration::snapshot::{self, Snapshot};
use migration::source::{self, Outcome, Peer};
use vm_memory::GuestAddress;

use crate::encoded::{guest, migrate_rewriting, seal};
use crate::hostile::{body, hello, play};
use crate::machine::{Destination, Source, address, assert_same};
use crate::multifd::{TCP, migrate as migrate_multifd, pass};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{BUSY, arrive, assert_moved, destination_job, source_job, tcp_pair};

fn off(parameters: &Parameters) {
    parameters.set_page_checksum(false);
}

/// The number of runs and pages of a PAGES frame, and the length of its body.
fn parts(frame: &Frame) -> (usize, usize, usize) {
    let runs = frame.bytes[HEADER_LEN..][..4].try_into().unwrap();
    let runs = u32::from_le_bytes(runs) as usize;
    let pages = (frame.bytes.len() - frame.payload) / PAGE_SIZE as usize;
    (runs, pages, frame.payload - HEADER_LEN)
}

pub(crate) fn has_checksums(frame: &Frame) -> bool {
    let (runs, pages, body) = parts(frame);
    assert!(
        body == 4 + 12 * runs || body == 4 + 12 * runs + 4 * pages,
        "{body} bytes for {runs} runs of {pages} pages"
    );
    body > 4 + 12 * runs
}

#[test]
fn a_busy_guest_arrives_whole_without_them() {
    for channels in [1, 3] {
        let mut vm = Source::new(4111, 3333);
        vm.run(BUSY);
        let seen = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&seen);
        let set = |job: &source::Job| off(&job.parameters);
        let ended = migrate_multifd(&mut vm, channels, TCP, set, move |frame| {
            if frame.kind == Some(Kind::Pages) {
                assert!(!has_checksums(frame));
                count.fetch_add(1, Ordering::SeqCst);
            }
            Fate::Pass
        });
        assert_eq!(ended.error, "", "{channels} connections");
        assert!(seen.load(Ordering::SeqCst) > 0);
    }
}

#[test]
fn what_is_compressed_arrives_whole_without_them() {
    for method in [Method::Lz4, Method::Zstd] {
        let mut vm = guest(3000);
        vm.run(BUSY);
        let set = |job: &source::Job| {
            off(&job.parameters);
            job.parameters.set_compression(Some(method));
        };
        let ended = migrate_multifd(&mut vm, 1, TCP, set, pass);
        assert_eq!(ended.error, "", "{method:?}");
        assert!(ended.left.compression.unwrap().pages > 1000, "{method:?}");
    }
}

#[test]
fn differences_make_the_same_pages_without_them() {
    for method in [None, Some(Method::Zstd)] {
        let set = |parameters: &Parameters| {
            off(parameters);
            parameters.set_compression(method);
        };
        let (_, _, _, error, snapshot) = migrate_rewriting(set, 3, pass);
        assert_eq!(error, "");
        assert!(snapshot.xbzrle.unwrap().pages > 0);
    }
}

/// What the guest writes while the kernel still reads the page arrives torn, and comes again.
#[test]
fn pages_that_are_not_copied_arrive_whole_without_them() {
    let mut vm = Source::new(20_000, 300);
    vm.run(BUSY);
    let (job, pair) = (source_job(), tcp_pair());
    off(&job.parameters);
    job.parameters.set_zero_copy_send(true);
    let arriving = arrive(Destination::of(&vm), pair.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(pair.0), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    assert!(job.progress.snapshot().zero_copy.unwrap().tried > 0);
}

/// Migrates a guest that stands still, and changes a byte of the first frame of that kind.
fn damaged(
    kind: Kind,
    at: impl Fn(&Frame) -> usize + Send + 'static,
) -> (Source, Outcome, Destination) {
    let mut vm = Source::new(200, 0);
    let mut armed = true;
    let stream = proxied(move |frame: &mut Frame| {
        if frame.kind == Some(kind) && std::mem::take(&mut armed) {
            let at = at(frame);
            frame.bytes[at] ^= 1;
        }
        Fate::Pass
    });
    let job = source_job();
    off(&job.parameters);
    let arriving = arrive(Destination::default(), stream.1, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(stream.0), &job);
    (vm, outcome, arriving.join().unwrap().0)
}

/// It is what was asked for, and what the default is for.
#[test]
fn a_damaged_page_is_not_noticed() {
    let (vm, outcome, there) = damaged(Kind::Pages, |frame| frame.payload + 17);
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    let first = |ram| crate::machine::page(ram, &vm.layout, 0);
    let (sent, mut came) = (first(&vm.ram), first(there.ram.as_ref().unwrap()));
    assert_ne!(sent, came);
    came[17] ^= 1;
    assert_eq!(sent, came);
}

#[test]
fn damage_to_anything_else_is() {
    let header = |_: &Frame| 9;
    let within = |frame: &Frame| (HEADER_LEN + frame.payload) / 2;
    for kind in [Kind::Pages, Kind::Zero, Kind::State, Kind::End] {
        for (part, outcome) in [
            ("header", damaged(kind, header).1),
            ("body", damaged(kind, within).1),
        ] {
            let name = kind.name();
            assert!(
                matches!(outcome, Outcome::Failed { .. }),
                "the {part} of {name}: {outcome:?}"
            );
        }
    }
}

/// A destination that has never heard of it doesn't pick it.
#[test]
fn who_does_not_know_it_gets_them() {
    let mut vm = Source::new(3000, 100);
    vm.run(BUSY);
    let (seen, offered) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let (count, offer) = (Arc::clone(&seen), Arc::clone(&offered));
    let (a, b) = proxied(move |frame: &mut Frame| {
        if frame.kind == Some(Kind::Hello) {
            let optional = &mut frame.bytes[HEADER_LEN + 20];
            offer.store(*optional & UNCHECKED as u8 != 0, Ordering::SeqCst);
            *optional &= !UNCHECKED as u8;
            seal(&mut frame.bytes);
        }
        if frame.kind == Some(Kind::Pages) {
            assert!(has_checksums(frame));
            count.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    });
    let job = source_job();
    off(&job.parameters);
    let arriving = arrive(Destination::of(&vm), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    assert!(offered.load(Ordering::SeqCst) && seen.load(Ordering::SeqCst) > 0);
}

#[test]
fn nobody_is_offered_it_who_wants_checksums() {
    let mut vm = Source::new(300, 0);
    let set = |_: &source::Job| ();
    let ended = migrate_multifd(&mut vm, 1, TCP, set, |frame| {
        if frame.kind == Some(Kind::Hello) {
            assert_eq!(frame.bytes[HEADER_LEN + 20] & UNCHECKED as u8, 0);
        }
        if frame.kind == Some(Kind::Pages) {
            assert!(has_checksums(frame));
        }
        Fate::Pass
    });
    assert_eq!(ended.error, "");
}

/// What was agreed on counts.
#[test]
fn checksums_that_nobody_expects_are_an_error_and_so_is_their_lack() {
    let run = AddressRun {
        address: 0x10_0000,
        pages: 2,
    };
    let crc = crc32fast::hash(&[0xaa; 4096]);
    for (optional, crcs, expected) in [
        (UNCHECKED, &[crc, crc][..], "8 bytes"),
        (0, &[][..], "bytes too early"),
    ] {
        let mut hello = hello(vec![]);
        hello.optional = optional;
        let error = play(
            Preamble::OURS,
            &[
                (Kind::Hello, body(|out| hello.encode(out).unwrap())),
                (Kind::Pages, body(|out| encode_pages(&[run], crcs, out))),
            ],
        );
        assert!(error.contains("a PAGES frame is malformed"), "{error}");
        assert!(error.contains(expected), "{error}");
    }
}

/// A file rots: it has them whatever the source would like.
#[test]
fn a_file_has_them_in_any_case() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.snapshot");
    let mut vm = Source::new(300, 40);
    let job = source_job();
    off(&job.parameters);
    let outcome = snapshot::save(&mut vm, &path, &job);
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    let load = || {
        let mut there = Destination::default();
        let file = Snapshot::open(&path).unwrap();
        let result = snapshot::load(&mut there, file, &destination_job());
        (there, result)
    };
    let (there, result) = load();
    result.unwrap();
    assert_same(&vm.ram, there.ram.as_ref().unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    let page = crate::machine::page(&vm.ram, &vm.layout, 3);
    let at = bytes.windows(page.len()).position(|part| part == page);
    bytes[at.unwrap() + 17] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = load().1.unwrap_err().to_string();
    let GuestAddress(address) = address(&vm.layout, 3);
    assert!(error.contains(&format!("{address:#x}")), "{error}");
}
