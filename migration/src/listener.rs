//! Waiting for a source, among strangers.

use std::collections::VecDeque;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::cancel::Cancel;
use crate::connect::addresses;
use crate::frame::{HEADER_LEN, Header, Kind};
use crate::link::{Deadlines, LinkError, Readiness, Stream, not_ready, timespec, wait_for};
use crate::message::{Id, MAGIC, PREAMBLE_LEN, Preamble, Return};
use crate::uri::Uri;

/// How many connections may be without a whole preamble. One more pushes out the oldest.
const MAX_PENDING: usize = 64;

/// Why nobody can be listened for, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be listened at.
    #[error("cannot listen at '{uri}': {error}")]
    Bind {
        /// Where.
        uri: Uri,
        /// Why not.
        error: io::Error,
    },
    /// Something else is at the path.
    #[error("cannot listen at '{0}': there is a file that is not a socket")]
    NotASocket(Uri),
    /// Another process listens there.
    #[error("cannot listen at '{0}': another process does")]
    InUse(Uri),
    /// Woken from another thread.
    #[error("{0}")]
    Cancelled(String),
    /// The listening socket failed.
    #[error("waiting for connections failed: {0}")]
    Io(#[from] io::Error),
    /// Who was expected did not come in time, or its peer has gone.
    #[error("the source's other connection did not come")]
    Nobody,
    /// On a connection that was given, not accepted: no migration begins there.
    #[error("the connection does not begin with a migration")]
    Stranger,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    uri: Uri,
    /// The file of a Unix socket, with its device and inode, to be removed in the end.
    file: Option<(PathBuf, u64, u64)>,
    pending: VecDeque<Pending>,
}

/// A connection of a source: it has sent its preamble.
#[derive(Debug)]
pub struct Incoming {
    pub(crate) stream: Stream,
    pub(crate) preamble: Preamble,
}

/// A connection of a source that has been here before: the fault channel of its migration, or the
/// one with which it goes on after a break.
#[derive(Debug)]
pub(crate) struct Returned {
    pub(crate) stream: Stream,
    pub(crate) attempt: u32,
}

/// Which connection of a source that is known is waited for.
#[derive(Clone, Debug)]
pub(crate) struct Awaited<'a> {
    /// The kind of its first frame, which says where it belongs.
    pub(crate) kind: Kind,
    pub(crate) id: Id,
    pub(crate) attempts: RangeInclusive<u32>,
    pub(crate) until: Option<Instant>,
    /// The connection that it comes beside: once the peer ends that, nobody comes any more.
    pub(crate) beside: Option<BorrowedFd<'a>>,
    /// Once this is cancelled nobody is waited for any more.
    pub(crate) over: Option<&'a Cancel>,
    /// Connections of the same migration that begin with this are waited for later, and stay.
    pub(crate) later: Option<Kind>,
}

/// Which connection is waited for.
#[derive(Clone, Copy, Debug)]
enum Expected<'a> {
    /// One that begins with a preamble.
    Migration,
    Return(&'a Awaited<'a>),
}

impl Expected<'_> {
    fn until(self) -> Option<Instant> {
        match self {
            Self::Migration => None,
            Self::Return(awaited) => awaited.until,
        }
    }

    fn beside(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Migration => None,
            Self::Return(awaited) => awaited.beside,
        }
    }

    fn over(&self) -> Option<&Cancel> {
        match self {
            Self::Migration => None,
            Self::Return(awaited) => awaited.over,
        }
    }
}

/// The preamble, and the first frame of a connection that returns.
const FIRST_LEN: usize = PREAMBLE_LEN + HEADER_LEN + Return::LEN;

/// A connection that has yet to say what it is.
#[derive(Debug)]
struct Pending {
    stream: Stream,
    bytes: [u8; FIRST_LEN],
    len: usize,
    end: Instant,
    /// It has said what it is, and is waited for later.
    kept: bool,
}

/// What a connection has said.
#[derive(Clone, Copy, Debug)]
enum Said {
    Preamble(Preamble),
    Return {
        attempt: u32,
    },
    /// That the source begins anew, and what is waited for will not come.
    Anew,
    /// That it is one that is waited for later.
    Later,
}

