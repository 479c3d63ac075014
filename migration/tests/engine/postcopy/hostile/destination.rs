//! A destination that lies to the source.

use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;

use migration::frame::Kind;
use migration::message::{Accept, Hello, Id, Missing, Ready, Request, Running, Sync, SyncAck};
use migration::postcopy::Control;
use migration::progress::{Progress, Status};
use migration::source::{self, Outcome};
use migration::uri::Uri;

use super::{Peer, bits};
use crate::hostile::body;
use crate::machine::Source;
use crate::postcopy::busy;
use crate::whole::source_job;

struct Lie {
    main: Peer,
    faults: Peer,
    source: JoinHandle<(Source, Outcome)>,
    control: Control<Uri>,
    progress: Arc<Progress>,
    /// How many pages the guest has.
    pages: u64,
}

fn listener() -> (TcpListener, Uri) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    (listener, uri.parse().unwrap())
}

fn accept(listener: &TcpListener) -> Peer {
    Peer::accepted(listener.accept().unwrap().0)
}

impl Lie {
    /// An honest beginning: the guest is here, as far as the source can tell.
    fn begin(push: u64) -> Self {
        let (listener, uri) = listener();
        let mut job = source_job();
        let control = Control::new(Arc::clone(&job.progress));
        control.start();
        job.postcopy = Some(control.clone());
        // Last words are not what these peers say.
        job.deadlines.linger = std::time::Duration::from_millis(50);
        job.parameters.set_max_postcopy_bandwidth(push);
        let progress = Arc::clone(&job.progress);
        let source = std::thread::spawn(move || {
            let mut vm = busy(600);
            let outcome = source::migrate(&mut vm, source::Peer::Uri(uri), &job);
            (vm, outcome)
        });
        let mut main = accept(&listener);
        let hello = Hello::decode(&main.hear_of(Kind::Hello)).unwrap();
        let accepted = Accept {
            id: hello.id,
            version: 1,
            capabilities: 0,
        };
        main.say(Kind::Accept, &body(|out| accepted.encode(out)));
        let mut faults = accept(&listener);
        faults.hear_of(Kind::Join);
        loop {
            match main.hear().unwrap() {
                (Kind::Sync, said) => {
                    let mark = Sync::decode_padded(&said).unwrap().mark;
                    main.say(Kind::SyncAck, &body(|out| SyncAck { mark }.encode(out)));
                }
                (Kind::End, _) => break,
                _ => {}
            }
        }
        main.say(Kind::Ready, &body(|out| Ready { load_ns: 1 }.encode(out)));
        main.hear_of(Kind::Go);
        main.say(
            Kind::Running,
            &body(|out| Running { start_ns: 1 }.encode(out)),
        );
        Self {
            main,
            faults,
            source,
            control,
            progress,
            pages: hello.offer.layout.pages(),
        }
    }

    /// Waits until the source is paused; returns why.
    fn paused(&self) -> String {
        while self.progress.status() != Status::PostcopyPaused {
            assert!(!self.source.is_finished());
            std::thread::yield_now();
        }
        self.progress.snapshot().error.unwrap()
    }

    fn end(self) -> Outcome {
        self.control.end("the test ends");
        let (vm, outcome) = self.source.join().unwrap();
        assert!(!vm.is_running(), "it runs here too: {outcome:?}");
        outcome
    }
}

fn request(address: u64, pages: u32) -> Vec<u8> {
    body(|out| Request { address, pages }.encode(out))
}

