use proptest::prelude::*;

use super::*;
use crate::codec::DecodeError;
use crate::disk::Disk;
use crate::frame::MAX_REASON;
use crate::layout::{Layout, Region};
use crate::section::Section;
use crate::vm::{Blob, Offer};

fn hello() -> Hello {
    Hello {
        id: Id(*b"0123456789abcdef"),
        required: 0,
        optional: 0x0102_0304,
        offer: Offer {
            layout: Layout::new(vec![
                Region {
                    start: 0,
                    len: 0x2000,
                },
                Region {
                    start: 1 << 32,
                    len: 0x1000,
                },
            ])
            .unwrap(),
            configuration: vec![Section {
                name: "cpu".to_owned(),
                version: 3,
                body: vec![9, 8],
            }],
            blobs: vec![Blob {
                name: "kernel".to_owned(),
                len: 0x0102_0304,
            }],
            disks: vec![],
        },
    }
}

fn disk(name: &str, capacity: u64) -> Disk {
    Disk {
        name: name.to_owned(),
        capacity,
    }
}

fn hello_with_disks() -> Hello {
    let mut hello = hello();
    hello.required = BLOCK_MIGRATION;
    hello.offer.disks = vec![disk("vda", 0x0102_0300_0200), disk("vdb", 512)];
    hello
}

fn block_runs() -> [BlockRun; 3] {
    let run = |kind, offset, len| BlockRun { kind, offset, len };
    [
        run(RunKind::Data(0x0403_0201), 0x0102_0304_0600, 0x400),
        run(RunKind::Zero, 0x200, 1 << 40),
        run(RunKind::Absent, 0, 512),
    ]
}

fn encoded(encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![0xff; 3];
    encode(&mut out);
    out
}

