//! A source that lies to the destination.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use migration::destination;
use migration::frame::Kind;
use migration::listener::Listener;
use migration::message::{AddressRun, Go, Id, Missing, POSTCOPY, encode_pages, encode_zero};
use migration::postcopy::Control;
use migration::progress::{Progress, Status};

use super::{Peer, bits, returning};
use crate::hostile::{PAGES, body, end, hello, state};
use crate::machine::Destination;
use crate::postcopy::{listener, require_userfault, serve};
use crate::proxy::socket_address;
use crate::whole::{Arriving, destination_job, short};

const ID: Id = Id([7; 16]);
const START: u64 = 0x10_0000;

struct Lie {
    main: Peer,
    faults: Peer,
    arriving: Arriving,
    control: Control<Listener>,
    progress: Arc<Progress>,
}

fn missing(kind: Kind, pages: u64) -> (Kind, Vec<u8>) {
    (kind, body(|out| Missing { pages }.encode(out)))
}

/// A page of a made-up content, and its body; `wrong` is added to the checksum.
fn one_page(address: u64, wrong: u32) -> (Vec<u8>, Vec<u8>) {
    let data = vec![0x5a; 4096];
    let run = AddressRun { address, pages: 1 };
    let crc = crc32fast::hash(&data).wrapping_add(wrong);
    (body(|out| encode_pages(&[run], &[crc], out)), data)
}

impl Lie {
    fn begin() -> Self {
        let (mut listener, uri) = listener();
        let mut job = destination_job();
        job.deadlines = destination::Job::clone(&job).deadlines;
        job.deadlines.linger = short().linger;
        let control = Control::new(Arc::clone(&job.progress));
        job.postcopy = Some(control.clone());
        // For one who says that all was sent.
        job.deadlines.progress = std::time::Duration::from_secs(2);
        let progress = Arc::clone(&job.progress);
        let arriving = std::thread::spawn(move || {
            let mut vm = Destination::default();
            let incoming = listener.accept(&job.cancel, &job.deadlines).unwrap();
            let mut result = destination::receive(&mut vm, incoming, Some(listener), &job);
            serve(&mut result);
            (vm, result)
        });
        let mut offer = hello(vec![]);
        offer.required = POSTCOPY;
        let offer = body(|out| offer.encode(out).unwrap());
        let address = socket_address(&uri);
        let mut main = Peer::connected(address.clone(), Kind::Hello, &offer);
        main.hear_of(Kind::Accept);
        let faults = Peer::connected(address, Kind::Join, &returning(ID, 0));
        Self {
            main,
            faults,
            arriving,
            control,
            progress,
        }
    }

    /// An honest beginning, up to RUNNING: none of its eight pages is there.
    fn running() -> Self {
        let mut lie = Self::begin();
        let all = (1 << PAGES) - 1;
        lie.main.say(Kind::Missing, &bits(0, &[all]));
        let rest = [
            missing(Kind::Late, PAGES),
            state("vcpu.0"),
            state("serial"),
            end(2),
        ];
        for (kind, body) in rest {
            lie.main.say(kind, &body);
        }
        lie.main.hear_of(Kind::Ready);
        let go = Go {
            id: ID,
            run: false,
            stopped_ns: 0,
            round_trip_ns: 0,
        };
        lie.main.say(Kind::Go, &body(|out| go.encode(out)));
        lie.main.hear_of(Kind::Running);
        lie
    }

    fn paused(&self) -> String {
        while self.progress.status() != Status::PostcopyPaused {
            assert!(!self.arriving.is_finished());
            std::thread::yield_now();
        }
        self.progress.snapshot().error.unwrap()
    }

    fn end(self) {
        self.control.end("the test ends");
        let (vm, arrival) = self.arriving.join().unwrap();
        assert!(vm.ran.load(Ordering::SeqCst) && arrival.is_ok());
        assert_eq!(self.progress.status(), Status::Failed);
    }

    fn missing(&self) -> u64 {
        self.progress.snapshot().postcopy.unwrap().missing_pages
    }
}

