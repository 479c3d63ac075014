//! Whole migrations with compression and with XBZRLE, alone and together, and sources that send
//! what they should not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use migration::compression::Method;
use migration::frame::{HEADER_LEN, Header, Kind};
use migration::layout::PAGE_SIZE;
use migration::parameters::Parameters;
use migration::progress::Snapshot;
use migration::source::{self, Outcome, Peer};
use vm_memory::Bytes;

use crate::machine::{Destination, Source, Writes, address, noise};
use crate::proxy::{Fate, Frame, proxied};
use crate::whole::{BUSY, arrive, assert_moved, destination_job, source_job};

/// Lines of words, of which zstd makes a third or less.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let words = noise(seed, len);
    let mut text = Vec::with_capacity(len + 16);
    for number in words {
        text.extend(format!("word {} ", number % 64).bytes());
        if text.len() >= len {
            break;
        }
    }
    text.truncate(len);
    text
}

/// A paused guest with text in every second page, and noise in every tenth.
pub(crate) fn guest(pages: u64) -> Source {
    let mut vm = Source::new(pages, 300);
    vm.blobs.clear();
    for number in 0..vm.layout.pages() {
        let bytes = match number {
            number if number % 10 == 0 => noise(number, PAGE_SIZE as usize),
            number if number % 2 == 0 => text(number, PAGE_SIZE as usize),
            _ => continue,
        };
        vm.ram
            .write_slice(&bytes, address(&vm.layout, number))
            .unwrap();
    }
    vm
}

