//! A connection to the peer on which every wait ends: by progress, by cancelling, by a deadline.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

use crate::cancel::Cancel;
use crate::low_water::LowWater;
use crate::send_buffer::SendBuffer;
use crate::zero_copy::ZeroCopy;

/// How long the engine waits for what.
#[derive(Clone, Debug)]
pub struct Deadlines {
    /// To connect, host name resolution excepted.
    pub connect: Duration,
    /// For the peer's answer to HELLO, in which the destination builds the guest; and, at the
    /// destination, for the whole HELLO.
    pub handshake: Duration,
    /// Without a byte going or coming, while one should.
    pub progress: Duration,
    /// For the connection of a post-copy that is resumed to agree on what has arrived.
    pub resume: Duration,
    /// At the source: from FLUSH to FLUSHED, in which the destination waits for its disks.
    pub flush: Duration,
    /// While the guest is stopped, from the pause to READY, in addition to twice the downtime
    /// limit.
    pub stop_margin: Duration,
    /// At the destination: from READY to GO.
    pub go: Duration,
    /// At the source: from GO to RUNNING or FAILED.
    pub running: Duration,
    /// At the listener: for a connection's preamble.
    pub preamble: Duration,
    /// After a failure: for the peer to take what was said and to close.
    pub linger: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            handshake: Duration::from_secs(30),
            progress: Duration::from_secs(30),
            resume: Duration::from_secs(30),
            flush: Duration::from_secs(300),
            stop_margin: Duration::from_secs(5),
            go: Duration::from_secs(30),
            running: Duration::from_secs(30),
            preamble: Duration::from_secs(5),
            linger: Duration::from_secs(2),
        }
    }
}

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer closed it, or reset it.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing moved for that long: the peer or the network is dead.
    #[error("nothing was sent or received for {} s: the peer or the network is dead", .0.as_secs_f32())]
    NoProgress(Duration),
    /// The kernel gave up: data was not acknowledged, or keepalive probes were not answered.
    #[error("the peer's host no longer answers: it or the network is dead")]
    Dead,
    /// An answer that is due at a fixed time did not come.
    #[error("the peer's answer did not come in time")]
    Deadline,
    /// Cancelled from another thread.
    #[error("{0}")]
    Cancelled(String),
    /// The kernel says no.
    #[error("the connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::NotConnected => Self::Closed,
            io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable => Self::Dead,
            _ => Self::Io(error),
        }
    }
}

/// A connected stream socket.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    peer: String,
    tcp: bool,
}

impl Stream {
    /// A name of the peer, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Makes it nonblocking, and lets the kernel notice a TCP peer that has died.
    pub(crate) fn prepare(&self, deadlines: &Deadlines) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&self.fd, true)?;
        if self.tcp {
            sockopt::set_tcp_nodelay(&self.fd, true)?;
            sockopt::set_socket_keepalive(&self.fd, true)?;
            let probe = (deadlines.progress / 4).max(Duration::from_secs(1));
            sockopt::set_tcp_keepidle(&self.fd, probe)?;
            sockopt::set_tcp_keepintvl(&self.fd, probe)?;
            sockopt::set_tcp_keepcnt(&self.fd, 3)?;
            let millis = deadlines
                .progress
                .as_millis()
                .try_into()
                .unwrap_or(u32::MAX);
            sockopt::set_tcp_user_timeout(&self.fd, millis)?;
        }
        // The buffers' sizes are left to the kernel, which grows those of TCP to what the link
        // needs, until more is known of it: see `send_buffer`.
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        let peer = stream
            .peer_addr()
            .map_or_else(|_| "tcp".to_owned(), |address| format!("tcp:{address}"));
        Self {
            fd: stream.into(),
            peer,
            tcp: true,
        }
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self {
            fd: stream.into(),
            peer: "unix".to_owned(),
            tcp: false,
        }
    }
}