#[test]
fn before_go_a_lie_ends_it() {
    require_userfault!();
    let told = || (Kind::Missing, bits(0, &[0xff]));
    let cases = [
        (
            vec![told(), missing(Kind::Late, PAGES - 1)],
            "8 pages of guest memory are missing here, the source says 7",
        ),
        (
            vec![(Kind::Missing, bits(0, &[1])), missing(Kind::Late, 1)],
            "8 pages of guest memory are missing here, the source says 1",
        ),
        (
            vec![(Kind::Missing, bits(1, &[1]))],
            "MISSING frame is malformed",
        ),
        (vec![(Kind::Missing, bits(0, &[0x100]))], "past a bitmap"),
        (
            vec![(Kind::Missing, bits(0, &[]))],
            "MISSING frame is malformed",
        ),
        (
            vec![(Kind::Missing, vec![0; 12])],
            "MISSING frame is malformed",
        ),
        (
            vec![(Kind::Missing, bits(u64::MAX - 63, &[1]))],
            "past a bitmap",
        ),
        (vec![missing(Kind::Late, 0)], "LATE is not allowed"),
        (
            vec![told(), (Kind::Zero, vec![0; 20])],
            "ZERO is not allowed",
        ),
        (vec![told(), end(0)], "END is not allowed"),
        (
            vec![told(), missing(Kind::Late, PAGES), told()],
            "MISSING is not allowed",
        ),
        (vec![(Kind::Pushed, vec![])], "PUSHED is not allowed"),
        (
            vec![(Kind::Resume, returning(ID, 1))],
            "RESUME is not allowed",
        ),
    ];
    for (said, expected) in cases {
        let mut lie = Lie::begin();
        for (kind, body) in &said {
            lie.main.say(*kind, body);
        }
        let why = lie.main.hear_of(Kind::Failed);
        let why = String::from_utf8(why).unwrap();
        assert!(why.contains(expected), "{said:?}: {why}");
        drop((lie.main, lie.faults));
        let (vm, arrival) = lie.arriving.join().unwrap();
        assert!(arrival.is_err() && !vm.ran.load(Ordering::SeqCst));
    }
}

#[test]
fn after_go_a_lie_breaks_the_connection_and_places_nothing() {
    require_userfault!();
    let run = |address, pages| AddressRun { address, pages };
    let zero = |address, pages| body(|out| encode_zero(&[run(address, pages)], out));
    let page = |address, wrong| one_page(address, wrong);
    let none = |body: Vec<u8>| (body, vec![]);
    let cases = [
        (Kind::Pages, page(START, 1), "does not match its checksum"),
        (Kind::Pages, page(START + 8 * 4096, 0), "0x108000"),
        (Kind::Pages, page(0, 0), "not"),
        (Kind::Zero, none(zero(START, PAGES + 1)), "0x100000"),
        (Kind::Zero, none(zero(START - 4096, 1)), "0xff000"),
        (Kind::Zero, none(zero(START + 1, 1)), "0x100001"),
        (Kind::Pushed, none(vec![0]), "malformed"),
        (Kind::Go, none(vec![]), "not allowed"),
        (Kind::Missing, none(bits(0, &[1])), "not allowed"),
        (Kind::State, none(vec![]), "not allowed"),
    ];
    for (kind, (body, data), expected) in cases {
        for fault_channel in [false, true] {
            let mut lie = Lie::running();
            let peer = match fault_channel {
                true => &mut lie.faults,
                false => &mut lie.main,
            };
            peer.say_with(kind, &body, &data);
            let why = lie.paused();
            let expected = match kind {
                Kind::Pushed if fault_channel => "not allowed",
                _ => expected,
            };
            assert!(why.contains(expected), "{kind:?} {fault_channel}: {why}");
            assert_eq!(lie.missing(), PAGES);
            lie.end();
        }
    }
}

#[test]
fn all_was_sent_is_not_believed() {
    require_userfault!();
    let mut lie = Lie::running();
    let (said, data) = one_page(START, 0);
    lie.main.say_with(Kind::Pages, &said, &data);
    lie.main.say(Kind::Pushed, &[]);
    let why = lie.paused();
    assert!(
        why.contains("7 pages of guest memory have not come"),
        "{why}"
    );
    lie.end();
}

