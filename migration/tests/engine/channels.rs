//! More connections (`multifd`) at the destination, from a source in the hands of a test.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use migration::cancel::Cancel;
use migration::destination;
use migration::frame::{HEADER_LEN, Header, Kind};
use migration::layout::{GuestRam, Layout, PAGE_SIZE};
use migration::listener::Listener;
use migration::message::{
    Accept, AddressRun, Go, Hello, Id, MULTIFD, POSTCOPY, Preamble, Return, Sync, encode_barrier,
    encode_pages,
};
use migration::postcopy::Control;
use migration::progress::{Progress, Status};

use crate::hostile::{PAGES, body, end, hello, state, zero};
use crate::machine::{Destination, noise, page};
use crate::postcopy::require_userfault;
use crate::proxy::socket_address;
use crate::whole::{Arriving, arrive, destination_job, short, tcp_pair};

const ID: Id = Id([7; 16]);
const START: u64 = 0x10_0000;

/// One connection of the source.
struct Connection {
    stream: TcpStream,
    sent: u32,
}

impl Connection {
    fn new(address: &(String, u16), kind: Kind, body: &[u8]) -> Self {
        let mut stream = TcpStream::connect(address.clone()).unwrap();
        stream.write_all(&Preamble::OURS.encode()).unwrap();
        let mut connection = Self { stream, sent: 0 };
        connection.say((kind, body.to_vec()), &[]);
        connection
    }

    fn frame(&mut self, kind: Kind, body: &[u8], payload: &[u8]) -> Vec<u8> {
        let header = Header {
            kind,
            sequence: self.sent,
            body_len: body.len() as u32,
            payload_len: payload.len() as u32,
            body_crc: crc32fast::hash(body),
        };
        self.sent += 1;
        [&header.encode()[..], body, payload].concat()
    }

    /// What cannot be sent any more is not: the other side has seen enough.
    fn say(&mut self, (kind, body): (Kind, Vec<u8>), payload: &[u8]) {
        let frame = self.frame(kind, &body, payload);
        let _ = self.stream.write_all(&frame);
    }

    /// One page of that content.
    fn page(&mut self, number: u64, content: &[u8]) {
        self.say(pages(number, content), content);
    }

    fn hear(&mut self) -> Option<(Kind, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).ok()?;
        let header = Header::decode(&header).unwrap();
        let mut body = vec![0; header.body_len as usize];
        self.stream.read_exact(&mut body).ok()?;
        Some((header.kind, body))
    }

    /// Waits for a frame of that kind, whatever comes before.
    fn hear_of(&mut self, kind: Kind) -> Vec<u8> {
        loop {
            match self.hear() {
                Some((found, body)) if found == kind => return body,
                Some((Kind::Failed, body)) => panic!("{}", String::from_utf8_lossy(&body)),
                Some(_) => {}
                None => panic!("{} never came", kind.name()),
            }
        }
    }

    fn end(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// What it has sent goes, and a reset behind it.
    fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO)).unwrap();
    }
}

fn pages(first: u64, content: &[u8]) -> (Kind, Vec<u8>) {
    let crcs: Vec<_> = content
        .chunks(PAGE_SIZE as usize)
        .map(crc32fast::hash)
        .collect();
    let run = AddressRun {
        address: START + first * PAGE_SIZE,
        pages: crcs.len() as u64,
    };
    (Kind::Pages, body(|out| encode_pages(&[run], &crcs, out)))
}

fn barrier(sent: &[u64]) -> (Kind, Vec<u8>) {
    (Kind::Barrier, body(|out| encode_barrier(sent, out)))
}

fn sync(mark: u64) -> (Kind, Vec<u8>) {
    (Kind::Sync, body(|out| Sync { mark, round: 0 }.encode(out)))
}

fn content(seed: u64) -> Vec<u8> {
    noise(seed, PAGE_SIZE as usize)
}

/// A migration, past ACCEPT.
struct Coming {
    main: Connection,
    address: (String, u16),
    arriving: Arriving,
    cancel: Cancel,
    progress: Arc<Progress>,
    ram: GuestRam,
}

impl Coming {
    fn begin(change: impl FnOnce(&mut destination::Job)) -> Self {
        let mut hello = hello(vec![]);
        hello.optional = MULTIFD;
        Self::offer(&hello, change)
    }

