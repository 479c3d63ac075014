//! Guests that move over several connections.

use std::collections::BTreeMap;
use std::num::NonZeroU8;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration::compression::Method;
use migration::destination;
use migration::frame::{HEADER_LEN, Kind};
use migration::layout::PAGE_SIZE;
use migration::listener::Listener;
use migration::message::decode_barrier;
use migration::progress::Snapshot;
use migration::source::{self, Guest, Outcome, Peer, SourceError};
use migration::uri::Uri;

use crate::machine::{Destination, Source, Writes};
use crate::proxy::{Fate, Frame, Proxy};
use crate::whole::{BUSY, assert_moved, destination_job, source_job};

/// The first connection of all; the others carry pages.
pub(crate) const FIRST: usize = 0;

pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) error: String,
    pub(crate) ran: bool,
    pub(crate) left: Snapshot,
    pub(crate) came: Snapshot,
}

/// Migrates over so many connections beside the first one, all in use, through a proxy.
pub(crate) fn migrate(
    vm: &mut Source,
    channels: u8,
    uri: &str,
    set: impl FnOnce(&source::Job),
    decide: impl FnMut(&mut Frame) -> Fate + Send + 'static,
) -> Ended {
    let mut listener = Listener::bind(&uri.parse().unwrap()).unwrap();
    let uri = listener.uri().clone();
    let proxy = matches!(uri, Uri::Tcp { .. }).then(|| Proxy::new(uri.clone(), decide));
    let uri = proxy.as_ref().map_or(uri, |proxy| proxy.uri.clone());
    let job = source_job();
    job.parameters.set_multifd(true);
    job.parameters
        .set_multifd_channels(NonZeroU8::new(channels).unwrap());
    job.parameters.set_multifd_all(true);
    set(&job);
    let their_job = destination_job();
    let progress = Arc::clone(&their_job.progress);
    let mut there = Destination::of(vm);
    let arriving = std::thread::spawn(move || {
        let incoming = listener
            .accept(&their_job.cancel, &their_job.deadlines)
            .unwrap();
        let result = destination::receive(&mut there, incoming, Some(listener), &their_job);
        (there, result)
    });
    let outcome = source::migrate(vm, Peer::Uri(uri), &job);
    let (destination, arrival) = arriving.join().unwrap();
    let error = match &arrival {
        Ok(_) => {
            assert_moved(vm, &outcome, &destination, &arrival);
            String::new()
        }
        Err(error) => error.to_string(),
    };
    Ended {
        outcome,
        error,
        ran: destination.ran.load(Ordering::SeqCst),
        left: job.progress.snapshot(),
        came: progress.snapshot(),
    }
}

pub(crate) fn pass(_: &mut Frame) -> Fate {
    Fate::Pass
}

pub(crate) const TCP: &str = "tcp:127.0.0.1:0";

pub(crate) fn carries_pages(kind: Option<Kind>) -> bool {
    matches!(
        kind,
        Some(Kind::Pages | Kind::Compressed | Kind::Xbzrle | Kind::Zero)
    )
}

#[test]
fn a_busy_guest_arrives_over_any_number_of_connections() {
    let directory = tempfile::tempdir().unwrap();
    for (index, channels) in [1, 2, 4].into_iter().enumerate() {
        let unix = format!(
            "unix:{}",
            directory.path().join(index.to_string()).display()
        );
        for uri in [TCP, &unix] {
            for method in [None, Some(Method::Lz4)] {
                let mut vm = Source::new(4111, 3333);
                vm.run(BUSY);
                let set = |job: &source::Job| job.parameters.set_compression(method);
                let ended = migrate(&mut vm, channels, uri, set, pass);
                assert_eq!(ended.error, "", "{channels} connections, {uri}, {method:?}");
                let multifd = ended.left.multifd.unwrap();
                assert_eq!(multifd.channels, u64::from(channels));
                assert!(multifd.bytes > 1_000_000, "{multifd:?}");
                assert_eq!(ended.left.compression.is_some(), method.is_some());
            }
        }
    }
}

