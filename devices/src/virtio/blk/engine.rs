//! Carrying requests out: on the device's thread while the disk answers at once, as a page cache
//! does, and by several threads when it takes its time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::{error, warn};

use super::errors::{Action, ErrorSink, IoError};
use super::request::{Failure, Operation, Request, Status};
use super::{QUEUE, SERIAL_LEN};
use crate::disk::Disk;
use crate::virtio::activation::Activation;
use crate::virtio::chain::Chain;
use crate::virtio::worker::Handler;

/// Reads and writes that take longer than this on average are worth another thread.
const SLOW: Duration = Duration::from_micros(100);

/// One that takes longer than this counts as this: it may only have waited for a CPU. Of two among
/// ten the average must stay below [`SLOW`].
const OUTLIER: Duration = Duration::from_micros(300);

/// The most threads beside the device's own; as many requests are on the disk at once.
const MOST_THREADS: usize = 16;

/// The driver is told of what is done after so many requests, if there is no pause before.
const BATCH: usize = 16;

/// The disk and what is being done to it.
pub(super) struct Engine {
    pub(super) disk: Arc<Disk>,
    pub(super) serial: [u8; SERIAL_LEN],
    /// Whether the driver flushes; otherwise every write is durable when it is done.
    pub(super) writeback: AtomicBool,
    errors: Arc<dyn ErrorSink>,
    state: Mutex<State>,
    /// There is a request for a thread, or it is to end.
    work: Condvar,
    /// A thread is done with a request.
    done: Condvar,
    /// How long reads and writes take, in nanoseconds: a moving average.
    service_ns: AtomicU64,
    failures: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Set while the device works.
    activation: Option<Arc<Activation>>,
    waiting: VecDeque<Request>,
    /// How many requests threads have in hand, and how many threads wait for one.
    active: usize,
    idle: usize,
    /// Requests taken from the driver and not done, by their heads: they are done when the device
    /// works again, here or after a migration.
    held: Vec<u16>,
    /// No space left: nothing is begun until the machine has been stopped and runs on.
    halted: bool,
    ended: bool,
    threads: Vec<JoinHandle<()>>,
}

impl Engine {
    pub(super) fn new(
        disk: Arc<Disk>,
        serial: [u8; SERIAL_LEN],
        errors: Arc<dyn ErrorSink>,
    ) -> Self {
        Self {
            disk,
            serial,
            writeback: AtomicBool::new(true),
            errors,
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            service_ns: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        }
    }

    /// The requests that are held, while the device is paused.
    pub(super) fn held(&self) -> Vec<u16> {
        self.state().held.clone()
    }

    pub(super) fn set_held(&self, held: Vec<u16>) {
        self.state().held = held;
    }

    /// Ends the threads, with nothing in flight.
    pub(super) fn end(&self) {
        let threads = {
            let mut state = self.state();
            state.ended = true;
            std::mem::take(&mut state.threads)
        };
        self.work.notify_all();
        for thread in threads {
            if thread.join().is_err() {
                error!(disk = self.disk.id(), "a thread of the disk panicked");
            }
        }
    }

