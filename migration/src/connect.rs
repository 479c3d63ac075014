//! Connecting to a destination: cancellable, and with a deadline.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_socket, socket_with,
    sockopt,
};

use crate::cancel::Cancel;
use crate::link::{Deadlines, LinkError, Readiness, Stream, wait_for};
use crate::uri::Uri;

/// How soon a Unix socket with a full backlog is tried again.
const RETRY: Duration = Duration::from_millis(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The host is not known.
    #[error("cannot resolve the host of '{uri}': {error}")]
    Resolve {
        /// Where to.
        uri: Uri,
        /// Why not.
        error: io::Error,
    },
    /// Nobody listens, or the network says no.
    #[error("cannot connect to '{uri}': {error}")]
    Refused {
        /// Where to.
        uri: Uri,
        /// Why not.
        error: io::Error,
    },
    /// No answer.
    #[error("no answer from '{uri}' within {} s", .after.as_secs_f32())]
    TimedOut {
        /// Where to.
        uri: Uri,
        /// How long was waited.
        after: Duration,
    },
    /// Cancelled from another thread.
    #[error("{0}")]
    Cancelled(String),
}

/// The socket addresses of a host, which may be empty (loopback) or `0` (all addresses).
pub(crate) fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let ip = match host {
        "" => Ipv4Addr::LOCALHOST,
        "0" => Ipv4Addr::UNSPECIFIED,
        name => return Ok((name, port).to_socket_addrs()?.collect()),
    };
    Ok(vec![SocketAddr::new(IpAddr::V4(ip), port)])
}

/// Connects to `uri`, to each of a host name's addresses in turn until one answers.
pub fn connect(uri: &Uri, cancel: &Cancel, deadlines: &Deadlines) -> Result<Stream, ConnectError> {
    let refused = |error: io::Error| ConnectError::Refused {
        uri: uri.clone(),
        error,
    };
    match uri {
        Uri::File(_) => Err(refused(io::Error::new(
            io::ErrorKind::Unsupported,
            "nobody listens at a file",
        ))),
        Uri::Unix(path) => {
            let end = Instant::now() + deadlines.connect;
            let address = SocketAddrUnix::new(path.as_path()).map_err(|e| refused(e.into()))?;
            loop {
                let socket = new_socket(AddressFamily::UNIX).map_err(refused)?;
                match connect_socket(&socket, &address) {
                    Ok(()) => return Ok(UnixStream::from(socket).into()),
                    Err(Errno::AGAIN) => {}
                    Err(error) => return Err(refused(error.into())),
                }
                // Nothing to wait for on the socket: the backlog is full.
                let until = end.min(Instant::now() + RETRY);
                let idle = wait_for(&cancel, Readiness::default(), Some(cancel), until);
                settle(idle, uri, deadlines)?;
                if Instant::now() >= end {
                    return Err(timed_out(uri, deadlines));
                }
            }
        }
        Uri::Tcp { host, port } => {
            let addresses = addresses(host, *port).map_err(|error| ConnectError::Resolve {
                uri: uri.clone(),
                error,
            })?;
            let mut last = refused(io::ErrorKind::NotFound.into());
            for address in addresses {
                match connect_tcp(address, uri, cancel, deadlines) {
                    Err(cancelled @ ConnectError::Cancelled(_)) => return Err(cancelled),
                    Err(error) => last = error,
                    Ok(stream) => return Ok(stream),
                }
            }
            Err(last)
        }
    }
}

fn new_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}

fn connect_tcp(
    address: SocketAddr,
    uri: &Uri,
    cancel: &Cancel,
    deadlines: &Deadlines,
) -> Result<Stream, ConnectError> {
    let refused = |error: io::Error| ConnectError::Refused {
        uri: uri.clone(),
        error,
    };
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = new_socket(family).map_err(refused)?;
    match connect_socket(&socket, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => {
            let wanted = Readiness {
                read: false,
                write: true,
            };
            let end = Instant::now() + deadlines.connect;
            let ready = wait_for(&socket.as_fd(), wanted, Some(cancel), end);
            if !settle(ready, uri, deadlines)? {
                return Err(timed_out(uri, deadlines));
            }
            sockopt::socket_error(&socket)
                .and_then(|result| result)
                .map_err(|error| refused(error.into()))?;
        }
        Err(error) => return Err(refused(error.into())),
    }
    Ok(TcpStream::from(socket).into())
}

fn timed_out(uri: &Uri, deadlines: &Deadlines) -> ConnectError {
    ConnectError::TimedOut {
        uri: uri.clone(),
        after: deadlines.connect,
    }
}

/// Whether the wait ended by the socket being ready.
fn settle(
    waited: Result<Option<Readiness>, LinkError>,
    uri: &Uri,
    deadlines: &Deadlines,
) -> Result<bool, ConnectError> {
    match waited {
        Ok(ready) => Ok(ready.is_some()),
        Err(LinkError::Cancelled(reason)) => Err(ConnectError::Cancelled(reason)),
        Err(LinkError::Io(error)) => Err(ConnectError::Refused {
            uri: uri.clone(),
            error,
        }),
        Err(_) => Err(timed_out(uri, deadlines)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_listening_is_told_with_the_address() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing");
        let cancel = Cancel::new().unwrap();
        let uri: Uri = format!("unix:{}", missing.display()).parse().unwrap();
        let error = connect(&uri, &cancel, &Deadlines::default()).unwrap_err();
        assert!(error.to_string().contains(&uri.to_string()), "{error}");

        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let uri: Uri = format!("tcp::{port}").parse().unwrap();
        let error = connect(&uri, &cancel, &Deadlines::default()).unwrap_err();
        assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
    }

    #[test]
    fn a_connect_that_nobody_answers_can_be_cancelled() {
        // A listener with its backlog full: further connections to it hang.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("full");
        let socket = new_socket(AddressFamily::UNIX).unwrap();
        let address = SocketAddrUnix::new(path.as_path()).unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let _held = UnixStream::connect(&path).unwrap();
        let uri = Uri::Unix(path);
        let cancel = Cancel::new().unwrap();
        let deadlines = Deadlines {
            connect: Duration::from_secs(600),
            ..Deadlines::default()
        };
        let waiting = std::thread::spawn({
            let cancel = cancel.clone();
            move || connect(&uri, &cancel, &deadlines)
        });
        cancel.cancel("by the user").unwrap();
        assert!(matches!(
            waiting.join().unwrap(),
            Err(ConnectError::Cancelled(reason)) if reason == "by the user"
        ));
    }
}
