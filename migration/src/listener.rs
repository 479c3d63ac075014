//! Waiting for a source, among strangers.

use std::collections::VecDeque;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::cancel::Cancel;
use crate::connect::addresses;
use crate::link::{Deadlines, LinkError, Readiness, Stream, not_ready, timespec, wait_for};
use crate::message::{MAGIC, PREAMBLE_LEN, Preamble};
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

/// A connection that has yet to say what it is.
#[derive(Debug)]
struct Pending {
    stream: Stream,
    bytes: [u8; PREAMBLE_LEN],
    len: usize,
    end: Instant,
}

impl Pending {
    fn new(stream: Stream, deadlines: &Deadlines) -> io::Result<Self> {
        stream.prepare(deadlines)?;
        Ok(Self {
            stream,
            bytes: [0; PREAMBLE_LEN],
            len: 0,
            end: Instant::now() + deadlines.preamble,
        })
    }

    /// Reads what is there: the preamble once it is whole, an error for a stranger.
    fn read(&mut self) -> Result<Option<Preamble>, &'static str> {
        match rustix::io::read(&self.stream, &mut self.bytes[self.len..]) {
            Ok(0) => return Err("it closed the connection without saying anything more"),
            Ok(count) => self.len += count,
            Err(error) => match not_ready::<()>(error.into()) {
                Ok(_) => return Ok(None),
                Err(_) => return Err("the connection failed"),
            },
        }
        let magic = self.len.min(MAGIC.len());
        if self.bytes[..magic] != MAGIC[..magic] {
            return Err("it does not speak Ferry's protocol");
        }
        if self.len < PREAMBLE_LEN {
            return Ok(None);
        }
        Preamble::decode(&self.bytes)
            .map(Some)
            .ok_or("its preamble is damaged")
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
            if let Some(preamble) = pending.read().map_err(|_| ListenError::Stranger)? {
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
        loop {
            if let Some(reason) = cancel.cancelled() {
                return Err(ListenError::Cancelled(reason.to_owned()));
            }
            self.wait(cancel)?;
            self.take_new(deadlines)?;
            if let Some(incoming) = self.look_at_pending() {
                return Ok(incoming);
            }
        }
    }

    fn wait(&self, cancel: &Cancel) -> Result<(), ListenError> {
        let mut fds = vec![
            PollFd::new(cancel, PollFlags::IN),
            PollFd::new(self, PollFlags::IN),
        ];
        fds.extend(
            self.pending
                .iter()
                .map(|pending| PollFd::new(&pending.stream, PollFlags::IN)),
        );
        let timeout = self
            .pending
            .iter()
            .map(|pending| pending.end)
            .min()
            .map(|end| timespec(end.saturating_duration_since(Instant::now())));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(ListenError::Io(error.into())),
        }
    }

    fn take_new(&mut self, deadlines: &Deadlines) -> Result<(), ListenError> {
        loop {
            let accepted = match &self.socket {
                Socket::Tcp(socket) => socket.accept().map(|(stream, _)| tcp(stream)),
                Socket::Unix(socket) => socket.accept().map(|(stream, _)| unix(stream)),
            };
            match accepted.and_then(|stream| Pending::new(stream, deadlines)) {
                Ok(pending) => {
                    if self.pending.len() == MAX_PENDING
                        && let Some(oldest) = self.pending.pop_front()
                    {
                        dropped(&oldest, "too many connections are waiting");
                    }
                    self.pending.push_back(pending);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if out_of_resources(&error) => {
                    // What is waiting makes room, and otherwise somebody else must.
                    tracing::warn!("cannot accept a connection: {error}");
                    if self.pending.pop_front().is_none() {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    return Ok(());
                }
                // The connection that was to be accepted is gone already; there may be others.
                Err(error) => tracing::info!("a connection failed before it was accepted: {error}"),
            }
        }
    }

    fn look_at_pending(&mut self) -> Option<Incoming> {
        let now = Instant::now();
        let mut index = 0;
        while let Some(pending) = self.pending.get_mut(index) {
            match pending.read() {
                Ok(Some(preamble)) => {
                    let Pending { stream, .. } = self.pending.remove(index)?;
                    return Some(Incoming { stream, preamble });
                }
                Ok(None) if pending.end > now => index += 1,
                result => {
                    let why = result.err().unwrap_or("it said too little for too long");
                    dropped(pending, why);
                    self.pending.remove(index);
                }
            }
        }
        None
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