impl Pending {
    fn new(stream: Stream, deadlines: &Deadlines) -> io::Result<Self> {
        stream.prepare(deadlines)?;
        Ok(Self {
            stream,
            bytes: [0; FIRST_LEN],
            len: 0,
            end: Instant::now() + deadlines.preamble,
            kept: false,
        })
    }

    /// Reads what is there: what is expected once it is whole, an error for a stranger.
    fn read(&mut self, expected: Expected<'_>) -> Result<Option<Said>, &'static str> {
        let wanted = match expected {
            Expected::Migration => PREAMBLE_LEN,
            Expected::Return(_) => FIRST_LEN,
        };
        if self.len < wanted {
            match rustix::io::read(&self.stream, &mut self.bytes[self.len..wanted]) {
                Ok(0) => return Err("it closed the connection without saying anything more"),
                Ok(count) => self.len += count,
                Err(error) => match not_ready::<()>(error.into()) {
                    Ok(_) => return Ok(None),
                    Err(_) => return Err("the connection failed"),
                },
            }
        }
        let magic = self.len.min(MAGIC.len());
        if self.bytes[..magic] != MAGIC[..magic] {
            return Err("it does not speak Ferry's protocol");
        }
        let Some((preamble, first)) = self.bytes.split_first_chunk::<PREAMBLE_LEN>() else {
            return Ok(None);
        };
        if self.len < PREAMBLE_LEN {
            return Ok(None);
        }
        let preamble = Preamble::decode(preamble).ok_or("its preamble is damaged")?;
        match expected {
            Expected::Migration => Ok(Some(Said::Preamble(preamble))),
            Expected::Return(awaited) => {
                let first = &first[..self.len - PREAMBLE_LEN];
                returned(first, awaited)
            }
        }
    }
}

/// Checks as much of the first frame as is there.
fn returned(bytes: &[u8], awaited: &Awaited<'_>) -> Result<Option<Said>, &'static str> {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let damaged = "its first frame is damaged";
    let header = Header::decode(header).map_err(|_| damaged)?;
    let anew = (awaited.kind, header.kind) == (Kind::Join, Kind::Resume);
    let later = awaited.later == Some(header.kind);
    if header.kind != awaited.kind && !anew && !later
        || header.sequence != 0
        || header.body_len as usize != Return::LEN
    {
        return Err("it is not the connection that is waited for");
    }
    if body.len() < Return::LEN {
        return Ok(None);
    }
    header.check_body(body).map_err(|_| damaged)?;
    let said = Return::decode(body).map_err(|_| damaged)?;
    if said.id != awaited.id {
        return Err("it belongs to another migration");
    }
    let attempt = said.attempt;
    match anew {
        _ if later => Ok(Some(Said::Later)),
        true if attempt > *awaited.attempts.end() => Ok(Some(Said::Anew)),
        false if awaited.attempts.contains(&attempt) => Ok(Some(Said::Return { attempt })),
        _ if awaited.kind == Kind::Channel => Err("its number is too high"),
        _ => Err("it belongs to another attempt"),
    }
}

impl Incoming {
    /// Takes a connection that was made otherwise: waits for its preamble.
    pub fn from_stream(
        stream: Stream,
        cancel: &Cancel,
        deadlines: &Deadlines,
    ) -> Result<Self, ListenError> {
        let mut pending = Pending::new(stream, deadlines)?;
        let wanted = Readiness {
            read: true,
            write: false,
        };
        loop {
            match wait_for(&pending.stream, wanted, Some(cancel), pending.end) {
                Ok(Some(_)) => {}
                Ok(None) => return Err(ListenError::Stranger),
                Err(LinkError::Cancelled(reason)) => return Err(ListenError::Cancelled(reason)),
                Err(error) => return Err(ListenError::Io(io::Error::other(error))),
            }
            let said = pending.read(Expected::Migration);
            if let Some(Said::Preamble(preamble)) = said.map_err(|_| ListenError::Stranger)? {
                let Pending { stream, .. } = pending;
                return Ok(Self { stream, preamble });
            }
        }
    }

    /// A name of the peer, for messages.
    pub fn peer(&self) -> &str {
        self.stream.peer()
    }
}

impl Listener {
    /// Listens at `uri`. A Unix socket's file that nobody listens at any more is replaced.
    pub fn bind(uri: &Uri) -> Result<Self, ListenError> {
        let failed = |error| ListenError::Bind {
            uri: uri.clone(),
            error,
        };
        match uri {
            Uri::Tcp { host, port } => {
                let addresses = addresses(host, *port).map_err(failed)?;
                // The standard library sets SO_REUSEADDR, so that a destination can be started
                // again at once.
                let socket = TcpListener::bind(&addresses[..]).map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                let address = socket.local_addr().map_err(failed)?;
                Ok(Self {
                    socket: Socket::Tcp(socket),
                    uri: Uri::Tcp {
                        host: address.ip().to_string(),
                        port: address.port(),
                    },
                    file: None,
                    pending: VecDeque::new(),
                })
            }
            Uri::File(_) => Err(failed(io::Error::new(
                io::ErrorKind::Unsupported,
                "nobody connects to a file",
            ))),
            Uri::Unix(path) => {
                let socket = match UnixListener::bind(path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        remove_stale(path, uri)?;
                        UnixListener::bind(path)
                    }
                    result => result,
                }
                .map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                let file = std::fs::symlink_metadata(path).map_err(failed)?;
                Ok(Self {
                    socket: Socket::Unix(socket),
                    uri: uri.clone(),
                    file: Some((path.clone(), file.dev(), file.ino())),
                    pending: VecDeque::new(),
                })
            }
        }
    }

    /// Where it listens: with the port that the kernel chose, if it was asked to.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Waits for a source. Whoever connects and is none is dropped and logged, and none of them
    /// delays the others. Ends when `cancel` says so.
    pub fn accept(
        &mut self,
        cancel: &Cancel,
        deadlines: &Deadlines,
    ) -> Result<Incoming, ListenError> {
        match self.accept_expected(Expected::Migration, cancel, deadlines)? {
            (stream, Said::Preamble(preamble)) => Ok(Incoming { stream, preamble }),
            _ => Err(ListenError::Stranger),
        }
    }

    /// Waits for a connection of a source that is known, which begins with a frame of that kind.
    /// All others are dropped and logged.
    pub(crate) fn accept_returning(
        &mut self,
        awaited: Awaited<'_>,
        cancel: &Cancel,
        deadlines: &Deadlines,
    ) -> Result<Returned, ListenError> {
        match self.accept_expected(Expected::Return(&awaited), cancel, deadlines)? {
            (stream, Said::Return { attempt }) => Ok(Returned { stream, attempt }),
            _ => Err(ListenError::Stranger),
        }
    }

    fn accept_expected(
        &mut self,
        expected: Expected<'_>,
        cancel: &Cancel,
        deadlines: &Deadlines,
    ) -> Result<(Stream, Said), ListenError> {
        loop {
            if let Some(reason) = cancel.cancelled() {
                return Err(ListenError::Cancelled(reason.to_owned()));
            }
            if expected
                .over()
                .is_some_and(|over| over.cancelled().is_some())
            {
                return Err(ListenError::Nobody);
            }
            // Who waits already may have said more than was looked at before.
            if let Some(found) = self.look_at_pending(expected)? {
                return Ok(found);
            }
            // One at a time, so that each is looked at before many others push it out.
            if self.take_new(deadlines)? {
                continue;
            }
            let late = |until| Instant::now() >= until;
            if expected.until().is_some_and(late) || expected.beside().is_some_and(has_ended) {
                return Err(ListenError::Nobody);
            }
            self.wait(cancel, expected)?;
        }
    }

    fn wait(&self, cancel: &Cancel, expected: Expected<'_>) -> Result<(), ListenError> {
        let mut fds = vec![
            PollFd::new(cancel, PollFlags::IN),
            PollFd::new(self, PollFlags::IN),
        ];
        // What more is said by who is waited for later is not looked at yet.
        let pending = || self.pending.iter().filter(|pending| !pending.kept);
        fds.extend(pending().map(|pending| PollFd::new(&pending.stream, PollFlags::IN)));
        fds.extend(expected.over().map(|over| PollFd::new(over, PollFlags::IN)));
        let beside = expected.beside();
        fds.extend(
            beside
                .iter()
                .map(|beside| PollFd::new(beside, PollFlags::RDHUP)),
        );
        let timeout = pending()
            .map(|pending| pending.end)
            .chain(expected.until())
            .min()
            .map(|end| timespec(end.saturating_duration_since(Instant::now())));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(ListenError::Io(error.into())),
        }
    }