/// Migrates `vm` with these parameters, through a proxy that may change what is sent.
fn migrate(
    vm: &mut Source,
    set: impl FnOnce(&Parameters),
    decide: impl FnMut(&mut Frame) -> Fate + Send + 'static,
) -> (Outcome, Destination, String, Snapshot) {
    let (a, b) = proxied(decide);
    let job = source_job();
    set(&job.parameters);
    let arriving = arrive(Destination::of(vm), b, destination_job());
    let outcome = source::migrate(vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    let error = match &arrival {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    if error.is_empty() {
        assert_moved(vm, &outcome, &destination, &arrival);
    }
    (outcome, destination, error, job.progress.snapshot())
}

fn pass(_: &mut Frame) -> Fate {
    Fate::Pass
}

#[test]
fn each_method_of_compression_moves_an_idle_guest_in_fewer_bytes() {
    let mut plain = guest(4000);
    let (_, _, error, plain) = migrate(&mut plain, |_| (), pass);
    assert_eq!(error, "");
    assert!(plain.compression.is_none() && plain.xbzrle.is_none());
    for method in [Method::Lz4, Method::Zstd] {
        let mut vm = guest(4000);
        let set = |parameters: &Parameters| parameters.set_compression(Some(method));
        let (_, _, error, snapshot) = migrate(&mut vm, set, pass);
        assert_eq!(error, "");
        let compression = snapshot.compression.unwrap();
        // Not all of it has to be, but what is within the first window.
        assert!(compression.pages > 1000, "{method:?} {compression:?}");
        let ratio = (compression.pages * PAGE_SIZE) as f64 / compression.bytes as f64;
        assert!(ratio > 1.5, "{method:?} {compression:?}");
        assert_eq!(snapshot.ram.normal, plain.ram.normal);
        assert!(snapshot.ram.transferred < plain.ram.transferred * 3 / 4);
        assert!(snapshot.bytes.pages < snapshot.ram.normal_bytes * 3 / 4);
    }
}

#[test]
fn what_a_busy_guest_writes_while_it_is_compressed_arrives() {
    for method in [Method::Lz4, Method::Zstd] {
        let mut vm = guest(3000);
        vm.run(BUSY);
        let set = |parameters: &Parameters| parameters.set_compression(Some(method));
        let (_, _, error, _) = migrate(&mut vm, set, pass);
        assert_eq!(error, "");
    }
}

/// Few words of many pages, again and again, on a link that takes its time.
pub(crate) const SCATTERED: Writes = Writes {
    pages: 400,
    batch: 100,
    blocks: 0,
    rest: Duration::from_millis(1),
};

/// Migrates a guest that writes on and on, which is not stopped before `enough` frames of
/// differences have been sent; `decide` sees those.
pub(crate) fn migrate_rewriting(
    set: impl FnOnce(&Parameters),
    enough: usize,
    mut decide: impl FnMut(&mut Frame) -> Fate + Send + 'static,
) -> (Source, Outcome, Destination, String, Snapshot) {
    let mut vm = guest(3000);
    vm.run(SCATTERED);
    let job = source_job();
    job.parameters.set_max_bandwidth(20_000_000);
    job.parameters.set_downtime_limit_ms(0).unwrap();
    job.parameters.set_xbzrle(true);
    set(&job.parameters);
    let parameters = Arc::clone(&job.parameters);
    let mut seen = 0;
    let (a, b) = proxied(move |frame| {
        if frame.kind != Some(Kind::Xbzrle) {
            return Fate::Pass;
        }
        seen += 1;
        if seen == enough {
            parameters.set_downtime_limit_ms(2000).unwrap();
        }
        decide(frame)
    });
    let arriving = arrive(Destination::of(&vm), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    let error = match &arrival {
        Ok(_) => {
            assert_moved(&vm, &outcome, &destination, &arrival);
            String::new()
        }
        Err(error) => error.to_string(),
    };
    (vm, outcome, destination, error, job.progress.snapshot())
}

#[test]
fn pages_that_are_written_again_go_as_differences() {
    for method in [None, Some(Method::Lz4), Some(Method::Zstd)] {
        let set = |parameters: &Parameters| parameters.set_compression(method);
        let (_, _, _, error, snapshot) = migrate_rewriting(set, 3, pass);
        assert_eq!(error, "");
        let figures = snapshot.xbzrle.unwrap();
        assert_eq!(figures.cache_size, 64 << 20);
        assert!(figures.pages > 0 && figures.cache_miss > 0, "{figures:?}");
        // Whole pages would be four kilobytes each.
        assert!(figures.bytes < figures.pages * 2100, "{figures:?}");
        assert!(figures.encoding_rate > 1.9, "{figures:?}");
        let sent: u64 = snapshot.rounds.iter().map(|round| round.pages).sum();
        if snapshot.rounds.len() as u64 == snapshot.round {
            assert_eq!(snapshot.ram.normal + figures.pages, sent);
        }
        assert_eq!(snapshot.compression.is_some(), method.is_some());
    }
}

/// The cache is much too small for what is written.
#[test]
fn a_small_cache_serves_a_part() {
    let set = |parameters: &Parameters| {
        parameters.set_xbzrle_cache_size(64 << 10).unwrap();
        assert!(parameters.set_xbzrle_cache_size(65 << 10).is_err());
    };
    let (_, _, _, error, snapshot) = migrate_rewriting(set, 5, pass);
    assert_eq!(error, "");
    let figures = snapshot.xbzrle.unwrap();
    assert_eq!(figures.cache_size, 64 << 10);
    assert!(figures.pages > 0, "{figures:?}");
    assert!(figures.cache_miss > figures.pages, "{figures:?}");
    assert!(figures.cache_miss_rate > 0.3, "{figures:?}");
}

/// A difference that says something else than the source meant is not placed; and what is
/// wrong with the page is not lost, whatever comes after it.
#[test]
fn a_damaged_difference_never_goes_unseen() {
    let mut damaged = false;
    let (vm, outcome, destination, error, _) = migrate_rewriting(
        |_| (),
        6,
        move |frame| {
            // The last byte is within a word that changed.
            if !damaged && frame.payload < frame.bytes.len() {
                *frame.bytes.last_mut().unwrap() ^= 1;
                damaged = true;
            }
            Fate::Pass
        },
    );
    if !error.is_empty() {
        assert!(error.contains("damaged on the way"), "{error}");
        assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
        assert!(vm.is_running() && !destination.ran.load(Ordering::SeqCst));
    }
}

/// Whatever is done to what is compressed, the guest arrives as it is or stays where it was.
#[test]
fn damaged_blocks_fail_the_migration() {
    for (method, at) in [
        (Method::Lz4, 0.0),
        (Method::Lz4, 0.5),
        (Method::Zstd, 0.0),
        (Method::Zstd, 0.5),
        (Method::Zstd, 0.99),
    ] {
        let mut vm = guest(1000);
        let set = |parameters: &Parameters| parameters.set_compression(Some(method));
        let mut damaged = false;
        let (outcome, destination, error, _) = migrate(&mut vm, set, move |frame| {
            if frame.kind == Some(Kind::Compressed) && !damaged {
                let payload = &mut frame.bytes[frame.payload..];
                let at = (payload.len() as f64 * at) as usize;
                payload[at] ^= 0xff;
                damaged = true;
            }
            Fate::Pass
        });
        assert!(!error.is_empty(), "{method:?} at {at}: damage was not seen");
        assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
        assert!(!destination.ran.load(Ordering::SeqCst));
    }
}

/// The connection ends within such a frame: the guest stays where it was.
#[test]
fn a_connection_that_ends_within_them() {
    let half = |frame: &Frame| Fate::Cut((frame.payload + frame.bytes.len()) / 2);
    let (vm, outcome, destination, error, _) = migrate_rewriting(|_| (), 3, move |f| half(f));
    assert!(!error.is_empty());
    assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
    assert!(vm.is_running() && !destination.ran.load(Ordering::SeqCst));
    for method in [Method::Lz4, Method::Zstd] {
        let set = |parameters: &Parameters| parameters.set_compression(Some(method));
        let (outcome, destination, error, _) =
            migrate(&mut guest(500), set, move |frame| match frame.kind {
                Some(Kind::Compressed) => half(frame),
                _ => Fate::Pass,
            });
        assert!(!error.is_empty());
        assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
        assert!(!destination.ran.load(Ordering::SeqCst));
    }
}

/// A destination that picks nothing gets pages as they are.
#[test]
fn what_was_not_picked_is_not_used() {
    let mut vm = guest(2000);
    vm.run(SCATTERED);
    let kinds = Arc::new(AtomicUsize::new(0));
    let set = |parameters: &Parameters| {
        parameters.set_compression(Some(Method::Zstd));
        parameters.set_xbzrle(true);
    };
    let count = Arc::clone(&kinds);
    let (outcome, _, error, snapshot) = migrate(&mut vm, set, move |frame| {
        if frame.kind == Some(Kind::Accept) {
            let capabilities = HEADER_LEN + 18;
            frame.bytes[capabilities..capabilities + 4].fill(0);
            seal(&mut frame.bytes);
        }
        if matches!(frame.kind, Some(Kind::Compressed | Kind::Xbzrle)) {
            count.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    });
    assert!(matches!(outcome, Outcome::Completed(_)), "{error}");
    assert_eq!(kinds.load(Ordering::SeqCst), 0);
    assert!(snapshot.compression.is_none() && snapshot.xbzrle.is_none());
}

/// Makes the checksums of a frame right again.
pub(crate) fn seal(bytes: &mut [u8]) {
    let header: [u8; HEADER_LEN] = bytes[..HEADER_LEN].try_into().unwrap();
    let mut word = [0; 4];
    word.copy_from_slice(&header[8..12]);
    let body = &bytes[HEADER_LEN..HEADER_LEN + u32::from_le_bytes(word) as usize];
    let crc = crc32fast::hash(body);
    bytes[16..20].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..20]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    let bytes: [u8; HEADER_LEN] = bytes[..HEADER_LEN].try_into().unwrap();
    Header::decode(&bytes).unwrap();
}