    /// Gives the next requests to the threads.
    #[cfg(test)]
    pub(super) fn pretend_slow(&self) {
        self.service_ns.store(1 << 40, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether requests may be begun.
    fn may_begin(&self) -> bool {
        !self.state().halted
    }

    fn is_slow(&self) -> bool {
        self.service_ns.load(Ordering::Relaxed) > SLOW.as_nanos() as u64
    }

    /// Carries a request out and gives it back, or holds it. Whether it was given back.
    fn execute(&self, activation: &Activation, request: &Request) -> bool {
        let began = Instant::now();
        let writeback = self.writeback.load(Ordering::Relaxed);
        let memory = activation.memory();
        let result = request.execute(&self.disk, &self.serial, memory, writeback);
        if matches!(request.operation, Some(Operation::Read | Operation::Write)) {
            let took = began.elapsed().min(OUTLIER).as_nanos() as u64;
            let average = self.service_ns.load(Ordering::Relaxed);
            self.service_ns
                .store(average - average / 8 + took / 8, Ordering::Relaxed);
        }
        let (status, written) = match result {
            Ok(done) => done,
            Err(failure) if failure.error.is_no_space() => {
                self.halt(request.chain.head, &failure);
                return false;
            }
            Err(failure) => {
                self.report(&failure, Action::Report);
                (Status::IoError, 0)
            }
        };
        let chain = &request.chain;
        chain.write(memory, chain.writable_len() - 1, &[status as u8]);
        activation.complete(QUEUE, chain.head, written + 1);
        true
    }

    /// Keeps a request for which there is no space, and has the machine stopped.
    fn halt(&self, head: u16, failure: &Failure) {
        let first = {
            let mut state = self.state();
            state.held.push(head);
            self.disk.set_waits_for_space(true);
            !std::mem::replace(&mut state.halted, true)
        };
        if first {
            self.report(failure, Action::Stop);
        }
    }

    fn report(&self, failure: &Failure, action: Action) {
        let error = IoError {
            disk: self.disk.id().to_owned(),
            operation: failure.operation,
            action,
            no_space: failure.error.is_no_space(),
            reason: failure.error.to_string(),
        };
        // A guest that goes on with a broken disk must not fill the log.
        let count = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() || action == Action::Stop {
            warn!(disk = error.disk, failures = count, "{}", error.reason);
        }
        self.errors.io_error(error);
    }

    /// Hands a request to the threads.
    fn submit(self: &Arc<Self>, request: Request) {
        let mut state = self.state();
        state.waiting.push_back(request);
        let missing = state.waiting.len() > state.idle && state.threads.len() < MOST_THREADS;
        if missing {
            let engine = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name("virtio-blk-io".to_owned())
                .spawn(move || engine.work());
            match thread {
                Ok(thread) => state.threads.push(thread),
                Err(err) if state.threads.is_empty() => {
                    error!(%err, "no thread for the disk");
                    // The device's own thread does it.
                    let (activation, request) =
                        (state.activation.clone(), state.waiting.pop_back());
                    drop(state);
                    if let (Some(activation), Some(request)) = (activation, request)
                        && self.execute(&activation, &request)
                    {
                        activation.notify(QUEUE);
                    }
                    return;
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.work.notify_one();
    }

    /// A thread: requests, one by one.
    fn work(&self) {
        let mut state = self.state();
        loop {
            let next = match (&state.activation, state.halted) {
                (Some(activation), false) => {
                    let activation = Arc::clone(activation);
                    state.waiting.pop_front().map(|next| (activation, next))
                }
                _ => None,
            };
            let Some((activation, request)) = next else {
                if state.ended {
                    return;
                }
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            state.active += 1;
            drop(state);
            if self.execute(&activation, &request) {
                activation.notify(QUEUE);
            }
            drop(activation);
            state = self.state();
            state.active -= 1;
            self.done.notify_all();
        }
    }
}

/// The device's thread.
pub(super) struct Server(pub(super) Arc<Engine>);

impl Server {
    /// Begins a request that was taken from the driver. Whether it is done already.
    fn begin(&self, activation: &Activation, chain: Chain) -> bool {
        let engine = &self.0;
        match Request::decode(activation.memory(), chain) {
            Ok(request) if engine.is_slow() => {
                engine.submit(request);
                false
            }
            Ok(request) => engine.execute(activation, &request),
            Err(malformed) => {
                activation.break_device(&malformed);
                false
            }
        }
    }
}

impl Handler for Server {
    fn start(&mut self, activation: &Arc<Activation>) {
        let held = {
            let mut state = self.0.state();
            state.activation = Some(Arc::clone(activation));
            state.halted = false;
            self.0.disk.set_waits_for_space(false);
            std::mem::take(&mut state.held)
        };
        let mut held = held.into_iter();
        let mut any = false;
        while self.0.may_begin()
            && let Some(head) = held.next()
        {
            if let Some(chain) = activation.chain(QUEUE, head) {
                any |= self.begin(activation, chain);
            }
        }
        self.0.state().held.extend(held);
        if any {
            activation.notify(QUEUE);
        }
        self.queue_notified(activation, QUEUE);
    }

    fn queue_notified(&mut self, activation: &Arc<Activation>, queue: usize) {
        loop {
            activation.want_notifications(queue, false);
            let mut done = 0;
            while self.0.may_begin()
                && let Some(chain) = activation.pop(queue)
            {
                done += usize::from(self.begin(activation, chain));
                if done >= BATCH {
                    activation.notify(queue);
                    done = 0;
                }
            }
            if done > 0 {
                activation.notify(queue);
            }
            if !activation.want_notifications(queue, true) || !self.0.may_begin() {
                return;
            }
        }
    }

    fn drain(&mut self, _activation: &Arc<Activation>) {
        let mut state = self.0.state();
        state.activation = None;
        // What nobody has begun needs not be waited for.
        while let Some(request) = state.waiting.pop_front() {
            state.held.push(request.chain.head);
        }
        while state.active > 0 {
            state = self
                .0
                .done
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