/// What a descriptor is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Readiness {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// A stream with the deadlines and the cancelling of its migration.
#[derive(Debug)]
pub(crate) struct Link {
    stream: Stream,
    /// `None` once it is too late to cancel.
    cancel: Option<Cancel>,
    patience: Duration,
    until: Option<Instant>,
    zero_copy: Option<ZeroCopy>,
    send_buffer: Option<SendBuffer>,
    /// `None` if waits can't be told how much is expected.
    low_water: Option<LowWater>,
}

impl Link {
    pub(crate) fn new(stream: Stream, cancel: Cancel, deadlines: &Deadlines) -> io::Result<Self> {
        stream.prepare(deadlines)?;
        let low_water = stream.tcp.then(LowWater::new);
        Ok(Self {
            stream,
            cancel: Some(cancel),
            patience: deadlines.progress,
            until: None,
            zero_copy: None,
            send_buffer: None,
            low_water,
        })
    }

    /// From here on it is found out whether less should wait in the kernel.
    pub(crate) fn watch_send_buffer(&mut self, round_trip: Duration) {
        if self.stream.tcp {
            self.send_buffer = Some(SendBuffer::new(round_trip));
        }
    }

    /// Sending so many bytes took so long.
    pub(crate) fn sent(&mut self, bytes: u64, took: Duration) {
        let socket = self.stream.as_fd();
        if let Some(buffer) = &mut self.send_buffer
            && buffer.sent(socket, bytes, took)
        {
            self.send_buffer = None;
        }
    }

    /// So many bytes are to come in any case, so that waits need not end with each of them; 1 if that
    /// is not known.
    pub(crate) fn expect(&mut self, bytes: u64) {
        if let Some(low_water) = &mut self.low_water {
            low_water.expect(self.stream.as_fd(), bytes);
        }
    }

    /// From here on pages are sent without a copy, if the socket can do that.
    pub(crate) fn enable_zero_copy(&mut self) -> io::Result<()> {
        if self.zero_copy.is_none() {
            self.zero_copy = Some(ZeroCopy::enable(self.stream.as_fd())?);
        }
        Ok(())
    }

    /// A send without a copy went out, or was refused.
    pub(crate) fn count_zero_copy(&mut self, refused: bool, sent: bool) {
        let Some(zero_copy) = &mut self.zero_copy else {
            return;
        };
        if sent {
            zero_copy.sent();
        }
        if refused {
            zero_copy.refused();
            // What the kernel has to say takes room of the same kind.
            zero_copy.reap(self.stream.as_fd());
        }
    }

    /// What there is to know about sends without a copy, if pages are sent so, or were until that
    /// turned out to be of no use.
    pub(crate) fn zero_copy(&self) -> Option<&ZeroCopy> {
        self.zero_copy.as_ref()
    }

    /// No wait goes past `until`, whatever moves.
    pub(crate) fn set_until(&mut self, until: Option<Instant>) {
        self.until = until;
    }

    /// Sets how long nothing may move, and returns how long that was.
    pub(crate) fn set_patience(&mut self, patience: Duration) -> Duration {
        std::mem::replace(&mut self.patience, patience)
    }

