//! A source that doesn't keep to the protocol, or lies: the destination says what is wrong, and
//! nothing outside the guest's memory is touched.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use migration::destination::{self};
use migration::disk::Disk;
use migration::frame::{HEADER_LEN, Header, Kind};
use migration::layout::{Layout, Region};
use migration::link::Stream;
use migration::listener::Incoming;
use migration::message::{
    AddressRun, BLOCK_MIGRATION, BlobChunk, BlockRun, End, Go, Hello, Id, Preamble, RunKind, Sync,
    encode_blocks, encode_pages, encode_state, encode_zero,
};
use migration::section::Section;
use migration::source::{self, Outcome, Peer};
use migration::vm::{Blob, Offer};

use crate::disks::FakeDisk;
use crate::machine::{Destination, Source, Writes};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{BUSY_SMALL, arrive, destination_job, short, source_job};

pub(crate) const PAGES: u64 = 8;

pub(crate) fn hello(blobs: Vec<Blob>) -> Hello {
    Hello {
        id: Id([7; 16]),
        required: 0,
        optional: 0,
        offer: Offer {
            layout: Layout::new(vec![Region {
                start: 0x10_0000,
                len: PAGES << 12,
            }])
            .unwrap(),
            configuration: vec![],
            blobs,
            disks: vec![],
        },
    }
}

pub(crate) fn body(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut body = vec![];
    encode(&mut body);
    body
}

pub(crate) fn state(name: &str) -> (Kind, Vec<u8>) {
    let section = Section {
        name: name.to_owned(),
        version: 1,
        body: vec![1],
    };
    (
        Kind::State,
        body(|out| encode_state(&section, out).unwrap()),
    )
}

pub(crate) fn zero(address: u64, pages: u64) -> (Kind, Vec<u8>) {
    let run = AddressRun { address, pages };
    (Kind::Zero, body(|out| encode_zero(&[run], out)))
}

pub(crate) fn end(sections: u32) -> (Kind, Vec<u8>) {
    let end = End {
        sections,
        was_running: false,
    };
    (Kind::End, body(|out| end.encode(out)))
}

/// The length of the data of a BLOCKS body, from its runs of data.
fn blocks_payload(body: &[u8]) -> u32 {
    let runs = body.get(6..).unwrap_or_default().chunks_exact(21);
    let data = runs.filter(|run| run[0] == 0);
    data.map(|run| u32::from_le_bytes(run[9..13].try_into().unwrap()))
        .sum()
}

fn blocks(disk: u16, runs: &[BlockRun]) -> (Kind, Vec<u8>) {
    (Kind::Blocks, body(|out| encode_blocks(disk, runs, out)))
}

/// After a HELLO with two disks, of 1 MiB and of 512 bytes.
fn with_disks(frames: &[(Kind, Vec<u8>)]) -> String {
    let mut hello = hello(vec![]);
    hello.required = BLOCK_MIGRATION;
    hello.offer.disks = [("vda", 1 << 20), ("vdb", 512)]
        .map(|(name, capacity)| Disk {
            name: name.to_owned(),
            capacity,
        })
        .to_vec();
    let mut all = vec![(Kind::Hello, body(|out| hello.encode(out).unwrap()))];
    all.extend_from_slice(frames);
    let disks = hello.offer.disks.iter();
    let vm = Destination {
        disks: disks
            .map(|disk| FakeDisk::empty(&disk.name, disk.capacity))
            .collect(),
        ..Destination::default()
    };
    play_to(vm, Preamble::OURS, &all)
}

