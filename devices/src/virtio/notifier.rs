//! An eventfd as devices use it.
// An EventFd has no safe way to be waited for: it lends only its number.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use tracing::error;
use vmm_sys_util::eventfd::EventFd;

/// Wakes a thread that waits for it. Written by KVM when it is an ioeventfd.
#[derive(Debug)]
pub struct Notifier(EventFd);

impl Notifier {
    /// A new one that nobody has notified.
    pub fn new() -> io::Result<Self> {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Self)
    }

    /// The eventfd, to be registered.
    pub fn event_fd(&self) -> &EventFd {
        &self.0
    }

    /// Makes it readable.
    pub fn notify(&self) {
        match self.0.write(1) {
            Ok(()) => {}
            // It counts to 2^64 - 2: it is readable.
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(err) => error!(%err, "an eventfd can't be written"),
        }
    }

    /// Makes it not readable any more.
    pub fn consume(&self) {
        match self.0.read() {
            Ok(_) => {}
            // Nobody has notified it, or somebody else has consumed it.
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(err) => error!(%err, "an eventfd can't be read"),
        }
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the EventFd lives, which the borrow outlives
        // not.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
