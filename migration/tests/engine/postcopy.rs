//! Guests that move before their memory: what runs one such migration, with a reader in the guest's
//! place that compares what it finds with what there was.

mod cuts;
mod hostile;
mod locked;
mod recovery;
mod unconfirmed;
mod whole;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use migration::clock::MonotonicClock;
use migration::destination::{self, Arrival, DestinationError};
use migration::layout::{GuestRam, Layout};
use migration::listener::Listener;
use migration::postcopy::Control;
use migration::progress::{Observer, Progress, Status};
use migration::source::{self, Guest, Outcome, Peer};
use migration::uri::Uri;

use crate::machine::{Destination, Source, Writes, assert_same, page};
use crate::proxy::{Fate, Frame, Proxy};
use crate::whole::{Arriving, destination_job, source_job};

macro_rules! require_userfault {
    () => {
        if let Err(error) = migration::userfault::Userfault::probe() {
            return guest_tests::driver::skip(&format!("post-copy is not possible here: {error}"));
        }
    };
}
pub(crate) use require_userfault;

pub(crate) fn listener() -> (Listener, Uri) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let uri = listener.uri().clone();
    (listener, uri)
}

/// Rings whenever the status of one side changes.
#[derive(Clone, Default)]
struct Bell(Arc<(Mutex<()>, Condvar)>);

impl Observer for Bell {
    fn status_changed(&self, _: Status) {
        let _lock = self.0.0.lock().unwrap();
        self.0.1.notify_all();
    }
}

/// What runs at the destination: it reads all of its memory, in an order of its own, and compares
/// it with what it was at the source, which stands still.
struct Reader {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

fn read_all(here: GuestRam, there: GuestRam) -> Reader {
    let ended = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            let layout = Layout::of(&here).unwrap();
            let pages = layout.pages();
            // Every page once: the step has no factor in common with their number.
            let step = (pages / 3..).find(|step| gcd(*step, pages) == 1).unwrap();
            let mut number = 0;
            for _ in 0..pages {
                number = (number + step) % pages;
                let found = page(&here, &layout, number);
                assert!(found == page(&there, &layout, number), "page {number}");
            }
            ended.store(true, Ordering::Relaxed);
        }
    });
    Reader { ended, thread }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

type Decide = Arc<Mutex<dyn FnMut(&mut Frame) -> Fate + Send>>;

/// What a destination still does when its guest is whole.
pub(crate) fn serve(arrival: &mut Result<Arrival, DestinationError>) {
    if let Ok(arrival) = arrival
        && let Some(unconfirmed) = arrival.unconfirmed.take()
    {
        unconfirmed.serve();
    }
}

/// A migration with post-copy, under way.
struct Moving {
    source: JoinHandle<(Source, Outcome)>,
    arriving: Arriving,
    leaving: Control<Uri>,
    coming: Control<Listener>,
    left: Arc<Progress>,
    came: Arc<Progress>,
    reader: mpsc::Receiver<Reader>,
    bell: Bell,
    decide: Option<Decide>,
    /// In front of the listener in use.
    proxy: Option<Proxy>,
    /// Where the source is to go on.
    uri: Uri,
}

/// How both sides ended.
struct Ended {
    vm: Source,
    outcome: Outcome,
    there: Destination,
    arrival: Result<Arrival, DestinationError>,
}

impl Moving {
    fn begin(vm: Source, change: impl FnOnce(&mut source::Job, &mut destination::Job)) -> Self {
        Self::begin_via(vm, None, change, |_| {})
    }

    /// All connections, those of recoveries too, go by `decide`.
    fn begin_via(
        vm: Source,
        decide: Option<Decide>,
        change: impl FnOnce(&mut source::Job, &mut destination::Job),
        prepare: impl FnOnce(&mut Destination),
    ) -> Self {
        let bell = Bell::default();
        let progress = || {
            let clock = Arc::new(MonotonicClock);
            Arc::new(Progress::new(clock, Some(Box::new(bell.clone()))))
        };
        let (mut job, mut their_job) = (source_job(), destination_job());
        (job.progress, their_job.progress) = (progress(), progress());
        let leaving = Control::new(Arc::clone(&job.progress));
        let coming = Control::new(Arc::clone(&their_job.progress));
        job.postcopy = Some(leaving.clone());
        their_job.postcopy = Some(coming.clone());
        change(&mut job, &mut their_job);
        let (left, came) = (Arc::clone(&job.progress), Arc::clone(&their_job.progress));
        let (mut listener, uri) = listener();
        let proxy = decide.as_ref().map(|decide| between(&uri, decide));
        let uri = proxy.as_ref().map_or(uri, |proxy| proxy.uri.clone());
        let mut there = Destination::of(&vm);
        prepare(&mut there);
        let (send, reader) = mpsc::channel();
        let ram = vm.ram.clone();
        let arriving = std::thread::spawn(move || {
            let incoming = listener
                .accept(&their_job.cancel, &their_job.deadlines)
                .unwrap();
            there.on_start = Some(Box::new(move |here: &GuestRam| {
                send.send(read_all(here.clone(), ram)).unwrap();
            }));
            let mut result = destination::receive(&mut there, incoming, Some(listener), &their_job);
            serve(&mut result);
            (there, result)
        });
        let source = std::thread::spawn({
            let uri = uri.clone();
            move || {
                let mut vm = vm;
                let outcome = source::migrate(&mut vm, Peer::Uri(uri), &job);
                (vm, outcome)
            }
        });
        Self {
            source,
            arriving,
            leaving,
            coming,
            left,
            came,
            reader,
            bell,
            decide,
            proxy,
            uri,
        }
    }