#[test]
fn what_is_wrong_with_disks_is_said() {
    let run = |kind, offset, len| BlockRun { kind, offset, len };
    let data = RunKind::Data(crc32fast::hash(&[0xaa; 512]));
    let (zero_run, absent) = (RunKind::Zero, RunKind::Absent);
    let first = || blocks(0, &[run(zero_run, 0, 1 << 20)]);
    let second = || blocks(1, &[run(data, 0, 512)]);
    for (frames, expected) in [
        (
            vec![blocks(2, &[run(zero_run, 0, 512)])],
            "blocks came for disk 2, but 2 disks were offered",
        ),
        (
            vec![blocks(0, &[run(zero_run, 0, (1 << 20) + 512)])],
            "1049088 bytes at offset 0 came for the disk 'vda', which has 1048576 bytes",
        ),
        (
            vec![second(), blocks(1, &[run(data, 512, 512)])],
            "512 bytes at offset 512 came for the disk 'vdb', which has 512 bytes",
        ),
        (
            vec![blocks(0, &[run(data, 0, 512), run(data, 1 << 20, 512)])],
            "512 bytes at offset 1048576 came for the disk 'vda'",
        ),
        (
            vec![blocks(0, &[run(data, 512, 512)])],
            "offset 512 of the disk 'vda' came where 0 was due",
        ),
        (
            vec![blocks(0, &[run(data, 0, 512), run(absent, 1024, 512)])],
            "offset 1024 of the disk 'vda' came where 512 was due",
        ),
        (
            vec![blocks(0, &[run(data, 0, 512), run(data, 0, 512)])],
            "offset 0 of the disk 'vda' came where 512 was due",
        ),
        (
            vec![first(), blocks(0, &[run(absent, 512, 512)])],
            "offset 512 of the disk 'vda' was told as absent after the disk had come whole",
        ),
        (
            vec![blocks(
                0,
                &[run(data, 0, 512), run(RunKind::Data(1), 512, 512)],
            )],
            "512 bytes at offset 512 of the disk 'vda' were damaged on the way",
        ),
        (
            vec![first(), zero(0x10_0000, PAGES), end(0)],
            "only 0 of 512 bytes of the disk 'vdb' came",
        ),
        (
            vec![
                blocks(0, &[run(absent, 0, (1 << 20) - 512)]),
                second(),
                zero(0x10_0000, PAGES),
                end(0),
            ],
            "only 1048064 of 1048576 bytes of the disk 'vda' came",
        ),
        (
            vec![first(), second(), zero(0x10_0000, PAGES), end(0)],
            "loading the state failed: state section 'vcpu.0' is missing",
        ),
        (
            vec![zero(0x10_0000, PAGES), state("a"), first()],
            "BLOCKS is not allowed in phase State",
        ),
        (
            vec![(Kind::Flush, vec![0; 7])],
            "a FLUSH frame is malformed: a message ends 1 bytes too early",
        ),
        (
            vec![first(), (Kind::Flushed, vec![0; 8])],
            "FLUSHED is not allowed in phase Ram",
        ),
        (
            vec![(Kind::Blocks, vec![0, 0, 1, 0, 0, 0])],
            "a BLOCKS frame is malformed",
        ),
    ] {
        let error = with_disks(&frames);
        assert!(
            error.contains(expected),
            "{error:?} instead of {expected:?}"
        );
    }
    // Without disks in the offer there is no first one.
    assert_eq!(
        after_hello(&[blocks(0, &[run(zero_run, 0, 512)])]),
        "blocks came for disk 0, but 0 disks were offered"
    );
}

/// A destination that says that the disks are flushed when nobody asked, or after an eternity.
#[test]
fn a_destination_that_lies_about_its_flushes() {
    for unasked in [true, false] {
        let disk = FakeDisk::sparse("vda", 1 << 20);
        let mut vm = Source::with_disks(100, vec![Arc::clone(&disk)]);
        vm.run(BUSY_SMALL_100);
        // There is always something left to flush.
        vm.hook = Box::new(move |call| {
            if call == "harvest" {
                disk.guest_write(0, &[1; 512]);
            }
            Ok(())
        });
        let job = source_job();
        let cancel = job.cancel.clone();
        let mut flushes = 0;
        let (a, b) = proxied(move |frame: &mut Frame| {
            if unasked && frame.kind == Some(Kind::SyncAck) {
                frame.bytes[2] = Kind::Flushed as u8;
            }
            if frame.kind == Some(Kind::Flushed) {
                frame.bytes[HEADER_LEN..].fill(0xff);
                flushes += 1;
                if flushes == 4 {
                    cancel.cancel("enough").unwrap();
                }
            }
            let body = crc32fast::hash(&frame.bytes[HEADER_LEN.min(frame.payload)..frame.payload]);
            if frame.kind.is_some() {
                frame.bytes[16..20].copy_from_slice(&body.to_le_bytes());
                let crc = crc32fast::hash(&frame.bytes[..20]);
                frame.bytes[20..24].copy_from_slice(&crc.to_le_bytes());
            }
            Fate::Pass
        });
        let arriving = arrive(Destination::of(&vm), b, destination_job());
        let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
        match outcome {
            Outcome::Failed { error, .. } if unasked => {
                let text = error.to_string();
                assert!(text.contains("FLUSHED is not allowed"), "{text}");
            }
            // It is believed, and would take too long.
            Outcome::Cancelled { .. } => assert!(!unasked),
            outcome => panic!("{outcome:?}"),
        }
        assert!(vm.is_running());
        assert!(arriving.join().unwrap().1.is_err());
    }
}

