//! Sending guest memory without a copy into the kernel (MSG_ZEROCOPY of Linux): the network card
//! reads the pages themselves, which stay pinned until the peer has acknowledged them.
//!
//! A page that the guest writes meanwhile may arrive torn, as with the copy that sending
//! otherwise makes; then it doesn't match its checksum, if it has one, and comes again because it is
//! dirty.
//!
//! For each send the kernel says on the socket's error queue when it is done with the pages, and
//! whether it had to copy them after all: as it does over loopback and between namespaces, where
//! this only costs.
#![allow(
    unsafe_code,
    reason = "the error queue's messages have no safe interface in the crates that are used"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

// <asm-generic/socket.h> and <linux/errqueue.h>; the crate libc doesn't have them.
const SO_ZEROCOPY: libc::c_int = 60;
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;
const SO_EE_CODE_ZEROCOPY_COPIED: u8 = 1;

/// Pages are worth being pinned from so many bytes in one send on: below, copying is cheaper.
pub(crate) const WORTH: u64 = 16 << 10;

/// If the first so many sends were all copied, the rest will be.
const TRIED: u64 = 16;

/// What has become of the sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sends {
    /// How many were asked to go without a copy.
    pub tried: u64,
    /// Of which the kernel is done with.
    pub done: u64,
    /// Of those, how many it has copied all the same.
    pub copied: u64,
    /// How many went with a copy, because no more memory may be pinned.
    pub refused: u64,
}

impl Sends {
    fn is_useless(&self) -> bool {
        self.done >= TRIED && self.copied == self.done
    }

    /// Those of another connection as well.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            tried: self.tried + other.tried,
            done: self.done + other.done,
            copied: self.copied + other.copied,
            refused: self.refused + other.refused,
        }
    }
}

/// A socket on which it was switched on.
#[derive(Debug)]
pub(crate) struct ZeroCopy {
    sends: Sends,
    on: bool,
}

impl ZeroCopy {
    /// Switches it on. Fails if the socket or the kernel knows nothing of it.
    pub(crate) fn enable(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let on: libc::c_int = 1;
        // SAFETY: the option's value is an int, which lives through the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_ZEROCOPY,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            sends: Sends::default(),
            on: true,
        })
    }

    /// Whether sends are to go without a copy.
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    pub(crate) fn sends(&self) -> Sends {
        self.sends
    }

    /// A send went out without a copy, or so it was asked.
    pub(crate) fn sent(&mut self) {
        self.sends.tried += 1;
    }

    /// One could not, for want of memory that may be pinned.
    pub(crate) fn refused(&mut self) {
        if self.sends.refused == 0 {
            tracing::warn!(
                "pages are copied on their way into the network for want of memory that may be \
                 pinned: raise the limit of locked memory (ulimit -l) or net.core.optmem_max"
            );
        }
        self.sends.refused += 1;
    }

    /// Takes what the kernel says off the error queue; says whether there was anything.
    pub(crate) fn reap(&mut self, socket: BorrowedFd<'_>) -> bool {
        let before = self.sends.done;
        while self.sends.done < self.sends.tried {
            let Some((sends, copied)) = completed(socket) else {
                break;
            };
            // No more than there are, whatever it says.
            let sends = sends.min(self.sends.tried - self.sends.done);
            self.sends.done += sends;
            self.sends.copied += if copied { sends } else { 0 };
        }
        if self.on && self.sends.is_useless() {
            tracing::info!("the kernel copies pages on this connection, so zero copy is off");
            self.on = false;
        }
        self.sends.done != before
    }
}

