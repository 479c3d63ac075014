//! A descriptor that the guest's output goes to, written without ever waiting.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat, open};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

/// How much is written at once. A pipe that is said to be writable has room for as much
/// (PIPE_BUF), and so do the other kinds.
const CHUNK: usize = 4096;

/// How to find out whether a write would wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readiness {
    /// The descriptor is ours alone and does not block.
    NonBlocking,
    /// It is shared with other processes, so it may block: it is asked before each write, and
    /// gets no more than what then is sure to go in.
    Ask {
        /// How much that is.
        chunk: usize,
    },
    /// The master of a pty: what is written while nobody has the other end open is thrown away.
    Pty,
}

/// A descriptor to write to.
#[derive(Debug)]
pub(super) struct Sink {
    fd: OwnedFd,
    readiness: Readiness,
}

impl Sink {
    /// A descriptor that is ours alone (nobody else shares its file description).
    pub(super) fn owned(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self {
            fd,
            readiness: Readiness::NonBlocking,
        })
    }

    /// The master of a pty, which is ours alone.
    pub(super) fn pty(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            readiness: Readiness::Pty,
            ..Self::owned(fd)?
        })
    }

    /// A descriptor that we were given, such as standard output. O_NONBLOCK is a property of the
    /// description, which others share, so it is not set; where possible, the file is opened
    /// again.
    pub(super) fn shared(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(fstat(fd)?.st_mode);
        if matches!(kind, FileType::Fifo | FileType::CharacterDevice) {
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            if let Ok(fd) = open(path, flags, Mode::empty()) {
                return Ok(Self {
                    fd,
                    readiness: Readiness::NonBlocking,
                });
            }
        }
        let chunk = if kind == FileType::CharacterDevice {
            1
        } else {
            CHUNK
        };
        Ok(Self {
            fd: fcntl_dupfd_cloexec(fd, 0)?,
            readiness: Readiness::Ask { chunk },
        })
    }

    /// Writes what goes in without waiting; 0 bytes if nothing does.
    pub(super) fn try_write(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        let mut chunk = bytes.get(..CHUNK).unwrap_or(bytes);
        if self.readiness != Readiness::NonBlocking {
            let ready = self.poll()?;
            if self.readiness == Readiness::Pty && ready.contains(PollFlags::HUP) {
                return Ok(bytes.len());
            }
            if !ready.intersects(PollFlags::OUT | PollFlags::ERR | PollFlags::HUP) {
                return Ok(0);
            }
            if let Readiness::Ask { chunk: sure } = self.readiness {
                chunk = bytes.get(..sure).unwrap_or(bytes);
            }
        }
        loop {
            match rustix::io::write(&self.fd, chunk) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(0),
                result => return result,
            }
        }
    }

    /// Whether this is a pty whose other end nobody has open.
    pub(super) fn is_deserted(&self) -> bool {
        self.readiness == Readiness::Pty
            && self
                .poll()
                .is_ok_and(|ready| ready.contains(PollFlags::HUP))
    }

    fn poll(&self) -> rustix::io::Result<PollFlags> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        loop {
            match poll(
                &mut fds,
                Some(&Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                }),
            ) {
                Err(Errno::INTR) => {}
                result => return result.map(|_| fds[0].revents()),
            }
        }
    }
}

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