const BUSY_SMALL_100: Writes = Writes {
    pages: 100,
    ..BUSY_SMALL
};

/// Plays the frames to a destination; returns its error and how many bytes it answered.
pub(crate) fn play(preamble: Preamble, frames: &[(Kind, Vec<u8>)]) -> String {
    play_to(Destination::default(), preamble, frames)
}

fn play_to(mut vm: Destination, preamble: Preamble, frames: &[(Kind, Vec<u8>)]) -> String {
    let (mut source, stream) = UnixStream::pair().unwrap();
    let mut bytes = preamble.encode().to_vec();
    for (sequence, (kind, body)) in (0..).zip(frames) {
        let payload_len = match kind {
            Kind::Pages => {
                let runs = u32::from_le_bytes(body[..4].try_into().unwrap()) as usize;
                ((body.len() - 4 - 12 * runs) / 4 * 4096) as u32
            }
            Kind::Blocks => blocks_payload(body),
            _ => 0,
        };
        let header = Header {
            kind: *kind,
            sequence,
            body_len: body.len() as u32,
            payload_len,
            body_crc: crc32fast::hash(body),
        };
        bytes.extend(header.encode());
        bytes.extend(body);
        bytes.extend(vec![0xaa; payload_len as usize]);
    }
    let mut writer = source.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        let _ = writer.write_all(&bytes);
    });
    let mut job = destination_job();
    job.deadlines = short();
    let incoming = Incoming::from_stream(Stream::from(stream), &job.cancel, &job.deadlines);
    let receiving = std::thread::spawn(move || {
        let error = destination::receive(&mut vm, incoming.unwrap(), None, &job).unwrap_err();
        assert!(!vm.ran.load(Ordering::SeqCst));
        error
    });
    // The source hears the same reason.
    let mut answer = vec![];
    let _ = source.read_to_end(&mut answer);
    writing.join().unwrap();
    let error = receiving.join().unwrap().to_string();
    let text = String::from_utf8_lossy(&answer);
    assert!(text.ends_with(&error), "{error}: not in {text:?}");
    let mut rest = &answer[..];
    let mut last = None;
    while let Some(header) = rest.first_chunk::<HEADER_LEN>() {
        let header = Header::decode(header).unwrap();
        last = Some(header.kind);
        rest = &rest[HEADER_LEN + header.body_len as usize..];
    }
    assert!(matches!(last, Some(Kind::Failed | Kind::Refuse)));
    error
}

/// After a valid HELLO.
fn after_hello(frames: &[(Kind, Vec<u8>)]) -> String {
    let mut all = vec![(Kind::Hello, body(|out| hello(vec![]).encode(out).unwrap()))];
    all.extend_from_slice(frames);
    play(Preamble::OURS, &all)
}

