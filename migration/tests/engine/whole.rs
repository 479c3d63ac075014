//! Migrations in which nothing goes wrong, and what both sides need to run one.

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use migration::cancel::Cancel;
use migration::clock::MonotonicClock;
use migration::convergence::Costs;
use migration::destination::{self, Arrival, DestinationError};
use migration::link::{Deadlines, Stream};
use migration::listener::Incoming;
use migration::parameters::Parameters;
use migration::progress::{Progress, Status};
use migration::source::{self, Outcome, Peer};

use crate::machine::{Destination, Source, Writes, assert_same};

pub(crate) fn progress() -> Arc<Progress> {
    Arc::new(Progress::new(Arc::new(MonotonicClock), None))
}

/// A source's job. The downtime limit is generous: these machines are slow when tests run in
/// parallel, and when to switch over is tested elsewhere.
pub(crate) fn source_job() -> source::Job {
    let parameters = Parameters::default();
    parameters.set_downtime_limit_ms(500).unwrap();
    source::Job {
        cancel: Cancel::new().unwrap(),
        parameters: Arc::new(parameters),
        progress: progress(),
        deadlines: Deadlines::default(),
        costs: Costs::default(),
        postcopy: None,
    }
}

pub(crate) fn destination_job() -> destination::Job {
    destination::Job {
        cancel: Cancel::new().unwrap(),
        progress: progress(),
        deadlines: Deadlines::default(),
        postcopy: None,
    }
}

/// Deadlines for peers that are known to be dead.
pub(crate) fn short() -> Deadlines {
    let soon = Duration::from_millis(300);
    Deadlines {
        handshake: soon,
        progress: soon,
        stop_margin: soon,
        go: soon,
        running: soon,
        linger: soon,
        ..Deadlines::default()
    }
}

pub(crate) type Arriving = JoinHandle<(Destination, Result<Arrival, DestinationError>)>;

/// Lets a guest arrive on `stream`, on a thread.
pub(crate) fn arrive(mut vm: Destination, stream: Stream, job: destination::Job) -> Arriving {
    std::thread::spawn(move || {
        let incoming = Incoming::from_stream(stream, &job.cancel, &job.deadlines).unwrap();
        let result = destination::receive(&mut vm, incoming, None, &job);
        (vm, result)
    })
}

pub(crate) fn unix_pair() -> (Stream, Stream) {
    let (a, b) = UnixStream::pair().unwrap();
    (a.into(), b.into())
}

pub(crate) fn tcp_pair() -> (Stream, Stream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (b, _) = listener.accept().unwrap();
    (a.into(), b.into())
}

pub(crate) fn migrate(
    vm: &mut Source,
    pair: (Stream, Stream),
) -> (Outcome, Destination, Result<Arrival, DestinationError>) {
    let arriving = arrive(Destination::of(vm), pair.1, destination_job());
    let outcome = source::migrate(vm, Peer::Connected(pair.0), &source_job());
    let (destination, arrival) = arriving.join().unwrap();
    (outcome, destination, arrival)
}

/// Fails unless the guest of `vm` has arrived whole, and stays stopped where it was.
pub(crate) fn assert_moved(
    vm: &Source,
    outcome: &Outcome,
    destination: &Destination,
    arrival: &Result<Arrival, DestinationError>,
) {
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert!(arrival.is_ok(), "{arrival:?}");
    assert!(!vm.is_running());
    assert_same(&vm.ram, destination.ram.as_ref().unwrap());
    assert!(destination.sections == vm.state);
    let offer = destination.offer.as_ref().unwrap();
    assert!(offer.configuration == vm.configuration);
    for (blob, (_, data)) in destination.blobs.iter().zip(&vm.blobs) {
        assert!(*blob.lock().unwrap() == *data);
    }
    assert_eq!(destination.disks.len(), vm.disks.len());
    for (here, there) in destination.disks.iter().zip(&vm.disks) {
        here.assert_arrived(there);
    }
}

pub(crate) const BUSY: Writes = Writes {
    pages: 1500,
    batch: 50,
    blocks: 1,
    rest: Duration::from_micros(300),
};

#[test]
fn an_idle_guest() {
    for pair in [unix_pair(), tcp_pair()] {
        let mut vm = Source::new(1000, 700);
        let (outcome, destination, arrival) = migrate(&mut vm, pair);
        assert_moved(&vm, &outcome, &destination, &arrival);
        let start = destination.started.unwrap();
        assert!(!start.run && start.stopped_for.is_zero(), "{start:?}");
        assert_eq!(
            vm.calls(),
            [
                "offer",
                "start_dirty_log",
                "pause",
                "save",
                "release",
                "stop_dirty_log"
            ]
        );
    }
}

#[test]
fn both_sides_tell_what_moved_and_the_source_how_fast() {
    let mut vm = Source::new(1000, 700);
    let (job, peer) = (source_job(), destination_job());
    let received = Arc::clone(&peer.progress);
    let pair = unix_pair();
    let arriving = arrive(Destination::default(), pair.1, peer);
    let outcome = source::migrate(&mut vm, Peer::Connected(pair.0), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);

    let (sent, received) = (job.progress.snapshot(), received.snapshot());
    let bytes = sent.bytes;
    let files: usize = vm.blobs.iter().map(|(_, data)| data.len()).sum();
    assert_eq!(bytes.pages, sent.ram.normal_bytes);
    assert_eq!(bytes.files, files as u64);
    assert!(bytes.state > 0 && bytes.control > 0, "{bytes:?}");
    assert_eq!(
        bytes.pages + bytes.zero + bytes.state + bytes.files + bytes.control,
        sent.ram.transferred
    );
    assert_eq!(received.bytes.pages, bytes.pages);
    assert_eq!(received.bytes.files, bytes.files);
    assert!(sent.bandwidth.is_some_and(|rate| rate > 0.0), "{sent:?}");
    assert!(
        sent.round_trip.is_some_and(|time| !time.is_zero()),
        "{sent:?}"
    );
}