    fn offer(hello: &Hello, change: impl FnOnce(&mut destination::Job)) -> Self {
        let mut listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket_address(listener.uri());
        let mut job = destination_job();
        job.deadlines.linger = short().linger;
        change(&mut job);
        let (cancel, progress) = (job.cancel.clone(), Arc::clone(&job.progress));
        let (send, ram) = mpsc::channel();
        let arriving = std::thread::spawn(move || {
            let mut vm = Destination {
                on_prepare: Some(Box::new(move |ram: &GuestRam| {
                    send.send(ram.clone()).unwrap();
                })),
                ..Destination::default()
            };
            let incoming = listener.accept(&job.cancel, &job.deadlines).unwrap();
            let result = destination::receive(&mut vm, incoming, Some(listener), &job);
            (vm, result)
        });
        let hello = body(|out| hello.encode(out).unwrap());
        let mut main = Connection::new(&address, Kind::Hello, &hello);
        let accept = Accept::decode(&main.hear_of(Kind::Accept)).unwrap();
        assert_eq!(accept.capabilities, MULTIFD);
        Self {
            main,
            address,
            arriving,
            cancel,
            progress,
            ram: ram.recv().unwrap(),
        }
    }

    fn channel(&self, index: u32) -> Connection {
        self.channel_of(ID, index)
    }

    fn channel_of(&self, id: Id, index: u32) -> Connection {
        let attempt = index;
        let said = body(|out| Return { id, attempt }.encode(out));
        Connection::new(&self.address, Kind::Channel, &said)
    }

    /// How many frames were sent on the first connection and on those.
    fn sent(&self, channels: &[&Connection]) -> Vec<u64> {
        let all = std::iter::once(&self.main).chain(channels.iter().copied());
        all.map(|connection| connection.sent.into()).collect()
    }

    /// All that follows once the memory was sent; the guest that has arrived.
    fn finish(mut self) -> Destination {
        self.main.say(state("vcpu.0"), &[]);
        self.main.say(state("serial"), &[]);
        self.main.say(end(2), &[]);
        self.main.hear_of(Kind::Ready);
        let go = Go {
            id: ID,
            run: false,
            stopped_ns: 0,
            round_trip_ns: 0,
        };
        self.main.say((Kind::Go, body(|out| go.encode(out))), &[]);
        self.main.hear_of(Kind::Running);
        drop(self.main);
        let (vm, arrival) = self.arriving.join().unwrap();
        arrival.unwrap();
        assert!(vm.ran.load(Ordering::SeqCst));
        vm
    }

    /// The reason why it failed, which the source hears on the first connection.
    fn failed(mut self) -> String {
        let mut heard = None;
        while let Some((kind, body)) = self.main.hear() {
            heard = Some((kind, String::from_utf8(body).unwrap_or_default()));
        }
        drop(self.main);
        let (vm, arrival) = self.arriving.join().unwrap();
        let error = arrival.unwrap_err().to_string();
        assert!(!vm.ran.load(Ordering::SeqCst));
        assert!(vm.ram.is_none(), "it was not abandoned");
        assert_eq!(heard, Some((Kind::Failed, error.clone())));
        error
    }
}

fn assert_pages(vm: &Destination, expected: &[Vec<u8>]) {
    let ram = vm.ram.as_ref().unwrap();
    let layout = &vm.offer.as_ref().unwrap().layout;
    for (number, expected) in expected.iter().enumerate() {
        assert!(
            page(ram, layout, number as u64) == *expected,
            "page {number}"
        );
    }
}

#[test]
fn pages_come_over_three_connections() {
    let mut coming = Coming::begin(|_| ());
    coming.main.say(sync(1), &[]);
    let expected: Vec<_> = (0..PAGES).map(content).collect();
    // In any order, and one only when another has brought something already.
    let mut second = coming.channel(1);
    second.say(pages(0, &expected[..3].concat()), &expected[..3].concat());
    coming.main.page(3, &expected[3]);
    let mut first = coming.channel(0);
    for number in [6, 4, 7] {
        first.page(number, &expected[number as usize]);
    }
    second.page(5, &expected[5]);
    first.end();
    second.end();
    let sent = coming.sent(&[&first, &second]);
    coming.main.say(barrier(&sent), &[]);
    coming.main.say(sync(2), &[]);
    coming.main.hear_of(Kind::SyncAck);
    coming.main.hear_of(Kind::SyncAck);
    let progress = Arc::clone(&coming.progress);
    let vm = coming.finish();
    assert_pages(&vm, &expected);
    let snapshot = progress.snapshot();
    assert_eq!(snapshot.bytes.pages, PAGES * PAGE_SIZE);
    assert_eq!((snapshot.ram.normal, snapshot.ram.remaining), (PAGES, 0));
    assert!(snapshot.ram.transferred > PAGES * PAGE_SIZE);
}