#[test]
fn what_it_says_is_checked() {
    let gone = [&[0xff, 0xfe][..], b"bytes"].concat();
    let on_main: [(Kind, Vec<u8>, &str); 8] = [
        (Kind::Complete, vec![], "pages were never sent"),
        (Kind::Complete, vec![1], "malformed"),
        (Kind::Gone, gone, "GONE"),
        (Kind::Running, vec![0; 8], "not allowed in phase"),
        (Kind::Ready, vec![0; 8], "not allowed in phase"),
        (Kind::Failed, b"no".to_vec(), "not allowed in phase"),
        (Kind::Request, request(0, 1), "not allowed in phase"),
        (Kind::Arrived, bits(0, &[1]), "not allowed in phase"),
    ];
    for (kind, said, expected) in on_main {
        let mut lie = Lie::begin(1_000_000);
        lie.main.say(kind, &said);
        let why = lie.paused();
        assert!(why.contains(expected), "{kind:?}: {why}");
        let outcome = lie.end();
        assert!(matches!(outcome, Outcome::Abandoned { .. }), "{outcome:?}");
    }
    let on_faults: [(Kind, Vec<u8>, &str); 8] = [
        (Kind::Request, request(1 << 50, 1), "does not have"),
        (Kind::Request, request(u64::MAX - 4095, 1), "does not have"),
        (Kind::Request, request(1, 1), "does not have"),
        (Kind::Request, request(0, 0), "broke"),
        (Kind::Request, request(0, 513), "pages in a request"),
        (Kind::Request, request(0, u32::MAX), "pages in a request"),
        (Kind::Request, vec![0; 11], "malformed"),
        (Kind::Complete, vec![], "not allowed in phase"),
    ];
    for (kind, said, expected) in on_faults {
        let mut lie = Lie::begin(1_000_000);
        lie.faults.say(kind, &said);
        let why = lie.paused();
        assert!(why.contains(expected), "{said:?}: {why}");
        let outcome = lie.end();
        assert!(matches!(outcome, Outcome::Abandoned { .. }), "{outcome:?}");
    }
}

#[test]
fn a_flood_of_requests_takes_nothing_down() {
    let mut lie = Lie::begin(1_000_000);
    let mut faults = Peer {
        stream: lie.faults.stream.try_clone().unwrap(),
        sent: 0,
    };
    // Nobody reads what is sent, so in the end nothing can be said either.
    let flood = std::thread::spawn(move || {
        for _ in 0..200_000 {
            faults.say(Kind::Request, &request(0, 64));
        }
    });
    lie.main.say(Kind::Gone, b"it was\x1b[31m short");
    let (vm, outcome) = lie.source.join().unwrap();
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert!(!vm.is_running());
    let why = lie.progress.snapshot().error.unwrap();
    assert!(why.starts_with("it was") && !why.contains('\x1b'), "{why}");
    flood.join().unwrap();
}

#[test]
fn what_it_says_has_arrived_is_checked() {
    let lie = Lie::begin(100_000);
    let _ = lie.main.stream.shutdown(std::net::Shutdown::Both);
    lie.paused();
    let pages = lie.pages;
    assert!(!pages.is_multiple_of(64));
    let mut all = vec![u64::MAX; pages as usize / 64];
    all.push((1 << (pages % 64)) - 1);
    let past = bits(pages / 64 * 64, &[1 << (pages % 64)]);
    let misses = format!("misses {} pages", pages - 1);
    let left = |pages| (Kind::Left, body(|out| Missing { pages }.encode(out)));
    let cases = [
        (
            vec![(Kind::Arrived, bits(0, &all)), left(0)],
            "which was never sent",
        ),
        (vec![(Kind::Arrived, past)], "the page number past a bitmap"),
        (vec![(Kind::Arrived, bits(1, &[1]))], "malformed"),
        (
            vec![(Kind::Arrived, bits(u64::MAX - 63, &[1]))],
            "malformed",
        ),
        (vec![left(pages - 1)], &misses),
        (vec![left(u64::MAX)], "misses 18446744073709551615 pages"),
        (vec![(Kind::Running, vec![0; 8])], "not allowed in phase"),
        (vec![(Kind::Complete, vec![])], "not allowed in phase"),
        (vec![(Kind::Gone, b"x".to_vec())], "not allowed in phase"),
        (vec![(Kind::Refuse, b"not you".to_vec())], "not you"),
    ];
    for (attempt, (said, expected)) in (1..).zip(cases) {
        let (listener, uri) = listener();
        lie.control.recover(uri).unwrap();
        let mut main = accept(&listener);
        let resume = main.hear_of(Kind::Resume);
        assert_eq!(resume[16..], u32::to_le_bytes(attempt));
        assert_ne!(Id(resume[..16].try_into().unwrap()), Id([0; 16]));
        for (kind, body) in &said {
            main.say(*kind, body);
        }
        // It is recovering until it is paused again.
        while !lie.progress.snapshot().error.unwrap().contains(expected) {
            assert!(!lie.source.is_finished());
            std::thread::yield_now();
        }
        lie.paused();
    }
    lie.end();
}