#[test]
fn what_is_wrong_is_said() {
    let run = |address, pages| AddressRun { address, pages };
    let pages = |runs: &[AddressRun]| {
        let total: u64 = runs.iter().map(|run| run.pages).sum();
        let crcs = vec![crc32fast::hash(&[0xaa; 4096]); total as usize];
        (Kind::Pages, body(|out| encode_pages(runs, &crcs, out)))
    };
    let all = zero(0x10_0000, PAGES);
    let go = |id, run, stopped_ns| {
        let go = Go {
            id,
            run,
            stopped_ns,
            round_trip_ns: 0,
        };
        (Kind::Go, body(|out| go.encode(out)))
    };
    let complete =
        |last: (Kind, Vec<u8>)| vec![all.clone(), state("vcpu.0"), state("serial"), end(2), last];
    for (frames, expected) in [
        (
            vec![pages(&[run(0, 1)])],
            "1 pages at 0x0 are not within one region of guest RAM",
        ),
        (
            vec![pages(&[run(0x10_0000, 4), run(0x10_7000, 2)])],
            "2 pages at 0x107000 are not within",
        ),
        (vec![pages(&[run(0x10_0001, 1)])], "not within one region"),
        (vec![zero(0x10_0000, PAGES + 1)], "not within one region"),
        (vec![zero(0x10_0000, u64::MAX)], "not within one region"),
        (vec![zero(u64::MAX, 1)], "not within one region"),
        (
            vec![zero(0x10_0000, 0)],
            "an empty run of pages at 0x100000",
        ),
        (
            vec![zero(0x10_0000, PAGES - 1), end(0)],
            "1 pages of guest memory never came, the first at 0x107000",
        ),
        (
            vec![all.clone(), state("a"), state("a")],
            "state section 'a' came twice",
        ),
        (
            vec![all.clone(), state("a"), end(2)],
            "1 state sections came, but the source says that it sent 2",
        ),
        (
            vec![all.clone(), end(0)],
            "loading the state failed: state section 'vcpu.0' is missing",
        ),
        (vec![state("a")], "STATE is not allowed in phase Blobs"),
        (
            vec![all.clone(), state("a"), all.clone()],
            "ZERO is not allowed in phase State",
        ),
        (
            vec![(Kind::Ready, vec![0; 8])],
            "READY is not allowed in phase Blobs",
        ),
        (vec![(Kind::Sync, vec![0; 15])], "a SYNC frame is malformed"),
        (
            vec![(
                Kind::Blob,
                BlobChunk {
                    index: 0,
                    offset: 0,
                }
                .encode()
                .to_vec(),
            )],
            "a piece of blob 0 at 0 came, but all blobs were there",
        ),
        (
            complete(go(Id([8; 16]), false, 0)),
            "the source's GO is not for this migration",
        ),
        (
            complete(go(Id([7; 16]), true, 0)),
            "the source's GO is not for this migration",
        ),
        (
            complete(go(Id([7; 16]), false, u64::MAX)),
            "the source's GO is not for this migration",
        ),
    ] {
        let error = after_hello(&frames);
        assert!(
            error.contains(expected),
            "{error:?} instead of {expected:?}"
        );
    }
}

#[test]
fn blobs_come_whole_and_in_order() {
    let blob = |name: &str, len| Blob {
        name: name.to_owned(),
        len,
    };
    let chunk = |index, offset, len| {
        let mut bytes = BlobChunk { index, offset }.encode().to_vec();
        bytes.resize(BlobChunk::LEN + len, 1);
        (Kind::Blob, bytes)
    };
    let sync = (
        Kind::Sync,
        body(|out| Sync { mark: 1, round: 0 }.encode(out)),
    );
    let hello = hello(vec![blob("kernel", 10), blob("initrd", 5)]);
    for (frames, expected) in [
        (vec![sync.clone()], "2 of the blobs never came"),
        (
            vec![chunk(0, 0, 10), sync.clone()],
            "1 of the blobs never came",
        ),
        (vec![chunk(0, 0, 4), sync], "2 of the blobs never came"),
        (
            vec![chunk(1, 0, 5)],
            "a piece of blob 1 at 0 came, but blob 0 at 0 was due",
        ),
        (vec![chunk(0, 0, 4), chunk(0, 5, 5)], "blob 0 at 4 was due"),
        (
            vec![chunk(0, 0, 4), chunk(0, 4, 7)],
            "6 bytes of it were due",
        ),
        (vec![chunk(0, 0, 0)], "10 bytes of it were due"),
    ] {
        let mut all = vec![(Kind::Hello, body(|out| hello.encode(out).unwrap()))];
        all.extend(frames);
        let error = play(Preamble::OURS, &all);
        assert!(
            error.contains(expected),
            "{error:?} instead of {expected:?}"
        );
    }
}

#[test]
fn versions_and_capabilities_are_negotiated() {
    let preamble = Preamble {
        oldest: 2,
        newest: 9,
    };
    assert_eq!(
        play(preamble, &[]),
        "the source speaks versions 2 to 9 of the migration protocol, this destination 1 to 1"
    );
    let mut demanding = hello(vec![]);
    demanding.required = 0x10;
    let frame = (Kind::Hello, body(|out| demanding.encode(out).unwrap()));
    assert_eq!(
        play(Preamble::OURS, &[frame]),
        "the source requires capabilities that this destination does not have (bits 0x10)"
    );
}