    /// Waits until `found` is, about the status of the source and of the destination.
    fn wait<T>(&self, mut found: impl FnMut(Status, Status) -> Option<T>) -> T {
        let mut lock = self.bell.0.0.lock().unwrap();
        loop {
            let gone = (self.source.is_finished(), self.arriving.is_finished());
            let (left, came) = (self.left.status(), self.came.status());
            if let Some(found) = found(left, came) {
                return found;
            }
            assert!(!gone.0 || left.is_over(), "the source panicked: {left:?}");
            assert!(!gone.1 || came.is_over(), "there was a panic: {came:?}");
            // A thread that panics rings no bell.
            let look_again = Duration::from_millis(100);
            (lock, _) = self.bell.0.1.wait_timeout(lock, look_again).unwrap();
        }
    }

    /// Waits until a status of both sides is that, or one is over: false.
    fn wait_for_both(&self, status: Status) -> bool {
        self.wait(|left, came| match (left, came) {
            _ if left.is_over() || came.is_over() => Some(false),
            _ => (left == status && came == status).then_some(true),
        })
    }

    /// Gives the destination a listener, and the source a way there later.
    fn listen(&mut self) -> bool {
        let (listener, uri) = listener();
        if self.coming.recover(listener).is_err() {
            return false;
        }
        self.proxy = self.decide.as_ref().map(|decide| between(&uri, decide));
        self.uri = self.proxy.as_ref().map_or(uri, |proxy| proxy.uri.clone());
        true
    }

    /// Goes on over another connection, after a break. False if it is over instead.
    fn recover(&mut self) -> bool {
        if !self.wait_for_both(Status::PostcopyPaused) {
            return false;
        }
        assert!(self.listen());
        self.leaving.recover(self.uri.clone()).unwrap();
        true
    }

    /// Has the source go on there; false if it waits for nothing.
    fn resume(&self) -> bool {
        self.leaving.recover(self.uri.clone()).is_ok()
    }

    /// Recovers as often as it takes, until both sides are over.
    fn settle(&mut self) {
        self.settle_within(usize::MAX);
    }

    /// Recovers up to so many times, and then ends both sides.
    fn settle_within(&mut self, recoveries: usize) {
        use Status::{Completed, PostcopyPaused, PostcopyRecover};
        let mut recovered = 0;
        loop {
            let (left, came) = self.wait(|left, came| {
                let known = left.is_over() || left == PostcopyPaused;
                let there = came.is_over() || matches!(came, PostcopyPaused | PostcopyRecover);
                (known && there).then_some((left, came))
            });
            let done = match (left.is_over(), came.is_over()) {
                (true, true) => {
                    // The destination may not know that the source knows.
                    self.coming.end("the test ends");
                    return;
                }
                // It has all, and nobody has told the source.
                (false, true) if came == Completed => self.listen() && self.resume(),
                // Nobody is there any more who could be asked.
                (false, true) => {
                    self.leaving.end("the destination is over");
                    self.wait(|left, _| left.is_over().then_some(true))
                }
                (true, false) => panic!("{left:?} and {came:?}"),
                (false, false) if came == PostcopyPaused && !self.listen() => false,
                (false, false) => self.resume(),
            };
            recovered += usize::from(done);
            if recovered == recoveries {
                self.leaving.end("they never agree");
                self.coming.end("they never agree");
                return;
            }
            if !done {
                // It has not yet taken what it was given.
                std::thread::yield_now();
            }
        }
    }

    /// Fails unless the guest is at one place, whole.
    fn check(mut self, what: &str) -> Ended {
        self.settle();
        let (vm, outcome) = self.source.join().unwrap();
        let (there, arrival) = self.arriving.join().unwrap();
        let what = format!("{what}: {outcome:?}, {arrival:?}");
        if there.ran.load(Ordering::SeqCst) {
            assert!(!vm.is_running(), "runs twice: {what}");
            assert_eq!(self.came.status(), Status::Completed, "{what}");
            let ended = matches!(outcome, Outcome::Completed(_) | Outcome::Abandoned { .. });
            assert!(ended && arrival.is_ok(), "{what}");
            let reader = self.reader.recv().unwrap();
            reader.thread.join().unwrap();
            assert!(reader.ended.load(Ordering::Relaxed), "{what}");
            assert_same(&vm.ram, there.ram.as_ref().unwrap());
            assert!(there.sections == vm.state);
        } else {
            assert!(arrival.is_err(), "{what}");
            match &outcome {
                Outcome::Failed {
                    guest: Guest::Untouched | Guest::Resumed,
                    ..
                } => assert!(vm.is_running(), "{what}"),
                // GO was on its way.
                Outcome::Abandoned { .. } => assert!(!vm.is_running(), "{what}"),
                _ => panic!("{what}"),
            }
        }
        Ended {
            vm,
            outcome,
            there,
            arrival,
        }
    }

    /// Fails unless all of the guest has moved, and both sides know.
    fn finish(self) -> Ended {
        let ended = self.check("it finishes");
        let outcome = &ended.outcome;
        assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
        assert!(ended.arrival.is_ok() && ended.there.ran.load(Ordering::SeqCst));
        ended
    }
}

fn between(uri: &Uri, decide: &Decide) -> Proxy {
    let decide = Arc::clone(decide);
    Proxy::new(uri.clone(), move |frame| decide.lock().unwrap()(frame))
}

fn busy(pages: u64) -> Source {
    let mut vm = Source::new(pages, 4096.min(pages / 2));
    vm.run(Writes {
        pages: pages / 2,
        batch: 200,
        blocks: 0,
        rest: Duration::from_micros(100),
    });
    vm
}

/// It goes over into post-copy before anything else is sent.
fn at_once(job: &source::Job) {
    job.postcopy.as_ref().unwrap().start();
}
