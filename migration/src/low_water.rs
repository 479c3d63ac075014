//! How much has to come before somebody who waits for it is woken (SO_RCVLOWAT of socket(7)).
//!
//! On a link that is slower than this host a wait for a frame's data would end with every few
//! packets, some twenty times for a frame of 2 MiB, and each time there is little to do
//! (docs/performance.md). So a wait for data says how much of it is worth waking up for: never more
//! than is still to come, so that it can't last for ever. The kernel ends it earlier when its buffer is
//! full, or the connection ends.
#![allow(
    unsafe_code,
    reason = "the option has no safe interface in the crates that are used"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

/// What is worth waking up for: enough for the switch to cost little, and for the copy out of the
/// kernel to go on while the rest arrives.
const WORTH: u64 = 256 << 10;

/// What the kernel was told of a TCP connection.
#[derive(Debug)]
pub(crate) struct LowWater {
    bytes: u64,
}

impl LowWater {
    /// As the kernel has it at first: a byte is enough.
    pub(crate) fn new() -> Self {
        Self { bytes: 1 }
    }

    /// So many bytes, at least one, are to come in any case: the next wait may last until they, or
    /// enough of them, are there.
    pub(crate) fn expect(&mut self, socket: BorrowedFd<'_>, bytes: u64) {
        let bytes = bytes.clamp(1, WORTH);
        if bytes == self.bytes {
            return;
        }
        let value = bytes as libc::c_int;
        // SAFETY: the option's value is an int, which lives through the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        // A socket that can't do it wakes as it always did.
        if result == 0 {
            self.bytes = bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::link::timespec;

    fn is_ready(socket: &TcpStream, wait: bool) -> bool {
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        let timeout = (!wait).then(|| timespec(Duration::ZERO));
        poll(&mut fds, timeout.as_ref()).unwrap() > 0
    }

    #[test]
    fn a_wait_lasts_until_what_is_expected_has_come() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut here, _) = listener.accept().unwrap();
        let mut low_water = LowWater::new();
        low_water.expect(here.as_fd(), 5000);
        source.write_all(&[1; 4999]).unwrap();
        // What has been written over loopback is there.
        assert!(!is_ready(&here, false));
        source.write_all(&[1]).unwrap();
        assert!(is_ready(&here, true));
        here.read_exact(&mut [0; 5000]).unwrap();

        // From there on any byte will do.
        low_water.expect(here.as_fd(), 5000);
        low_water.expect(here.as_fd(), 1);
        source.write_all(&[1]).unwrap();
        assert!(is_ready(&here, true));
        here.read_exact(&mut [0; 1]).unwrap();

        // The end of the connection comes in any case.
        low_water.expect(here.as_fd(), u64::MAX);
        source.write_all(&[1; 100]).unwrap();
        assert!(!is_ready(&here, false));
        drop(source);
        assert!(is_ready(&here, true));
    }
}
