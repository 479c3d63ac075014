//! The destination's end of the fault channel: asks for pages that somebody waits for, and places
//! them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::DestinationError;
use super::late::{FaultAction, LateError, LateMemory, Via};
use super::postcopy::receive_late;
use crate::bitmap::PageRun;
use crate::cancel::Cancel;
use crate::channel::{Channel, ChannelError};
use crate::clock::Clock;
use crate::frame::Kind;
use crate::link::timespec;
use crate::message::Request;
use crate::priority;
use crate::protocol::OutOfOrder;

/// The thread. It lives as long as memory is missing, whether there is a connection or not: some
/// of what is waited for it can serve itself.
pub(super) struct FaultThread {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

struct Shared {
    orders: Mutex<Orders>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Orders {
    attached: Option<Connection>,
    guest_runs: bool,
    /// Somebody was let go without the memory that they waited for.
    let_go: bool,
    ended: bool,
}

/// A fault channel, and what breaks it together with the connection it belongs to.
struct Connection {
    channel: Channel,
    breaker: Cancel,
}

impl FaultThread {
    /// `patience` is how long a connection may be silent while somebody waits for a page.
    pub(super) fn start(
        memory: Arc<LateMemory>,
        clock: Arc<dyn Clock>,
        patience: Duration,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            orders: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let mut server = Server {
            shared: Arc::clone(&shared),
            memory,
            clock,
            patience,
            connection: None,
            heard: Instant::now(),
            waiting: false,
            doomed: false,
            wanted: Vec::new(),
            faults: Vec::new(),
            runs: Vec::new(),
            crcs: Vec::new(),
            data: Vec::new(),
        };
        let thread = thread::Builder::new()
            .name("postcopy-faults".to_owned())
            .spawn(move || {
                priority::urgent();
                server.run();
            })?;
        Ok(Self { shared, thread })
    }

    /// Gives it a connection. What was asked for before and has not come is asked for again.
    pub(super) fn attach(&self, channel: Channel, breaker: Cancel) {
        self.shared
            .order(|orders| orders.attached = Some(Connection { channel, breaker }));
    }

    /// The guest is about to run. Until then, whoever waits for memory when the connection breaks is
    /// let go without it: the guest will never run. Returns false if that has happened.
    pub(super) fn guest_runs(&self) -> bool {
        self.shared.order(|orders| {
            orders.guest_runs = !orders.let_go;
            orders.guest_runs
        })
    }