#[test]
fn a_busy_guest_with_a_hole_in_its_memory() {
    for pair in [unix_pair(), tcp_pair()] {
        let mut vm = Source::new(1111, 3333);
        vm.run(BUSY);
        let (outcome, destination, arrival) = migrate(&mut vm, pair);
        assert_moved(&vm, &outcome, &destination, &arrival);
        let Outcome::Completed(Some(downtime)) = outcome else {
            unreachable!()
        };
        let start = destination.started.unwrap();
        assert!(start.run && !start.stopped_for.is_zero());
        let before_ready =
            downtime.stop + downtime.last_pages + downtime.save + downtime.send + downtime.load;
        assert!(start.stopped_for >= before_ready, "{start:?} {downtime:?}");
        let downtime_parts = before_ready + downtime.start;
        assert!(
            downtime.total.abs_diff(downtime_parts) < Duration::from_micros(1),
            "{downtime:?}"
        );
    }
}

#[test]
fn the_numbers_add_up() {
    let mut vm = Source::new(4000, 0);
    let (a, b) = unix_pair();
    let arriving = arrive(Destination::default(), b, destination_job());
    let job = source_job();
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    let snapshot = job.progress.snapshot();
    assert_eq!(snapshot.status, Status::Completed);
    let ram = snapshot.ram;
    assert_eq!(ram.total, 4000 * 4096);
    assert_eq!(ram.remaining, 0);
    assert_eq!(ram.normal, 4000u64.div_ceil(3));
    assert_eq!(ram.normal_bytes, ram.normal * 4096);
    assert_eq!(ram.duplicate, 4000 - ram.normal);
    assert_eq!(snapshot.skipped, ram.duplicate, "untouched pages were read");
    assert_eq!(ram.transferred, ram.precopy_bytes + ram.downtime_bytes);
    assert!(ram.transferred > ram.normal_bytes);
    // What isn't page data or blobs is small: a pair of runs for each page, here.
    assert!(ram.transferred < ram.normal_bytes + 3_000_000 + 200_000);
    assert_eq!(snapshot.rounds.len() as u64, snapshot.round);
    assert!(snapshot.total_time >= snapshot.setup_time);
    assert_eq!(ram.dirty_sync_count, snapshot.round);
}

/// At the first pace the rest would take minutes.
#[test]
fn the_bandwidth_limit_may_change_on_the_way() {
    let mut vm = Source::new(4000, 0);
    vm.blobs.clear();
    let job = source_job();
    job.parameters.set_max_bandwidth(40_000);
    let parameters = Arc::clone(&job.parameters);
    let mut pages = 0;
    let (a, b) = crate::proxy::proxied(move |frame| {
        if frame.kind == Some(migration::frame::Kind::Pages) {
            pages += 1;
            if pages <= 3 {
                assert_eq!(frame.bytes.len() - frame.payload, 4096);
            }
            if pages == 3 {
                parameters.set_max_bandwidth(0);
            }
        }
        crate::proxy::Fate::Pass
    });
    let arriving = arrive(Destination::default(), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
}

/// Nothing is sent from which the bandwidth could be told, and yet it must be known.
#[test]
fn a_guest_that_never_touched_its_memory() {
    let mut vm = Source::new(3, 0);
    vm.ram = crate::machine::ram(200_000, 0);
    vm.layout = migration::layout::Layout::of(&vm.ram).unwrap();
    vm.blobs.clear();
    let (a, b) = tcp_pair();
    let arriving = arrive(Destination::default(), b, destination_job());
    let job = source_job();
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    arriving.join().unwrap().1.unwrap();
    let snapshot = job.progress.snapshot();
    assert_eq!((snapshot.ram.normal, snapshot.skipped), (0, 200_000));
    assert!(snapshot.rounds[0].bandwidth > 1e6, "{:?}", snapshot.rounds);
    assert!(snapshot.ram.transferred < 500_000);
}

#[test]
fn from_a_to_b_by_address() {
    use migration::listener::Listener;
    let directory = tempfile::tempdir().unwrap();
    for uri in [
        "tcp:127.0.0.1:0".to_owned(),
        format!("unix:{}", directory.path().join("socket").display()),
    ] {
        let mut listener = Listener::bind(&uri.parse().unwrap()).unwrap();
        let uri = listener.uri().clone();
        let arriving = std::thread::spawn(move || {
            let job = destination_job();
            let incoming = listener.accept(&job.cancel, &job.deadlines).unwrap();
            let mut vm = Destination::default();
            let result = destination::receive(&mut vm, incoming, None, &job);
            (vm, result)
        });
        let mut vm = Source::new(500, 0);
        vm.run(BUSY_SMALL);
        let outcome = source::migrate(&mut vm, Peer::Uri(uri), &source_job());
        let (destination, arrival) = arriving.join().unwrap();
        assert_moved(&vm, &outcome, &destination, &arrival);
    }
}

pub(crate) const BUSY_SMALL: Writes = Writes { pages: 300, ..BUSY };
