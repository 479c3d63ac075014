//! The thread of a device.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::error;

use super::activation::Activation;
use super::notifier::Notifier;

/// What a device does on its thread. All of it is called there.
pub trait Handler: Send + 'static {
    /// The device begins to work, for the first time or after a pause. The driver may have put
    /// requests into any queue, without a notification that is still to come.
    fn start(&mut self, activation: &Arc<Activation>);

    /// The driver has notified the device of a queue.
    fn queue_notified(&mut self, activation: &Arc<Activation>, queue: usize);

    /// The device is to stand still: finishes what is in flight, and gives back what it holds of
    /// the driver's. `start` or the drop of the handler follows.
    fn drain(&mut self, activation: &Arc<Activation>);

    /// What else to wait for: descriptors, and what for. Asked before each wait.
    fn sources(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        Vec::new()
    }

    /// The source of that index in [`sources`](Self::sources) is ready.
    fn source_ready(&mut self, _activation: &Arc<Activation>, _source: usize) {}

    /// When to call [`deadline_passed`](Self::deadline_passed). Asked before each wait.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The deadline has passed.
    fn deadline_passed(&mut self, _activation: &Arc<Activation>) {}
}

/// A device's thread, which serves some of its queues. It ends when this is dropped.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    wanted: Mutex<Wanted>,
    /// The thread has done what was wanted.
    settled: Condvar,
    /// Written when something else is wanted.
    changed: Notifier,
}

#[derive(Clone, Debug, Default)]
struct Wanted {
    running: bool,
    activation: Option<Arc<Activation>>,
    ended: bool,
    /// Counts the changes, and those that the thread has seen through.
    changes: u64,
    settled: u64,
}

impl Worker {
    /// Starts the thread, for the queues of these numbers; it is paused.
    pub fn spawn(name: &str, queues: &[usize], handler: impl Handler) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            wanted: Mutex::default(),
            settled: Condvar::new(),
            changed: Notifier::new()?,
        });
        let work = Work {
            shared: Arc::clone(&shared),
            queues: queues.to_vec(),
            handler,
        };
        // Linux cuts threads' names at 15 bytes.
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// A driver is ready: works for it whenever the machine runs.
    pub fn activate(&self, activation: Arc<Activation>) {
        self.shared
            .change(|wanted| wanted.activation = Some(activation));
    }

    /// Forgets the driver; when it returns, the thread touches neither memory nor queues.
    pub fn deactivate(&self) {
        self.shared.change(|wanted| wanted.activation = None);
        self.wait_settled();
    }

    /// Works, if a driver is there.
    pub fn run(&self) {
        self.shared.change(|wanted| wanted.running = true);
    }

    /// Asks the thread to stand still.
    pub fn request_pause(&self) {
        self.shared.change(|wanted| wanted.running = false);
    }

    /// Waits until the thread has done what was asked of it last.
    pub fn wait_settled(&self) {
        let mut wanted = self.shared.wanted();
        while wanted.settled != wanted.changes {
            wanted = self
                .shared
                .settled
                .wait(wanted)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The same, but not longer than until `deadline`; whether it has.
    pub fn wait_settled_until(&self, deadline: Instant) -> bool {
        let mut wanted = self.shared.wanted();
        while wanted.settled != wanted.changes {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.settled.wait_timeout(wanted, left);
            (wanted, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        true
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.change(|wanted| wanted.ended = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("a device's thread panicked");
        }
    }
}

impl Shared {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Wanted)) {
        let mut wanted = self.wanted();
        change(&mut wanted);
        wanted.changes += 1;
        drop(wanted);
        self.changed.notify();
    }
}

struct Work<H> {
    shared: Arc<Shared>,
    queues: Vec<usize>,
    handler: H,
}

/// What is ready after a wait.
enum Ready {
    Queue(usize),
    Source(usize),
}

impl<H: Handler> Work<H> {
    fn run(mut self) {
        let mut seen = 0;
        let mut serving: Option<Arc<Activation>> = None;
        loop {
            let wanted = self.shared.wanted().clone();
            if wanted.changes != seen {
                seen = wanted.changes;
                let next = wanted
                    .activation
                    .filter(|_| wanted.running && !wanted.ended);
                if let Some(activation) = serving.take() {
                    self.handler.drain(&activation);
                }
                // Settled when the old is over, and before the new is worked on.
                self.shared.wanted().settled = seen;
                self.shared.settled.notify_all();
                if wanted.ended {
                    return;
                }
                serving = next;
                if let Some(activation) = &serving {
                    self.handler.start(activation);
                }
                continue;
            }
            let ready = self.wait(serving.as_ref());
            if let Some(activation) = &serving {
                self.handle(activation, ready);
            }
        }
    }

    fn handle(&mut self, activation: &Arc<Activation>, ready: Vec<Ready>) {
        for ready in ready {
            match ready {
                Ready::Queue(queue) => {
                    if let Some(notifier) = activation.notifier(queue) {
                        notifier.consume();
                        self.handler.queue_notified(activation, queue);
                    }
                }
                Ready::Source(source) => self.handler.source_ready(activation, source),
            }
        }
        if self
            .handler
            .deadline()
            .is_some_and(|deadline| deadline <= Instant::now())
        {
            self.handler.deadline_passed(activation);
        }
    }

    /// Waits until something is to be done; says what, beside changes of what is wanted.
    fn wait(&self, serving: Option<&Arc<Activation>>) -> Vec<Ready> {
        let mut fds = vec![PollFd::new(&self.shared.changed, PollFlags::IN)];
        let mut meaning = Vec::new();
        let mut timeout = None;
        if let Some(activation) = serving {
            for &queue in &self.queues {
                if let Some(notifier) = activation.notifier(queue) {
                    fds.push(PollFd::new(notifier, PollFlags::IN));
                    meaning.push(Ready::Queue(queue));
                }
            }
            for (index, (fd, flags)) in self.handler.sources().into_iter().enumerate() {
                fds.push(PollFd::from_borrowed_fd(fd, flags));
                meaning.push(Ready::Source(index));
            }
            timeout = self
                .handler
                .deadline()
                .map(|deadline| deadline.saturating_duration_since(Instant::now()))
                .and_then(|left| Timespec::try_from(left.min(LONGEST_WAIT)).ok());
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(err) => error!(%err, "a device's thread can't wait"),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        if ready.next() == Some(true) {
            self.shared.changed.consume();
        }
        let ready = ready.zip(meaning).filter(|(ready, _)| *ready);
        ready.map(|(_, meaning)| meaning).collect()
    }
}

/// A deadline further away than this is looked at again then.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
