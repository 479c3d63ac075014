//! Frames whose pages have to be decoded, changed on the way: by accident, or by a liar who makes
//! their checksums right. The migration ends, and the guest runs on where it was.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use migration::compression::Method;
use migration::frame::{HEADER_LEN, Kind};
use migration::parameters::Parameters;
use migration::source::{self, Outcome};

use crate::encoded::{SCATTERED, guest, seal};
use crate::multifd::{FIRST, TCP, assert_stayed, migrate};
use crate::proxy::{Fate, Frame};

/// How pages come, and where: differences always come on the first connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    /// `None` for XBZRLE.
    method: Option<Method>,
    multifd: bool,
}

const WAYS: [Way; 6] = [
    way(Some(Method::Lz4), false),
    way(Some(Method::Lz4), true),
    way(Some(Method::Zstd), false),
    way(Some(Method::Zstd), true),
    way(None, false),
    way(None, true),
];

const fn way(method: Option<Method>, multifd: bool) -> Way {
    Way { method, multifd }
}

/// Migrates a guest that writes on and on, with each such frame changed; it must not succeed, unless
/// what was changed came again as it is: then it is done again, a few times at most. Returns the reason that
/// the destination gave.
fn refused(
    way: Way,
    what: &str,
    change: impl FnMut(&mut Frame) + Clone + Send + 'static,
) -> String {
    for _ in 0..20 {
        // If it succeeds, it has compared the memory of both sides.
        if let Some(error) = attempt(way, what, change.clone()) {
            return error;
        }
        assert!(way.method.is_none(), "{way:?}, {what}: it succeeded");
    }
    panic!("{way:?}, {what}: it succeeds each time");
}

/// One migration: it is not stopped before some such frames have come. `None` if it succeeds.
fn attempt(
    way: Way,
    what: &str,
    mut change: impl FnMut(&mut Frame) + Send + 'static,
) -> Option<String> {
    let mut vm = guest(1000);
    vm.run(SCATTERED);
    let parameters = Arc::new(Mutex::new(None::<Arc<Parameters>>));
    let held = Arc::clone(&parameters);
    let set = |job: &source::Job| {
        job.parameters.set_multifd(way.multifd);
        job.parameters.set_compression(way.method);
        job.parameters.set_xbzrle(way.method.is_none());
        job.parameters.set_max_bandwidth(20_000_000);
        job.parameters.set_downtime_limit_ms(0).unwrap();
        *held.lock().unwrap() = Some(Arc::clone(&job.parameters));
    };
    let kind = match way.method {
        Some(_) => Kind::Compressed,
        None => Kind::Xbzrle,
    };
    let changed = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&changed);
    let ended = migrate(&mut vm, 2, TCP, set, move |frame| {
        if frame.kind == Some(kind) {
            let data = way.multifd && way.method.is_some();
            assert_eq!(frame.connection != FIRST, data);
            change(frame);
            if count.fetch_add(1, Ordering::SeqCst) == 3 {
                let parameters = parameters.lock().unwrap();
                let parameters = parameters.as_ref().unwrap();
                parameters.set_downtime_limit_ms(2000).unwrap();
            }
        }
        Fate::Pass
    });
    assert!(changed.load(Ordering::SeqCst) > 0, "{way:?}: none came");
    if matches!(ended.outcome, Outcome::Completed(_)) {
        return None;
    }
    assert!(
        matches!(ended.outcome, Outcome::Failed { .. }),
        "{way:?}, {what}: {:?}",
        ended.outcome
    );
    assert_stayed(&vm, &ended);
    Some(ended.error)
}

/// Changes a bit at such a share of a part.
fn flip(part: &mut [u8], share: f64) {
    let at = ((part.len() as f64 * share) as usize).min(part.len() - 1);
    part[at] ^= 1 << (at % 8);
}

const SHARES: [f64; 4] = [0.0, 0.3, 0.7, 1.0];

#[test]
fn a_bit_of_the_body() {
    for way in WAYS {
        for share in SHARES {
            let error = refused(way, &format!("at {share}"), move |frame| {
                let end = frame.payload;
                flip(&mut frame.bytes[HEADER_LEN..end], share);
            });
            assert!(error.contains("checksum"), "{way:?} at {share}: {error}");
        }
    }
}

#[test]
fn a_bit_of_the_payload() {
    for way in WAYS {
        for share in SHARES {
            refused(way, &format!("at {share}"), move |frame| {
                let begin = frame.payload;
                flip(&mut frame.bytes[begin..], share);
            });
        }
    }
}

/// What a frame says of itself, with its checksums right.
#[test]
fn lies_in_the_body() {
    for way in WAYS {
        // COMPRESSED begins with the method.
        let runs = usize::from(way.method.is_some());
        let lies = [
            ("number of runs", runs),
            ("number of runs", runs + 3),
            ("address of a page", runs + 4),
            ("region of a page", runs + 11),
            ("number of pages", runs + 12),
            ("number of pages", runs + 15),
            ("checksum of a page", runs + 16),
        ];
        let method = way.method.map(|_| ("method", 0));
        for (what, at) in lies.into_iter().chain(method) {
            refused(way, what, move |frame| {
                frame.bytes[HEADER_LEN + at] ^= 0x41;
                seal(&mut frame.bytes);
            });
        }
        refused(way, "length of the last block or difference", |frame| {
            frame.bytes[frame.payload - 2] ^= 0x41;
            seal(&mut frame.bytes);
        });
    }
}

/// Puts another block in the place of the first one of a COMPRESSED.
fn replace_first_block(frame: &mut Frame, block: &[u8]) {
    let body = &frame.bytes[HEADER_LEN..frame.payload];
    let word = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap()) as usize;
    let runs = word(1);
    let pages: usize = (0..runs).map(|run| word(5 + 12 * run + 8)).sum();
    let lengths = 5 + 12 * runs + 4 * pages;
    let first = word(lengths);
    let payload = frame.bytes.len() - frame.payload - first + block.len();
    let begin = frame.payload;
    let at = HEADER_LEN + lengths;
    frame.bytes[at..at + 4].copy_from_slice(&(block.len() as u32).to_le_bytes());
    frame.bytes[12..16].copy_from_slice(&(payload as u32).to_le_bytes());
    let was = begin..begin + first;
    frame.bytes.splice(was, block.iter().copied());
    seal(&mut frame.bytes);
}

/// Decoded, it would be a thousand times as much as the pages that it is said to be.
#[test]
fn a_block_that_grows_beyond_its_pages() {
    let zeroes = |pages: usize| vec![0; pages << 12];
    for (method, block) in [
        // Not more bytes than it may take, 64 KiB.
        (Method::Lz4, lz4_flex::block::compress(&zeroes(3 << 10))),
        (
            Method::Zstd,
            zstd::bulk::compress(&zeroes(16 << 10), 1).unwrap(),
        ),
    ] {
        assert!(block.len() < 64 << 10);
        for multifd in [false, true] {
            let block = block.clone();
            let error = refused(way(Some(method), multifd), "a bomb", move |frame| {
                replace_first_block(frame, &block);
            });
            assert!(error.contains("of that length"), "{error}");
        }
    }
}