/// The bytes of version 1: a change here is a change of the protocol.
#[test]
fn the_format_is_fixed() {
    assert_eq!(
        Preamble {
            oldest: 1,
            newest: 2
        }
        .encode(),
        *b"\x89FERRY\r\n\x01\x00\x02\x00\xe1\xb3\x9b\x41"
    );
    let mut expected = b"0123456789abcdef".to_vec();
    expected.extend([0, 0, 0, 0, 4, 3, 2, 1, 0, 0x10, 0, 0, 2, 0]);
    expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0]);
    expected.extend([0, 0, 0, 0, 1, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
    expected.extend([1, 0, 3, b'c', b'p', b'u', 3, 0, 0, 0, 2, 0, 0, 0, 9, 8]);
    expected.extend([1, 0, 6]);
    expected.extend(b"kernel");
    expected.extend([4, 3, 2, 1, 0, 0, 0, 0]);
    assert_eq!(encoded(|out| hello().encode(out).unwrap()), expected);
    assert_eq!(Hello::decode(&expected), Ok(hello()));

    let id = hello().id;
    let of_id = |rest: &[u8]| [&id.0[..], rest].concat();
    let accept = Accept {
        id,
        version: 1,
        capabilities: 2,
    };
    assert_eq!(
        encoded(|out| accept.encode(out)),
        of_id(&[1, 0, 2, 0, 0, 0])
    );
    let sync = Sync {
        mark: 0x0102,
        round: 3,
    };
    assert_eq!(
        encoded(|out| sync.encode(out)),
        [2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        encoded(|out| SyncAck { mark: 5 }.encode(out)),
        [5, 0, 0, 0, 0, 0, 0, 0]
    );
    let end = End {
        sections: 2,
        was_running: true,
    };
    assert_eq!(encoded(|out| end.encode(out)), [2, 0, 0, 0, 1]);
    assert_eq!(
        encoded(|out| Ready { load_ns: 7 }.encode(out)),
        [7, 0, 0, 0, 0, 0, 0, 0]
    );
    let go = Go {
        id,
        run: true,
        stopped_ns: 0x0100,
        round_trip_ns: 9,
    };
    assert_eq!(
        encoded(|out| go.encode(out)),
        of_id(&[1, 0, 1, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0])
    );
    assert_eq!(Go::decode(&encoded(|out| go.encode(out))), Ok(go));
    assert_eq!(
        encoded(|out| Running { start_ns: 1 }.encode(out)),
        [1, 0, 0, 0, 0, 0, 0, 0]
    );
    let chunk = BlobChunk {
        index: 1,
        offset: 0x0203,
    };
    assert_eq!(chunk.encode(), [1, 0, 3, 2, 0, 0, 0, 0, 0, 0]);
    let run = AddressRun {
        address: 0x1000,
        pages: 1,
    };
    assert_eq!(
        encoded(|out| encode_pages(&[run], &[0x0403_0201], out)),
        [
            1, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4
        ]
    );
    assert_eq!(
        encoded(|out| encode_zero(&[run], out)),
        [
            1, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    let section = &hello().offer.configuration[0];
    let state = encoded(|out| encode_state(section, out).unwrap());
    assert_eq!(state, b"\x03cpu\x03\x00\x00\x00\x02\x00\x00\x00\x09\x08");
    assert_eq!(decode_state(&state).as_ref(), Ok(section));
}

/// The same of what moves disks.
#[test]
fn the_format_of_disks_is_fixed() {
    let mut expected = encoded(|out| hello().encode(out).unwrap());
    expected[16] = 1;
    expected.extend([0, 0, 1, 0, 2, 0]);
    expected.extend(b"\x03vda\x00\x02\x00\x03\x02\x01\x00\x00");
    expected.extend(b"\x03vdb\x00\x02\x00\x00\x00\x00\x00\x00");
    let hello = hello_with_disks();
    assert_eq!(encoded(|out| hello.encode(out).unwrap()), expected);
    assert_eq!(Hello::decode(&expected), Ok(hello));

    let body = encoded(|out| encode_blocks(3, &block_runs(), out));
    let mut expected = vec![3, 0, 3, 0, 0, 0];
    expected.extend([
        0, 0, 6, 4, 3, 2, 1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4,
    ]);
    expected.extend([
        1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0,
    ]);
    expected.extend([
        2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    assert_eq!(body, expected);
    let mut runs = vec![];
    assert_eq!(decode_blocks(&body, 0x400, &mut runs), Ok(3));
    assert_eq!(runs, block_runs());

    let flush = Flush { round: 0x0102 };
    assert_eq!(encoded(|out| flush.encode(out)), [2, 1, 0, 0, 0, 0, 0, 0]);
    let flushed = Flushed { flush_ns: 0x0304 };
    assert_eq!(encoded(|out| flushed.encode(out)), [4, 3, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_format_of_post_copy_is_fixed() {
    assert_eq!(POSTCOPY, 2);
    let missing = Missing { pages: 0x0102 };
    assert_eq!(encoded(|out| missing.encode(out)), [2, 1, 0, 0, 0, 0, 0, 0]);
    let returning = Return {
        id: hello().id,
        attempt: 0x0304,
    };
    let expected = [&hello().id.0[..], &[4, 3, 0, 0]].concat();
    assert_eq!(encoded(|out| returning.encode(out)), expected);
    assert_eq!(expected.len(), Return::LEN);
    assert_eq!(Return::decode(&expected), Ok(returning));
    let request = Request {
        address: 0x0102_0304_5000,
        pages: 0x0201,
    };
    assert_eq!(
        encoded(|out| request.encode(out)),
        [0, 0x50, 4, 3, 2, 1, 0, 0, 1, 2, 0, 0]
    );
    let mut pages = crate::bitmap::PageBitmap::new(300);
    for page in [64, 71, 190] {
        pages.set(page);
    }
    let body = encoded(|out| assert!(encode_bits(&pages, 0, out)));
    let mut expected = vec![64, 0, 0, 0, 0, 0, 0, 0];
    expected.extend([0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40]);
    assert_eq!(body, expected);
    assert_eq!(decode_bits(&body, 300), Ok((64, vec![0x81, 1 << 62])));
    for len in 0..Return::LEN {
        assert!(Return::decode(&[0; Return::LEN][..len]).is_err());
    }
    assert!(Missing::decode(&[0; 9]).is_err() && Request::decode(&[0; 13]).is_err());
}

#[test]
fn disks_out_of_bounds_are_refused() {
    let encode = |disks: Vec<Disk>| {
        let mut hello = hello_with_disks();
        hello.offer.disks = disks;
        let mut out = vec![];
        hello.encode(&mut out).map(|()| out)
    };
    for capacity in [0, 511, 513, MAX_DISK + 512, u64::MAX] {
        assert!(encode(vec![disk("vda", capacity)]).is_err(), "{capacity}");
        // The same from a peer that doesn't check.
        let mut body = encode(vec![disk("vda", 512)]).unwrap();
        let at = body.len() - 8;
        body[at..].copy_from_slice(&capacity.to_le_bytes());
        assert!(Hello::decode(&body).is_err(), "{capacity}");
    }
    assert!(encode(vec![disk("vda", MAX_DISK)]).is_ok());
    let twice = encode(vec![disk("vda", 512), disk("vda", 1024)]);
    assert_eq!(twice, Err(DecodeError::DuplicateDisk("vda".to_owned())));
    let names = |count| (0..count).map(|n| disk(&format!("d{n}"), 512)).collect();
    assert!(encode(names(MAX_DISKS)).is_ok());
    assert!(encode(names(MAX_DISKS + 1)).is_err());
    let mut body = encode(names(1)).unwrap();
    let at = body.len() - 17;
    assert_eq!(body[at..at + 4], [0, 0, 1, 0]);
    body[at + 1] = 2;
    assert!(Hello::decode(&body).is_err());

    // What a later build requires may bring fields that this one doesn't know.
    let mut later = hello_with_disks();
    later.required |= 0x80;
    let mut body = encoded(|out| later.encode(out).unwrap());
    body.extend(b"more");
    assert_eq!(Hello::decode(&body), Ok(later));
    let mut body = encode(names(1)).unwrap();
    body.push(0);
    assert_eq!(Hello::decode(&body), Err(DecodeError::Trailing(1)));
}

#[test]
fn parts_of_disks_out_of_bounds_are_refused() {
    let mut runs = vec![];
    let mut decode = |list: &[BlockRun], payload| {
        let body = encoded(|out| encode_blocks(0, list, out));
        decode_blocks(&body, payload, &mut runs)
    };
    let run = |kind, offset, len| BlockRun { kind, offset, len };
    let data = RunKind::Data(7);
    let block = 64 << 10;
    assert!(decode(&[run(data, 512, block)], 64 << 10).is_ok());
    assert!(decode(&[run(RunKind::Zero, 0, MAX_DISK)], 0).is_ok());
    for bad in [
        run(data, 512, block + 512),
        run(data, 512, 0),
        run(data, 512, 511),
        run(data, 511, 512),
        run(RunKind::Zero, 0, 0),
        run(RunKind::Zero, 1, 512),
        run(RunKind::Absent, 512, MAX_DISK),
        run(RunKind::Zero, u64::MAX - 511, 512),
        run(RunKind::Zero, 0, u64::MAX - 511),
    ] {
        let result = decode(&[bad], bad.data_len() as u32);
        assert!(
            matches!(result, Err(DecodeError::BlockRun { .. })),
            "{bad:?}"
        );
    }
    let sixteen: Vec<_> = (0..16).map(|n| run(data, n * block, block)).collect();
    assert!(decode(&sixteen, 1 << 20).is_ok());
    let more = [&sixteen[..], &[run(data, 1 << 30, 512)]].concat();
    assert!(decode(&more, (1 << 20) + 512).is_err());
    assert!(decode(&sixteen, (1 << 20) - 512).is_err());
    assert!(decode(&[run(RunKind::Zero, 0, 512)], 512).is_err());
    let many = vec![run(RunKind::Zero, 0, 512); crate::frame::MAX_BLOCK_RUNS + 1];
    assert!(decode(&many, 0).is_err());

    let mut body = encoded(|out| encode_blocks(0, &[run(RunKind::Zero, 0, 512)], out));
    // A kind that there isn't, and a checksum of nothing.
    for (at, value) in [(6, 3), (body.len() - 1, 1)] {
        let before = std::mem::replace(&mut body[at], value);
        assert!(decode_blocks(&body, 0, &mut vec![]).is_err());
        body[at] = before;
    }
}

#[test]
fn what_is_out_of_bounds_is_refused() {
    let with = |change: fn(&mut Hello)| {
        let mut hello = hello();
        change(&mut hello);
        hello.encode(&mut vec![])
    };
    let blob = |name: &str, len| Blob {
        name: name.to_owned(),
        len,
    };
    assert!(matches!(
        with(|h| h.offer.blobs[0].name = "a b".to_owned()),
        Err(DecodeError::Name(_))
    ));
    assert!(with(|h| h.offer.blobs[0].name.clear()).is_err());
    assert!(with(|h| h.offer.blobs[0].len = MAX_BLOB + 1).is_err());
    assert!(with(|h| h.offer.configuration[0].body = vec![0; 1 << 20]).is_err());
    let mut many = hello();
    many.offer.blobs = vec![blob("b", 1); MAX_BLOBS + 1];
    assert!(many.encode(&mut vec![]).is_err());

    // A preamble's damage is noticed, whichever bit it hits.
    for bit in 0..PREAMBLE_LEN * 8 {
        let mut bytes = Preamble::OURS.encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Preamble::decode(&bytes), None);
    }
    assert_eq!(
        Preamble::decode(&Preamble::OURS.encode()),
        Some(Preamble::OURS)
    );

    let run = |address, pages| AddressRun { address, pages };
    let (mut runs, mut crcs) = (vec![], vec![]);
    let mut pages = |list: &[AddressRun], sums: &[u32], payload| {
        let body = encoded(|out| encode_pages(list, sums, out));
        decode_pages(&body, payload, true, &mut runs, &mut crcs)
    };
    assert_eq!(pages(&[run(0, 1), run(8192, 1)], &[1, 2], 8192), Ok(()));
    assert!(pages(&[run(0, 0)], &[], 0).is_err());
    assert!(pages(&[run(0, 2)], &[1], 8192).is_err());
    assert!(pages(&[run(0, 1)], &[1, 2], 4096).is_err());
    assert!(pages(&[run(0, 1)], &[1], 4095).is_err());
    assert!(pages(&[run(0, 513)], &[0; 513], 513 * 4096).is_err());
    assert_eq!(
        Ready::decode(&[0; 9]),
        Err(DecodeError::Trailing(1)),
        "trailing bytes"
    );
    assert_eq!(End::decode(&[0, 0, 0, 0, 2]), Err(DecodeError::Bool(2)));
}

#[test]
fn reasons_are_bounded_and_safe_to_print() {
    let long = "ä".repeat(MAX_REASON);
    let body = encoded(|out| encode_reason(&long, out));
    assert_eq!(body.len(), MAX_REASON);
    assert!(decode_reason(&body).unwrap().chars().all(|c| c == 'ä'));
    assert_eq!(
        decode_reason(b"two\nlines\x1b[2J\x07").unwrap(),
        "two\nlines\u{fffd}[2J\u{fffd}"
    );
    assert_eq!(decode_reason(&[0xff]), Err(DecodeError::NotText));
}

proptest! {
    /// Nothing that a peer can put in a body does more than fail.
    #[test]
    fn any_bytes_decode_or_fail(body in prop::collection::vec(any::<u8>(), 0..600), payload: u32, checked: bool) {
        let (mut runs, mut crcs) = (vec![], vec![]);
        let _ = Hello::decode(&body);
        let _ = decode_state(&body);
        let _ = BlobChunk::decode(&body);
        let _ = decode_pages(&body, payload, checked, &mut runs, &mut crcs);
        let _ = decode_zero(&body, &mut runs);
        let _ = decode_blocks(&body, payload, &mut vec![]);
        let _ = decode_reason(&body);
        let _ = Go::decode(&body);
        let _ = Accept::decode(&body);
    }

    /// So does a BLOCKS.
    #[test]
    fn a_damaged_blocks_decodes_or_fails(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut body = encoded(|out| encode_blocks(3, &block_runs(), out));
        for (at, value) in changes {
            let at = at.index(body.len());
            body[at] = value;
        }
        let mut runs = vec![];
        if let Ok(disk) = decode_blocks(&body, 0x400, &mut runs) {
            prop_assert_eq!(encoded(|out| encode_blocks(disk, &runs, out)), body);
        }
    }

    /// A valid HELLO with some bytes changed decodes to something valid, or fails.
    #[test]
    fn a_damaged_hello_decodes_or_fails(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut body = encoded(|out| hello_with_disks().encode(out).unwrap());
        for (at, value) in changes {
            let at = at.index(body.len());
            body[at] = value;
        }
        if let Ok(decoded) = Hello::decode(&body)
            && decoded.required & !REQUIRABLE == 0
        {
            prop_assert_eq!(encoded(|out| decoded.encode(out).unwrap()), body);
        }
    }
}

#[test]
fn the_format_of_pages_without_checksums_is_fixed() {
    assert_eq!(UNCHECKED, 16);
    let runs = [AddressRun {
        address: 0x1000,
        pages: 2,
    }];
    let body = encoded(|out| encode_pages(&runs, &[], out));
    assert_eq!(body, [1, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    let (mut found, mut crcs) = (vec![], vec![7]);
    decode_pages(&body, 8192, false, &mut found, &mut crcs).unwrap();
    assert_eq!((&found[..], &crcs[..]), (&runs[..], &[][..]));
    assert!(decode_pages(&body, 4096, false, &mut found, &mut crcs).is_err());
    // What was agreed on counts, not what would fit.
    assert!(decode_pages(&body, 8192, true, &mut found, &mut crcs).is_err());
    let checked = encoded(|out| encode_pages(&runs, &[1, 2], out));
    let error = decode_pages(&checked, 8192, false, &mut found, &mut crcs);
    assert_eq!(error, Err(DecodeError::Trailing(8)));
}

#[test]
fn the_format_of_other_connections_is_fixed() {
    assert_eq!(MULTIFD, 8);
    let body = encoded(|out| encode_barrier(&[0x0102, 3, u64::MAX], out));
    let mut expected = vec![2, 0, 2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
    expected.extend([0xff; 8]);
    assert_eq!(body, expected);
    let mut sent = vec![9];
    decode_barrier(&body, &mut sent).unwrap();
    assert_eq!(sent, [0x0102, 3, u64::MAX]);
    for len in 0..body.len() {
        assert!(decode_barrier(&body[..len], &mut sent).is_err());
    }
    let longer = [&body[..], &[0]].concat();
    let trailing = DecodeError::Trailing(1);
    assert_eq!(decode_barrier(&longer, &mut sent), Err(trailing));
    // One to 255 of them.
    assert!(decode_barrier(&encoded(|out| encode_barrier(&[1], out)), &mut sent).is_err());
    let most = encoded(|out| encode_barrier(&[7; 256], out));
    assert_eq!(most.len(), crate::frame::Kind::Barrier.max_body());
    decode_barrier(&most, &mut sent).unwrap();
    assert!(decode_barrier(&encoded(|out| encode_barrier(&[7; 257], out)), &mut sent).is_err());
}