#[test]
fn the_numbers_of_all_connections_add_up() {
    let mut vm = Source::new(4000, 700);
    let ended = migrate(&mut vm, 3, TCP, |_| (), pass);
    assert_eq!(ended.error, "");
    let (left, came) = (ended.left, ended.came);
    assert_eq!(left.ram.normal, 4700u64.div_ceil(3));
    assert_eq!(left.ram.normal + left.ram.duplicate, 4700);
    assert_eq!(left.bytes.pages, left.ram.normal_bytes);
    let bytes = left.bytes;
    assert_eq!(
        bytes.pages + bytes.zero + bytes.state + bytes.files + bytes.control,
        left.ram.transferred
    );
    assert_eq!(
        left.ram.transferred,
        left.ram.precopy_bytes + left.ram.downtime_bytes
    );
    assert_eq!(left.ram.remaining, 0);
    assert!(left.multifd.unwrap().bytes >= left.ram.normal_bytes);
    assert_eq!(came.bytes.pages, bytes.pages);
    assert_eq!(came.ram.normal, left.ram.normal);
}

/// Which one it is, as CHANNEL says.
pub(crate) fn channel_index(frame: &Frame) -> usize {
    let at = HEADER_LEN + 16;
    u32::from_le_bytes(frame.bytes[at..at + 4].try_into().unwrap()) as usize
}

/// What was seen of each connection, on its way from the source.
#[derive(Default)]
struct Seen {
    /// Frames, by connection in the order of their being made.
    frames: BTreeMap<usize, u64>,
    /// What CHANNEL said which it is.
    channels: BTreeMap<usize, usize>,
    /// BARRIERs on the first connection.
    barriers: usize,
    /// The last one on the first connection.
    last: Vec<u64>,
    /// BARRIERs on the others.
    passes: usize,
}

impl Seen {
    fn look(&mut self, frame: &Frame) {
        let Some(kind) = frame.kind.filter(|_| frame.from_source) else {
            return;
        };
        *self.frames.entry(frame.connection).or_default() += 1;
        match kind {
            Kind::Channel => {
                self.channels.insert(frame.connection, channel_index(frame));
            }
            Kind::Barrier if frame.connection == FIRST => {
                self.barriers += 1;
                let body = &frame.bytes[HEADER_LEN..];
                decode_barrier(body, &mut self.last).unwrap();
            }
            Kind::Barrier => self.passes += 1,
            _ => {}
        }
    }
}

/// Rounds go on until `rounds` have ended.
fn keep_going(vm: &mut Source, rounds: usize) -> impl FnOnce(&source::Job) + use<> {
    let enough = Arc::new(Mutex::new(None::<Arc<migration::parameters::Parameters>>));
    let (parameters, mut harvests) = (Arc::clone(&enough), 0);
    vm.hook = Box::new(move |call| {
        harvests += usize::from(call == "harvest");
        if harvests == 2 * rounds
            && let Some(parameters) = &*parameters.lock().unwrap()
        {
            parameters.set_downtime_limit_ms(2000).unwrap();
        }
        Ok(())
    });
    move |job| {
        job.parameters.set_downtime_limit_ms(0).unwrap();
        *enough.lock().unwrap() = Some(Arc::clone(&job.parameters));
    }
}

#[test]
fn barriers_tell_what_goes_before() {
    let mut vm = Source::new(5000, 0);
    vm.run(BUSY);
    let set = keep_going(&mut vm, 4);
    let seen = Arc::new(Mutex::new(Seen::default()));
    let looking = Arc::clone(&seen);
    let ended = migrate(&mut vm, 2, TCP, set, move |frame| {
        assert!(
            frame.connection != FIRST || !matches!(frame.kind, Some(Kind::Pages)),
            "pages with contents on the first connection"
        );
        looking.lock().unwrap().look(frame);
        Fate::Pass
    });
    assert_eq!(ended.error, "");
    let seen = seen.lock().unwrap();
    assert_eq!(seen.channels.len(), 2);
    assert!(
        seen.barriers >= 4 && seen.passes >= 4,
        "{:?}",
        ended.left.rounds
    );
    for (connection, index) in &seen.channels {
        // The last one covers all that ever came there.
        assert_eq!(seen.last[1 + index], seen.frames[connection]);
    }
}