#[test]
fn a_recovery_is_not_begun_by_a_lie() {
    require_userfault!();
    let lie = Lie::running();
    let _ = lie.main.stream.shutdown(std::net::Shutdown::Both);
    lie.paused();
    let (listener, uri) = listener();
    lie.control.recover(listener).unwrap();
    let address = socket_address(&uri);
    let lies = [
        missing(Kind::Continue, PAGES - 1),
        missing(Kind::Continue, u64::MAX),
        (Kind::Continue, vec![]),
        (Kind::Pushed, vec![]),
        (Kind::Cancel, b"no".to_vec()),
    ];
    let attempts = lies.len() as u32;
    for (attempt, (kind, said)) in (1..).zip(lies) {
        let resume = returning(ID, attempt);
        let mut main = Peer::connected(address.clone(), Kind::Resume, &resume);
        // None has arrived, so that is all that there is to say.
        let left = main.hear_of(Kind::Left);
        assert_eq!(left, PAGES.to_le_bytes());
        main.say(kind, &said);
        assert!(main.hear().is_none());
        lie.paused();
    }
    let resume = returning(ID, attempts + 1);
    let mut main = Peer::connected(address.clone(), Kind::Resume, &resume);
    let mut faults = Peer::connected(address, Kind::Join, &resume);
    main.hear_of(Kind::Left);
    let (kind, said) = missing(Kind::Continue, PAGES);
    main.say(kind, &said);
    for number in 0..PAGES {
        let (said, data) = one_page(START + (number << 12), 0);
        // Twice, by either way: what is there stays.
        main.say_with(Kind::Pages, &said, &data);
        faults.say_with(Kind::Pages, &said, &data);
    }
    main.say(Kind::Pushed, &[]);
    main.hear_of(Kind::Complete);
    main.say(Kind::Done, &[]);
    drop((main, faults));
    let (vm, arrival) = lie.arriving.join().unwrap();
    assert!(vm.ran.load(Ordering::SeqCst) && arrival.is_ok());
    assert_eq!(lie.progress.status(), Status::Completed);
}

/// Whatever else a source says, or that it closes the connection, does not mean that it knows.
#[test]
fn that_it_knows_is_believed_only_if_it_says_so() {
    require_userfault!();
    let mut lie = Lie::running();
    for number in 0..PAGES {
        let (said, data) = one_page(START + (number << 12), 0);
        lie.main.say_with(Kind::Pages, &said, &data);
    }
    lie.main.say(Kind::Pushed, &[]);
    lie.main.hear_of(Kind::Complete);
    let _ = lie.main.stream.shutdown(std::net::Shutdown::Write);
    let (said, data) = one_page(START, 0);
    let none = |body: Vec<u8>| (body, vec![]);
    let lies = [
        (
            Kind::Continue,
            none(0u64.to_le_bytes().to_vec()),
            Some("did not come"),
        ),
        (
            Kind::Continue,
            none(1u64.to_le_bytes().to_vec()),
            Some("the source says 1"),
        ),
        (Kind::Done, none(vec![]), Some("DONE is not allowed")),
        (Kind::Pages, (said, data), Some("PAGES is not allowed")),
        (Kind::Pushed, none(vec![]), None),
        (Kind::Done, none(vec![0]), Some("malformed")),
    ];
    for (attempt, (kind, (said, data), expected)) in (1..).zip(lies) {
        while lie.progress.snapshot().error.is_none() {
            assert!(!lie.arriving.is_finished());
            std::thread::yield_now();
        }
        let (listener, uri) = listener();
        lie.control.recover(listener).unwrap();
        let address = socket_address(&uri);
        let resume = returning(ID, attempt);
        let mut main = Peer::connected(address.clone(), Kind::Resume, &resume);
        main.hear_of(Kind::Left);
        let faults = match kind {
            Kind::Pages | Kind::Pushed | Kind::Done if attempt > 3 => {
                main.say(Kind::Continue, &0u64.to_le_bytes());
                Some(Peer::connected(address, Kind::Join, &resume))
            }
            _ => None,
        };
        if kind == Kind::Done && attempt > 3 {
            main.say(Kind::Pushed, &[]);
            main.hear_of(Kind::Complete);
        }
        main.say_with(kind, &said, &data);
        if kind == Kind::Pushed {
            // What is sent to a socket that is closed resets the connection: another end than this.
            main.hear_of(Kind::Complete);
        }
        drop((main, faults));
        let expected = expected.unwrap_or("closed the connection");
        let mut why = lie.progress.snapshot().error;
        while !why.as_ref().is_some_and(|why| why.contains(expected)) {
            assert!(!lie.arriving.is_finished(), "{kind:?}: {why:?}");
            std::thread::yield_now();
            why = lie.progress.snapshot().error;
        }
        assert_eq!(lie.progress.status(), Status::Completed);
    }
    lie.control.end("the test ends");
    let (vm, arrival) = lie.arriving.join().unwrap();
    assert!(vm.ran.load(Ordering::SeqCst) && arrival.is_ok());
}