    /// Accepts a connection; false if there is none.
    fn take_new(&mut self, deadlines: &Deadlines) -> Result<bool, ListenError> {
        loop {
            let accepted = match &self.socket {
                Socket::Tcp(socket) => socket.accept().map(|(stream, _)| tcp(stream)),
                Socket::Unix(socket) => socket.accept().map(|(stream, _)| unix(stream)),
            };
            match accepted.and_then(|stream| Pending::new(stream, deadlines)) {
                Ok(pending) => {
                    if self.pending.len() == MAX_PENDING {
                        // Who has said nothing yet goes first.
                        let oldest = self.pending.iter().position(|pending| !pending.kept);
                        if let Some(oldest) = self.pending.remove(oldest.unwrap_or(0)) {
                            dropped(&oldest, "too many connections are waiting");
                        }
                    }
                    self.pending.push_back(pending);
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if out_of_resources(&error) => {
                    // What is waiting makes room, and otherwise somebody else must.
                    tracing::warn!("cannot accept a connection: {error}");
                    if self.pending.pop_front().is_none() {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    return Ok(false);
                }
                // The connection that was to be accepted is gone already; there may be others.
                Err(error) => tracing::info!("a connection failed before it was accepted: {error}"),
            }
        }
    }

    fn look_at_pending(
        &mut self,
        expected: Expected<'_>,
    ) -> Result<Option<(Stream, Said)>, ListenError> {
        let now = Instant::now();
        let mut index = 0;
        while let Some(pending) = self.pending.get_mut(index) {
            match pending.read(expected) {
                // It stays: it is waited for next.
                Ok(Some(Said::Anew)) => return Err(ListenError::Nobody),
                Ok(Some(Said::Later)) => {
                    pending.kept = true;
                    index += 1;
                }
                Ok(Some(said)) => {
                    let pending = self.pending.remove(index);
                    return Ok(pending.map(|pending| (pending.stream, said)));
                }
                Ok(None) if pending.end > now => index += 1,
                result => {
                    let why = result.err().unwrap_or("it said too little for too long");
                    dropped(pending, why);
                    self.pending.remove(index);
                }
            }
        }
        Ok(None)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, device, inode)) = &self.file
            && std::fs::symlink_metadata(path)
                .is_ok_and(|file| (file.dev(), file.ino()) == (*device, *inode))
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether the peer has ended its direction of a connection.
fn has_ended(connection: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(connection, PollFlags::RDHUP)];
    poll(&mut fds, Some(&timespec(Duration::ZERO))).is_ok_and(|ended| ended > 0)
}

fn tcp(stream: TcpStream) -> Stream {
    stream.into()
}

fn unix(stream: UnixStream) -> Stream {
    stream.into()
}

fn dropped(pending: &Pending, why: &str) {
    tracing::warn!(
        peer = pending.stream.peer(),
        "a connection is no migration, and was dropped: {why}"
    );
}

fn out_of_resources(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

fn remove_stale(path: &Path, uri: &Uri) -> Result<(), ListenError> {
    let failed = |error| ListenError::Bind {
        uri: uri.clone(),
        error,
    };
    let file = std::fs::symlink_metadata(path).map_err(failed)?;
    if !file.file_type().is_socket() {
        return Err(ListenError::NotASocket(uri.clone()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        _ => Err(ListenError::InUse(uri.clone())),
    }
}

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;