/// In each round the older copy of a page is held back until the newer one has been sent behind a
/// BARRIER, on another connection or on the first one.
#[test]
fn the_newer_copy_of_a_page_wins() {
    for newer_on_main in [false, true] {
        let mut coming = Coming::begin(|_| ());
        coming.main.say(zero(START, PAGES), &[]);
        let (mut older, mut newer) = (coming.channel(0), coming.channel(1));
        let mut expected = vec![vec![0; PAGE_SIZE as usize]; PAGES as usize];
        for round in 0..2 * PAGES {
            let number = round % PAGES;
            let (old, new) = (content(round), content(1000 + round));
            let sent = coming.sent(&[&older, &newer]);
            older.say(barrier(&sent), &[]);
            let (kind, said) = pages(number, &old);
            let held_back = older.frame(kind, &said, &old);
            // A part of it, so that its connection is in the middle of the page.
            older.stream.write_all(&held_back[..3000]).unwrap();
            let sent = coming.sent(&[&older, &newer]);
            let by = match newer_on_main {
                true => &mut coming.main,
                false => &mut newer,
            };
            by.say(barrier(&sent), &[]);
            by.page(number, &new);
            // A barrier that holds nothing up has time to show that.
            for _ in 0..10 {
                std::thread::sleep(Duration::from_millis(1));
                let layout = Layout::of(&coming.ram).unwrap();
                assert!(page(&coming.ram, &layout, number) != new, "it did not wait");
            }
            older.stream.write_all(&held_back[3000..]).unwrap();
            expected[number as usize] = new;
        }
        older.end();
        newer.end();
        let sent = coming.sent(&[&older, &newer]);
        coming.main.say(barrier(&sent), &[]);
        assert_pages(&coming.finish(), &expected);
    }
}

#[test]
fn a_connection_that_breaks_within_a_frame_fails_the_arrival() {
    let mut coming = Coming::begin(|_| ());
    coming.main.say(sync(1), &[]);
    let mut channel = coming.channel(0);
    let (kind, said) = pages(0, &content(1));
    let frame = channel.frame(kind, &said, &content(1));
    channel.stream.write_all(&frame[..1000]).unwrap();
    // Nothing more comes on the first connection: it has to be woken.
    drop(channel);
    let error = coming.failed();
    assert!(
        error.starts_with("data connection 0: the peer closed the connection"),
        "{error}"
    );
}