    /// Ends it, once nobody waits for memory any more.
    pub(super) fn end(self) {
        self.shared.order(|orders| orders.ended = true);
        let _ = self.thread.join();
    }
}

impl Shared {
    fn order<T>(&self, change: impl FnOnce(&mut Orders) -> T) -> T {
        let result = change(&mut self.lock());
        // Writing to an eventfd fails only when its count would overflow.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        result
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Server {
    shared: Arc<Shared>,
    memory: Arc<LateMemory>,
    clock: Arc<dyn Clock>,
    patience: Duration,
    connection: Option<Connection>,
    /// When it last said something while somebody waited, or began to.
    heard: Instant,
    waiting: bool,
    /// A connection broke.
    doomed: bool,
    /// To be asked for.
    wanted: Vec<PageRun>,
    faults: Vec<crate::userfault::Fault>,
    runs: Vec<crate::message::AddressRun>,
    crcs: Vec<u32>,
    data: Vec<u8>,
}

impl Server {
    fn run(&mut self) {
        loop {
            if let Err(error) = self.wait() {
                tracing::error!("cannot wait for page faults any more: {error}");
                self.disconnect(&error.to_string());
                return;
            }
            if self.take_orders() {
                return;
            }
            if let Err(error) = self.take_faults() {
                tracing::error!("cannot read page faults: {error}");
                self.disconnect(&error.to_string());
                return;
            }
            if let Err(error) = self.converse() {
                self.disconnect(&format!("the fault channel broke: {error}"));
            }
            self.look_at_silence();
        }
    }

    /// A source that answers nothing for so long is dead.
    fn look_at_silence(&mut self) {
        let waited_for = self.connection.is_some() && self.memory.is_waited_for();
        if waited_for && !self.waiting {
            self.heard = Instant::now();
        }
        self.waiting = waited_for;
        if self.waiting && self.heard.elapsed() >= self.patience {
            let seconds = self.patience.as_secs_f32();
            self.disconnect(&format!(
                "the source has not answered a request for memory for {seconds} s"
            ));
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = vec![
            PollFd::new(&self.shared.wake, PollFlags::IN),
            PollFd::from_borrowed_fd(self.memory.as_fd(), PollFlags::IN),
        ];
        if let Some(Connection { channel, breaker }) = &self.connection {
            fds.push(PollFd::from_borrowed_fd(channel.fd(), PollFlags::IN));
            fds.push(PollFd::from_borrowed_fd(breaker.as_fd(), PollFlags::IN));
        }
        let timeout = self
            .waiting
            .then(|| timespec(self.patience.saturating_sub(self.heard.elapsed())));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether this is the end.
    fn take_orders(&mut self) -> bool {
        let mut count = [0; 8];
        if rustix::io::read(&self.shared.wake, &mut count).is_err() {
            // Nothing new.
            return false;
        }
        let mut orders = self.shared.lock();
        if let Some(connection) = orders.attached.take() {
            self.connection = Some(connection);
            self.wanted = self.memory.outstanding();
        }
        orders.ended
    }

    fn take_faults(&mut self) -> Result<(), DestinationError> {
        let mut faults = std::mem::take(&mut self.faults);
        faults.clear();
        self.memory.read_faults(&mut faults)?;
        let now = self.clock.now();
        for fault in &faults {
            if let FaultAction::Request(page) = self.memory.fault(*fault, now)? {
                self.wanted.push(PageRun {
                    first: page,
                    count: 1,
                });
            }
        }
        self.faults = faults;
        Ok(())
    }

    fn converse(&mut self) -> Result<(), DestinationError> {
        let Some(Connection { channel, .. }) = &mut self.connection else {
            // Asked for when there is a connection again: it is outstanding.
            self.wanted.clear();
            if self.doomed {
                self.let_go()?;
            }
            return Ok(());
        };
        let mut body = Vec::new();
        for run in self.wanted.drain(..) {
            let address = self.memory.memory().addresses(run);
            Request {
                address: address.address,
                pages: address.pages as u32,
            }
            .encode(&mut body);
            channel.send(Kind::Request, &body)?;
        }
        while let Some(arrived) = channel.try_receive()? {
            self.heard = Instant::now();
            match arrived.kind {
                Kind::Pages | Kind::Zero => receive_late(
                    channel,
                    arrived.kind,
                    arrived.payload_len,
                    &self.memory,
                    Via::FaultChannel,
                    (&mut self.runs, &mut self.crcs, &mut self.data),
                )?,
                kind => {
                    let phase = channel.phase();
                    return Err(ChannelError::from(OutOfOrder { kind, phase }).into());
                }
            }
        }
        Ok(())
    }

    /// Lets all go who wait for memory, unless the guest runs: it must never find zeroes in place
    /// of what has not come.
    fn let_go(&self) -> Result<(), LateError> {
        let waiting = self.memory.outstanding();
        // Held meanwhile: the guest doesn't start in between.
        let mut orders = self.shared.lock();
        if orders.guest_runs || waiting.is_empty() {
            return Ok(());
        }
        orders.let_go = true;
        self.memory.zero(&waiting)
    }

    fn disconnect(&mut self, reason: &str) {
        self.wanted.clear();
        self.doomed = true;
        if let Err(error) = self.let_go() {
            tracing::error!("cannot let those go who wait for memory: {error}");
        }
        if let Some(Connection { channel, breaker }) = self.connection.take() {
            channel.shut_down();
            if breaker.cancel(reason).is_ok() {
                tracing::debug!("{reason}");
            }
        }
    }
}