/// Few pages, in many passes, each time on whichever connection has room: what one brings late must
/// not replace what another one brought in a later pass.
#[test]
fn what_is_written_all_the_time_arrives_as_it_was_last() {
    let mut vm = Source::new(3000, 0);
    vm.run(Writes {
        pages: 64,
        batch: 200,
        blocks: 0,
        rest: Duration::from_micros(100),
    });
    let set = keep_going(&mut vm, 30);
    let ended = migrate(&mut vm, 3, TCP, set, pass);
    assert_eq!(ended.error, "");
    assert!(ended.left.round > 15, "{}", ended.left.round);
}

/// The cache of differences has one owner.
#[test]
fn differences_go_on_the_first_connection() {
    let mut vm = Source::new(3000, 0);
    vm.run(Writes {
        pages: 400,
        batch: 100,
        blocks: 0,
        rest: Duration::from_millis(1),
    });
    let rounds = keep_going(&mut vm, 6);
    let differences = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&differences);
    let set = |job: &source::Job| {
        job.parameters.set_xbzrle(true);
        rounds(job);
    };
    let ended = migrate(&mut vm, 2, TCP, set, move |frame| {
        if frame.kind == Some(Kind::Xbzrle) {
            assert_eq!(frame.connection, FIRST);
            count.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    });
    assert_eq!(ended.error, "");
    assert!(differences.load(Ordering::SeqCst) > 0);
    assert!(ended.left.xbzrle.unwrap().pages > 0);
    assert!(ended.left.multifd.unwrap().bytes > 0);
}

/// At the first pace the rest would take minutes.
#[test]
fn the_bandwidth_limit_is_for_all_of_them() {
    let mut vm = Source::new(4000, 0);
    vm.blobs.clear();
    let parameters = Arc::new(Mutex::new(None));
    let mut pages = 0;
    let set = |job: &source::Job| {
        job.parameters.set_max_bandwidth(40_000);
        *parameters.lock().unwrap() = Some(Arc::clone(&job.parameters));
    };
    let held = Arc::clone(&parameters);
    let ended = migrate(&mut vm, 3, TCP, set, move |frame| {
        if frame.kind == Some(Kind::Pages) {
            pages += 1;
            if pages <= 3 {
                assert_eq!((frame.bytes.len() - frame.payload) as u64, PAGE_SIZE);
            }
            if pages == 3 {
                let parameters: &Option<Arc<migration::parameters::Parameters>> =
                    &held.lock().unwrap();
                parameters.as_ref().unwrap().set_max_bandwidth(0);
            }
        }
        Fate::Pass
    });
    assert_eq!(ended.error, "");
}

/// Ends the migration at the `nth` frame of pages beside the first connection.
fn at_data(nth: usize, mut act: impl FnMut(&mut Frame) -> Fate) -> impl FnMut(&mut Frame) -> Fate {
    let mut seen = 0;
    move |frame| {
        let data = frame.connection != FIRST && carries_pages(frame.kind);
        seen += usize::from(data);
        match data && seen == nth {
            true => act(frame),
            false => Fate::Pass,
        }
    }
}

pub(crate) fn assert_stayed(vm: &Source, ended: &Ended) {
    assert!(!ended.ran && vm.is_running(), "{:?}", ended.outcome);
    assert!(!ended.error.is_empty());
}

#[test]
fn a_cancelled_migration_lets_the_guest_run_on() {
    for nth in [1, 5, 12] {
        let mut vm = Source::new(20_000, 0);
        vm.run(BUSY);
        let cancel = Arc::new(Mutex::new(None::<migration::cancel::Cancel>));
        let given = Arc::clone(&cancel);
        let set = |job: &source::Job| {
            job.parameters.set_downtime_limit_ms(0).unwrap();
            *cancel.lock().unwrap() = Some(job.cancel.clone());
        };
        let decide = at_data(nth, move |_| {
            let cancel = given.lock().unwrap().clone().unwrap();
            cancel.cancel("by the test").unwrap();
            Fate::Hold
        });
        let ended = migrate(&mut vm, 2, TCP, set, decide);
        assert!(
            matches!(ended.outcome, Outcome::Cancelled { .. }),
            "{:?}",
            ended.outcome
        );
        assert_stayed(&vm, &ended);
        assert!(ended.error.contains("by the test"), "{}", ended.error);
    }
}