/// The connections break first, and then the source says why.
#[test]
fn the_source_has_the_last_word() {
    let mut coming = Coming::begin(|job| job.deadlines.linger = Duration::from_secs(3600));
    let mut channel = coming.channel(0);
    let (kind, said) = pages(0, &content(1));
    let frame = channel.frame(kind, &said, &content(1));
    channel.stream.write_all(&frame[..1000]).unwrap();
    drop(channel);
    coming.main.say(sync(1), &[]);
    coming.main.page(0, &content(2));
    let reason = b"the user does not want it".to_vec();
    coming.main.say((Kind::Cancel, reason), &[]);
    coming.main.end();
    while coming.main.hear().is_some() {}
    drop(coming.main);
    let error = coming.arriving.join().unwrap().1.unwrap_err();
    let expected = "the source cancelled: the user does not want it";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_connection_that_breaks_when_all_of_it_was_placed_is_no_failure() {
    let mut coming = Coming::begin(|_| ());
    coming.main.say(zero(START, PAGES), &[]);
    let mut channel = coming.channel(0);
    // Behind the zeroes.
    let sent = coming.sent(&[&channel]);
    channel.say(barrier(&sent), &[]);
    channel.page(0, &content(1));
    let sent = coming.sent(&[&channel]);
    coming.main.say(barrier(&sent), &[]);
    coming.main.say(sync(1), &[]);
    coming.main.hear_of(Kind::SyncAck);
    channel.reset();
    let mut again = coming.channel(3);
    again.page(1, &content(2));
    again.end();
    let sent = [vec![0], sent[1..].to_vec(), vec![0, 0, 2]].concat();
    coming.main.say(barrier(&sent), &[]);
    let mut expected = vec![vec![0; PAGE_SIZE as usize]; PAGES as usize];
    expected[0] = content(1);
    expected[1] = content(2);
    assert_pages(&coming.finish(), &expected);
}

#[test]
fn what_is_lost_is_missed() {
    let mut coming = Coming::begin(|_| ());
    coming.main.say(zero(START, PAGES), &[]);
    let mut channel = coming.channel(1);
    channel.page(0, &content(1));
    channel.end();
    coming.main.say(barrier(&[0, 0, u64::MAX]), &[]);
    assert_eq!(
        coming.failed(),
        format!(
            "data connection 1 ended after 2 frames, but {} were sent on it",
            u64::MAX
        )
    );
}

#[test]
fn silence_ends_at_the_deadline() {
    // One that never comes, one on which nothing comes, and one that goes on when all was sent.
    for (sent, connected, expected) in [
        (
            vec![0, 0, 1],
            false,
            "data connection 1 has brought 0 of 1 frames",
        ),
        (
            vec![0, 2],
            true,
            "data connection 0 has brought 1 of 2 frames",
        ),
        (vec![0, 1], true, "data connection 0 has not ended"),
    ] {
        let mut coming = Coming::begin(|job| job.deadlines.progress = short().progress);
        coming.main.say(zero(START, PAGES), &[]);
        let channel = connected.then(|| coming.channel(0));
        coming.main.say(barrier(&sent), &[]);
        coming.main.say(end(0), &[]);
        let error = coming.failed();
        assert!(error.starts_with(expected), "{error}");
        drop(channel);
    }
}

#[test]
fn connections_that_do_not_belong_here_are_dropped() {
    let mut coming = Coming::begin(|_| ());
    coming.main.say(zero(START, PAGES), &[]);
    let mut first = coming.channel(0);
    let sent = coming.sent(&[&first]);
    coming.main.say(barrier(&sent), &[]);
    coming.main.say(sync(1), &[]);
    coming.main.hear_of(Kind::SyncAck);
    let said = body(|out| Return { id: ID, attempt: 0 }.encode(out));
    for mut stranger in [
        coming.channel(0),
        coming.channel(255),
        coming.channel(u32::MAX),
        coming.channel_of(Id([8; 16]), 1),
        Connection::new(&coming.address, Kind::Join, &said),
        Connection::new(&coming.address, Kind::Resume, &said),
    ] {
        stranger.page(1, &content(9));
        assert!(stranger.hear().is_none());
    }
    // The last that there can be, and the first goes on.
    let mut last = coming.channel(254);
    last.page(2, &content(3));
    first.page(0, &content(1));
    first.end();
    last.end();
    let mut sent = vec![0; 256];
    (sent[1], sent[255]) = (2, 2);
    coming.main.say(barrier(&sent), &[]);
    let mut expected = vec![vec![0; PAGE_SIZE as usize]; PAGES as usize];
    expected[0] = content(1);
    expected[2] = content(3);
    assert_pages(&coming.finish(), &expected);
}

#[test]
fn what_is_wrong_on_a_data_connection_is_said() {
    let outside = AddressRun {
        address: 0,
        pages: 1,
    };
    let crc = [crc32fast::hash(&content(1))];
    let outside = body(|out| encode_pages(&[outside], &crc, out));
    for (frame, payload, expected) in [
        (sync(1), vec![], "SYNC is not allowed in phase Data"),
        (state("a"), vec![], "STATE is not allowed in phase Data"),
        (zero(START, PAGES + 1), vec![], "not within one region"),
        (
            (Kind::Pages, outside),
            content(1),
            "1 pages at 0x0 are not within",
        ),
        (
            (Kind::Barrier, vec![0, 0]),
            vec![],
            "a BARRIER frame is malformed",
        ),
        (
            (Kind::Barrier, vec![0, 1]),
            vec![],
            "a BARRIER frame is malformed",
        ),
        (
            (Kind::Compressed, vec![9]),
            vec![],
            "a COMPRESSED frame is malformed",
        ),
    ] {
        let coming = Coming::begin(|_| ());
        let mut channel = coming.channel(7);
        channel.say(frame, &payload);
        let error = coming.failed();
        assert!(error.starts_with("data connection 7: "), "{error}");
        assert!(error.contains(expected), "{error} instead of {expected}");
    }
    let coming = Coming::begin(|_| ());
    let mut channel = coming.channel(7);
    channel.sent += 1;
    channel.say(zero(START, 1), &[]);
    let error = coming.failed();
    assert!(
        error.contains("frame 2 came where frame 1 was due"),
        "{error}"
    );
}

/// What two connections do to the same pages at the same time is undone by the next pass.
#[test]
fn overlapping_pages() {
    let mut coming = Coming::begin(|_| ());
    coming.main.say(zero(START, PAGES), &[]);
    let writers: Vec<_> = (0..4)
        .map(|index| {
            let mut channel = coming.channel(index);
            std::thread::spawn(move || {
                for _ in 0..50 {
                    let all: Vec<_> = (0..PAGES).flat_map(|_| content(index.into())).collect();
                    channel.say(pages(0, &all), &all);
                    channel.say(zero(START, PAGES), &[]);
                }
                channel.end();
                channel
            })
        })
        .collect();
    let channels: Vec<_> = writers
        .into_iter()
        .map(|writer| writer.join().unwrap())
        .collect();
    let sent = coming.sent(&channels.iter().collect::<Vec<_>>());
    coming.main.say(barrier(&sent), &[]);
    let expected: Vec<_> = (0..PAGES).map(|number| content(100 + number)).collect();
    coming
        .main
        .say(pages(0, &expected.concat()), &expected.concat());
    assert_pages(&coming.finish(), &expected);
}

#[test]
fn a_cancel_ends_every_wait() {
    // On the first connection, on another one, and while nothing comes at all.
    for (on_main, on_channel) in [(true, false), (false, true), (false, false)] {
        let mut coming = Coming::begin(|_| ());
        coming.main.say(sync(1), &[]);
        let mut channel = coming.channel(0);
        if on_main {
            coming.main.say(barrier(&[0, 9]), &[]);
        }
        if on_channel {
            channel.say(barrier(&[9, 0]), &[]);
        }
        coming.main.hear_of(Kind::SyncAck);
        coming.cancel.cancel("by the user").unwrap();
        let progress = Arc::clone(&coming.progress);
        assert_eq!(coming.failed(), "by the user");
        assert_eq!(progress.status(), Status::Cancelled);
    }
}

#[test]
fn without_more_connections_nobody_is_waited_for() {
    let mut offer = hello(vec![]);
    let mut listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket_address(listener.uri());
    let job = destination_job();
    let arriving = std::thread::spawn(move || {
        let incoming = listener.accept(&job.cancel, &job.deadlines).unwrap();
        let result =
            destination::receive(&mut Destination::default(), incoming, Some(listener), &job);
        result.map(|_| ())
    });
    let said = body(|out| offer.encode(out).unwrap());
    let mut main = Connection::new(&address, Kind::Hello, &said);
    main.hear_of(Kind::Accept);
    assert!(TcpStream::connect(address).is_err(), "somebody listens");
    drop(main);
    arriving.join().unwrap().unwrap_err();

    // Where there is no listener they are not picked, and BARRIER says nothing.
    offer.optional = MULTIFD;
    let (a, b) = tcp_pair();
    let arriving = arrive(Destination::default(), b, destination_job());
    let mut main = Connection {
        stream: TcpStream::from(a.as_fd().try_clone_to_owned().unwrap()),
        sent: 0,
    };
    drop(a);
    main.stream.write_all(&Preamble::OURS.encode()).unwrap();
    main.say((Kind::Hello, body(|out| offer.encode(out).unwrap())), &[]);
    let accept = Accept::decode(&main.hear_of(Kind::Accept)).unwrap();
    assert_eq!(accept.capabilities, 0);
    main.say(zero(START, PAGES), &[]);
    main.say(barrier(&[0, 0]), &[]);
    let (kind, _) = main.hear().unwrap();
    assert_eq!(kind, Kind::Failed);
    drop(main);
    let error = arriving.join().unwrap().1.unwrap_err().to_string();
    assert!(error.contains("BARRIER is not allowed"), "{error}");
}

/// With post-copy another connection is waited for first, and those that come before it stay.
#[test]
fn connections_may_come_before_the_fault_channel() {
    require_userfault!();
    for switch in [false, true] {
        let mut offer = hello(vec![]);
        (offer.required, offer.optional) = (POSTCOPY, MULTIFD);
        let mut coming = Coming::offer(&offer, |job| {
            job.postcopy = Some(Control::new(Arc::clone(&job.progress)));
            if switch {
                job.deadlines.progress = short().progress;
            }
        });
        let mut channels = [0, 1].map(|index| coming.channel(index));
        let all: Vec<_> = (0..PAGES).flat_map(content).collect();
        channels[0].say(pages(0, &all), &all);
        let said = body(|out| Return { id: ID, attempt: 0 }.encode(out));
        let faults = Connection::new(&coming.address, Kind::Join, &said);
        coming.main.say(sync(1), &[]);
        coming.main.hear_of(Kind::SyncAck);
        let [first, second] = &channels;
        let sent = coming.sent(&[first, second]);
        coming.main.say(barrier(&sent), &[]);
        channels[0].end();
        if switch {
            // Before the switch all have to be over, and one is not.
            coming.main.say((Kind::Missing, [0; 16].to_vec()), &[]);
            let error = coming.failed();
            assert!(
                error.starts_with("data connection 1 has not ended"),
                "{error}"
            );
        } else {
            channels[1].end();
            let expected: Vec<_> = (0..PAGES).map(content).collect();
            assert_pages(&coming.finish(), &expected);
        }
        drop(faults);
    }
}