/// The next message of the error queue, if it is about sends: how many, and whether they were
/// copied.
fn completed(socket: BorrowedFd<'_>) -> Option<(u64, bool)> {
    // Room for one message of the kernel's: an error, and an address of either family.
    let mut control = [0_u64; 16];
    // SAFETY: all zeroes is a valid message header: no data, no address.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the header's only buffer is `control`, which is as long as it says and aligned for
    // what the kernel writes there.
    let received = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut message,
            libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT,
        )
    };
    if received < 0 {
        return None;
    }
    // SAFETY: the kernel has filled `control` and set the header's length to what it wrote.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    if header.is_null() {
        return None;
    }
    // SAFETY: not null, so it points to a whole header within `control`.
    let (level, kind, len) = unsafe {
        (
            (*header).cmsg_level,
            (*header).cmsg_type,
            (*header).cmsg_len,
        )
    };
    let of_errors = (level, kind) == (libc::SOL_IP, libc::IP_RECVERR)
        || (level, kind) == (libc::SOL_IPV6, libc::IPV6_RECVERR);
    // SAFETY: arithmetic on a length.
    let needed = unsafe { libc::CMSG_LEN(size_of::<libc::sock_extended_err>() as u32) };
    if !of_errors || (len as u64) < u64::from(needed) {
        return None;
    }
    type Told = libc::sock_extended_err;
    // SAFETY: the message is that long, within `control`; it is copied out, aligned or not.
    let error: Told = unsafe { std::ptr::read_unaligned(libc::CMSG_DATA(header).cast()) };
    if error.ee_origin != SO_EE_ORIGIN_ZEROCOPY {
        return None;
    }
    // The numbers of the first and the last of them; they wrap.
    let sends = u64::from(error.ee_data.wrapping_sub(error.ee_info)) + 1;
    let copied = error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED != 0;
    Some((sends, copied))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::bitmap::PageRun;
    use crate::guest_io::{GuestPages, Manner, PageIo};
    use crate::layout::{GuestRam, PAGE_SIZE};

    #[test]
    fn sends_that_are_all_copied_are_useless() {
        let sends = |done, copied| Sends {
            tried: 20,
            done,
            copied,
            refused: 0,
        };
        assert!(!sends(TRIED - 1, TRIED - 1).is_useless());
        assert!(!sends(TRIED, TRIED - 1).is_useless());
        assert!(sends(TRIED, TRIED).is_useless());
    }

    #[test]
    fn pages_arrive_and_the_kernel_says_what_it_did() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut destination, _) = listener.accept().unwrap();
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 64 * PAGE_SIZE as usize)]).unwrap();
        for page in 0..64 {
            ram.write_obj(page + 1, GuestAddress(page * PAGE_SIZE))
                .unwrap();
        }
        let pages = GuestPages::new(ram).unwrap();
        let mut zero_copy = ZeroCopy::enable(source.as_fd()).unwrap();
        let (mut io, mut got) = (PageIo::default(), Vec::new());
        for page in (0..64).step_by(4) {
            let run = PageRun {
                first: page,
                count: 4,
            };
            let mut done = 0;
            while done < 4 * PAGE_SIZE {
                let sent = io
                    .send(
                        source.as_fd(),
                        &[],
                        Some(&pages),
                        &[run],
                        done,
                        Manner::Pinned,
                    )
                    .unwrap();
                zero_copy.sent();
                done += sent as u64;
            }
            let mut data = vec![0; 4 * PAGE_SIZE as usize];
            destination.read_exact(&mut data).unwrap();
            got.extend(data);
        }
        for page in 0..64u64 {
            let at = (page * PAGE_SIZE) as usize;
            assert_eq!(got[at..at + 8], (page + 1).to_le_bytes());
        }
        // All has been read, so the kernel is done with all of it, and over loopback it copies.
        while zero_copy.sends().done < zero_copy.sends().tried {
            zero_copy.reap(source.as_fd());
            std::thread::yield_now();
        }
        let sends = zero_copy.sends();
        assert_eq!((sends.copied, sends.refused), (sends.tried, 0), "{sends:?}");
        assert!(sends.tried >= TRIED && !zero_copy.is_on());
        assert!(!zero_copy.reap(source.as_fd()));
    }

    #[test]
    fn a_unix_socket_has_it_not() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        assert!(ZeroCopy::enable(socket.as_fd()).is_err());
    }
}