#[test]
fn a_connection_that_breaks_ends_the_migration_and_the_guest_runs_on() {
    for nth in [1, 4, 9] {
        let mut vm = Source::new(20_000, 0);
        vm.run(BUSY);
        let half = |frame: &mut Frame| Fate::Cut(frame.bytes.len() / 2);
        let set = |job: &source::Job| job.parameters.set_downtime_limit_ms(0).unwrap();
        let ended = migrate(&mut vm, 3, TCP, set, at_data(nth, half));
        let Outcome::Failed { guest, error } = &ended.outcome else {
            panic!("{:?}", ended.outcome);
        };
        assert!(matches!(guest, Guest::Untouched), "{guest:?}");
        assert!(error.to_string().contains("connection"), "{error}");
        assert_stayed(&vm, &ended);
    }
}

/// The destination's reason says more than that a connection has ended.
#[test]
fn what_the_destination_finds_wrong_is_told() {
    let mut vm = Source::new(20_000, 0);
    vm.run(BUSY);
    let damage = |frame: &mut Frame| {
        frame.bytes[HEADER_LEN] ^= 1;
        Fate::Pass
    };
    let set = |job: &source::Job| job.parameters.set_downtime_limit_ms(0).unwrap();
    let ended = migrate(&mut vm, 2, TCP, set, at_data(3, damage));
    let Outcome::Failed { error, .. } = &ended.outcome else {
        panic!("{:?}", ended.outcome);
    };
    assert!(
        error.to_string().contains("the destination failed"),
        "{error}"
    );
    assert!(error.to_string().contains("checksum"), "{error}");
    assert_stayed(&vm, &ended);
}

/// Nobody is there to take more connections, or the way there is none that could be made again.
#[test]
fn without_more_connections_one_does() {
    let mut vm = Source::new(2000, 0);
    let (a, b) = crate::whole::tcp_pair();
    let job = source_job();
    job.parameters.set_multifd(true);
    let arriving = crate::whole::arrive(Destination::of(&vm), b, destination_job());
    let outcome = source::migrate(&mut vm, Peer::Connected(a), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    let multifd = job.progress.snapshot().multifd.unwrap();
    assert_eq!((multifd.channels, multifd.bytes), (0, 0));
    assert!(multifd.why_one.unwrap().contains("address"));

    // By address, and the destination picks nothing.
    let mut listener = Listener::bind(&TCP.parse().unwrap()).unwrap();
    let uri = listener.uri().clone();
    let mut there = Destination::of(&vm);
    let arriving = std::thread::spawn(move || {
        let job = destination_job();
        let incoming = listener.accept(&job.cancel, &job.deadlines).unwrap();
        let result = destination::receive(&mut there, incoming, None, &job);
        (there, result)
    });
    let mut vm = Source::new(2000, 0);
    let job = source_job();
    job.parameters.set_multifd(true);
    let outcome = source::migrate(&mut vm, Peer::Uri(uri), &job);
    let (destination, arrival) = arriving.join().unwrap();
    assert_moved(&vm, &outcome, &destination, &arrival);
    let multifd = job.progress.snapshot().multifd.unwrap();
    assert_eq!(multifd.channels, 0);
    assert!(multifd.why_one.unwrap().contains("destination"));
}

/// Nobody answers on the data connections.
#[test]
fn connections_that_are_refused_end_the_migration() {
    let mut vm = Source::new(20_000, 0);
    vm.run(BUSY);
    let set = |job: &source::Job| job.parameters.set_downtime_limit_ms(0).unwrap();
    let ended = migrate(&mut vm, 2, TCP, set, |frame| match frame.kind {
        Some(Kind::Channel) => Fate::Cut(3),
        _ => Fate::Pass,
    });
    let Outcome::Failed { error, .. } = &ended.outcome else {
        panic!("{:?}", ended.outcome);
    };
    assert!(!matches!(error, SourceError::Cancelled(_)), "{error}");
    assert_stayed(&vm, &ended);
}