    /// Whether it is later than [`set_until`](Self::set_until) allows.
    pub(crate) fn is_late(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// From here on, cancelling has no effect.
    pub(crate) fn ignore_cancel(&mut self) {
        self.cancel = None;
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// From here on, this cancels.
    pub(crate) fn set_cancel(&mut self, cancel: Cancel) {
        self.cancel = Some(cancel);
    }

    /// An error if cancelled.
    pub(crate) fn check_cancel(&self) -> Result<(), LinkError> {
        match self.cancel.as_ref().and_then(Cancel::cancelled) {
            Some(reason) => Err(LinkError::Cancelled(reason.to_owned())),
            None => Ok(()),
        }
    }

    /// Waits until the socket is ready for one of `wanted`. `since` is when something last moved.
    pub(crate) fn wait(
        &mut self,
        wanted: Readiness,
        since: Instant,
    ) -> Result<Readiness, LinkError> {
        let stall = since + self.patience;
        let end = self.until.map_or(stall, |until| until.min(stall));
        match self.wait_until(wanted, end)? {
            Some(ready) => Ok(ready),
            None if end < stall => Err(LinkError::Deadline),
            None => Err(LinkError::NoProgress(self.patience)),
        }
    }

    /// As [`wait`](Self::wait), but only until `end`, which is no error: `None`.
    pub(crate) fn wait_until(
        &mut self,
        wanted: Readiness,
        end: Instant,
    ) -> Result<Option<Readiness>, LinkError> {
        let ready = wait_for(&self.stream, wanted, self.cancel.as_ref(), end)?;
        // A socket with something on its error queue looks ready for everything.
        if let Some(zero_copy) = &mut self.zero_copy {
            zero_copy.reap(self.stream.as_fd());
        }
        Ok(ready)
    }

    /// Whether the socket would take more now. One that can't tell has room.
    pub(crate) fn has_room(&self) -> bool {
        let wanted = Readiness {
            read: false,
            write: true,
        };
        let ready = wait_for(&self.stream, wanted, None, Instant::now());
        !matches!(ready, Ok(None))
    }

    /// Waits until the socket or `event` has something to read, or `end`, which is no error.
    pub(crate) fn wait_readable_or(
        &self,
        event: BorrowedFd<'_>,
        end: Instant,
    ) -> Result<(), LinkError> {
        self.check_cancel()?;
        if self.is_late() {
            return Err(LinkError::Deadline);
        }
        let end = self.until.map_or(end, |until| until.min(end));
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(event, PollFlags::IN),
        ];
        fds.extend(
            self.cancel
                .as_ref()
                .map(|cancel| PollFd::new(cancel, PollFlags::IN)),
        );
        let left = end.saturating_duration_since(Instant::now());
        match poll(&mut fds, Some(&timespec(left))) {
            Err(error) if error != rustix::io::Errno::INTR => Err(LinkError::Io(error.into())),
            _ => self.check_cancel(),
        }
    }

    /// Reads what is there: `None` if nothing is.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> Result<Option<usize>, LinkError> {
        match rustix::io::read(&self.stream, buffer) {
            Ok(0) => Err(LinkError::Closed),
            Ok(count) => Ok(Some(count)),
            Err(error) => not_ready(error.into()),
        }
    }

    /// Ends both directions at once.
    pub(crate) fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
    }

    /// Ends our direction: the peer reads what was sent, then the stream's end.
    pub(crate) fn finish(&self) {
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Write);
    }
}

/// Turns "would block" into `None`.
pub(crate) fn not_ready<T>(error: io::Error) -> Result<Option<T>, LinkError> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error.into()),
    }
}

/// Waits until `socket` is ready for one of `wanted`, or `end` (`None`), or cancelled (an error).
pub(crate) fn wait_for(
    socket: &impl AsFd,
    wanted: Readiness,
    cancel: Option<&Cancel>,
    end: Instant,
) -> Result<Option<Readiness>, LinkError> {
    let mut events = PollFlags::empty();
    events.set(PollFlags::IN, wanted.read);
    events.set(PollFlags::OUT, wanted.write);
    loop {
        let mut fds = match cancel {
            Some(cancel) => [
                PollFd::new(socket, events),
                PollFd::new(cancel, PollFlags::IN),
            ],
            // The same socket twice does no harm.
            None => [PollFd::new(socket, events), PollFd::new(socket, events)],
        };
        let left = end.saturating_duration_since(Instant::now());
        match poll(&mut fds, Some(&timespec(left))) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(LinkError::Io(error.into())),
            Ok(0) if left.is_zero() => return Ok(None),
            Ok(0) => continue,
            Ok(_) => {}
        }
        if let Some(reason) = cancel.and_then(Cancel::cancelled) {
            return Err(LinkError::Cancelled(reason.to_owned()));
        }
        // An error or a hang-up is told by the read or the write that follows.
        let failed = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
        let ready = fds.first().map_or(PollFlags::empty(), PollFd::revents);
        let any = ready.intersects(failed);
        return Ok(Some(Readiness {
            read: wanted.read && (any || ready.contains(PollFlags::IN)),
            write: wanted.write && (any || ready.contains(PollFlags::OUT)),
        }));
    }
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
