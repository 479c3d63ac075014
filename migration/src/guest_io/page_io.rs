//! Moving guest memory to and from sockets.
#![allow(
    unsafe_code,
    reason = "guest memory goes to and from the socket straight, as vectors of raw ranges"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::GuestPages;
use crate::bitmap::PageRun;
use crate::layout::PAGE_SIZE;

/// How bytes are handed to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Copied.
    Copied,
    /// Copied, and more follow at once: they may wait for those.
    More,
    /// Not copied: the pages are pinned until the socket is done with them, and says so on its
    /// error queue; see [`crate::zero_copy`]. There are no parts then, as they may be gone by that
    /// time.
    Pinned,
}

/// Moves memory to and from sockets; its buffers are reused from call to call.
#[derive(Debug, Default)]
pub struct PageIo {
    ranges: Vec<libc::iovec>,
}

// SAFETY: between calls the list is empty; its addresses are used within one call only.
unsafe impl Send for PageIo {}

impl PageIo {
    /// Sends `parts`, then the pages of `runs`, without the first `skip` bytes of it all; returns
    /// how many bytes the socket took. Each run is within one region. There are no more than
    /// 1024 parts and runs.
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        parts: &[&[u8]],
        memory: Option<&GuestPages>,
        runs: &[PageRun],
        skip: u64,
        manner: Manner,
    ) -> io::Result<usize> {
        self.ranges.clear();
        let parts = match manner {
            Manner::Copied | Manner::More => parts,
            Manner::Pinned => &[],
        };
        let mut skip = skip as usize;
        for part in parts {
            let left = part.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(part.len());
            if !left.is_empty() {
                self.ranges.push(libc::iovec {
                    iov_base: left.as_ptr().cast_mut().cast(),
                    iov_len: left.len(),
                });
            }
        }
        if let Some(memory) = memory {
            memory.push_ranges(runs, skip as u64, &mut self.ranges);
        }
        // SAFETY: all zeroes is a valid message header: no address, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.ranges.as_mut_ptr();
        message.msg_iovlen = self.ranges.len();
        let flags = match manner {
            Manner::Copied => 0,
            Manner::More => libc::MSG_MORE,
            Manner::Pinned => libc::MSG_ZEROCOPY,
        };
        // SAFETY: every range is memory that lives through the call: `parts`, which are
        // borrowed, and mapped guest memory, which `memory` keeps. The kernel only reads them;
        // pages that it reads later it holds itself, whatever becomes of the mapping. A guest
        // writing meanwhile tears the data, which the checksums show.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | flags,
            )
        };
        self.ranges.clear();
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Receives into the pages of `runs`, past their first `skip` bytes; returns how many bytes
    /// came, 0 at the stream's end. Each run is within one region.
    pub fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        memory: &GuestPages,
        runs: &[PageRun],
        skip: u64,
    ) -> io::Result<usize> {
        self.ranges.clear();
        memory.push_ranges(runs, skip, &mut self.ranges);
        // SAFETY: every range is mapped guest memory, which `memory` keeps; no reference to it
        // exists in this process, so the kernel may write it.
        let received = unsafe {
            libc::readv(
                socket.as_raw_fd(),
                self.ranges.as_ptr(),
                self.ranges.len() as libc::c_int,
            )
        };
        self.ranges.clear();
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Copies `bytes` into the pages of `runs`, from their start; what doesn't fit is left.
    pub fn place(&mut self, memory: &GuestPages, runs: &[PageRun], mut bytes: &[u8]) {
        self.ranges.clear();
        memory.push_ranges(runs, 0, &mut self.ranges);
        for range in self.ranges.drain(..) {
            let (now, later) = bytes.split_at(bytes.len().min(range.iov_len));
            // SAFETY: the range is mapped guest memory at least as long as `now`, and disjoint
            // from it, as no slice of this process lies in guest memory.
            unsafe {
                std::ptr::copy_nonoverlapping(now.as_ptr(), range.iov_base.cast(), now.len());
            }
            bytes = later;
        }
    }
}

impl GuestPages {
    /// The ranges of host memory of `runs`, without the first `skip` bytes.
    fn push_ranges(&self, runs: &[PageRun], mut skip: u64, out: &mut Vec<libc::iovec>) {
        for &run in runs {
            let len = run.count * PAGE_SIZE;
            if skip >= len {
                skip -= len;
                continue;
            }
            assert_eq!(self.within_region(run), run, "a run across regions");
            out.push(libc::iovec {
                // SAFETY: `skip` is less than the length of the run, which is within one mapping.
                iov_base: unsafe { self.host(run.first).add(skip as usize) }.cast(),
                iov_len: (len - skip) as usize,
            });
            skip = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::tests::memory;
    use super::*;

    #[test]
    fn pages_go_through_a_socket_in_pieces() {
        let (from, source) = memory();
        let (to, destination) = memory();
        let runs = [
            PageRun { first: 2, count: 3 },
            PageRun { first: 9, count: 1 },
        ];
        for page in (2..5).map(|p| p << 12).chain([(1 << 32) + 4096]) {
            for at in (0..PAGE_SIZE).step_by(8) {
                from.write_obj(page ^ at << 20, GuestAddress(page + at))
                    .unwrap();
            }
        }
        let (a, b) = UnixStream::pair().unwrap();
        let mut io = PageIo::default();
        let head: [&[u8]; 2] = [b"header", b"body"];
        let total = 10 + 4 * PAGE_SIZE;
        let mut sent = 0;
        while sent < total {
            sent += io
                .send(a.as_fd(), &head, Some(&source), &runs, sent, Manner::Copied)
                .unwrap() as u64;
        }
        let mut start = [0; 1010];
        io::Read::read_exact(&mut &b, &mut start).unwrap();
        assert_eq!(&start[..10], b"headerbody");
        io.place(&destination, &runs, &start[10..]);
        let mut received = 1000;
        while received < 4 * PAGE_SIZE {
            received += io
                .receive(b.as_fd(), &destination, &runs, received)
                .unwrap() as u64;
        }
        for page in [2, 3, 4, 9] {
            assert_eq!(source.crc(page), destination.crc(page));
            assert!(!destination.is_zero(page));
        }
        assert!(destination.is_zero(1) && destination.is_zero(8));
        destination.fill_zero(runs[0]);
        assert!((2..5).all(|page| destination.is_zero(page)));
        assert_eq!(to.read_obj::<u64>(GuestAddress(2 << 12)).unwrap(), 0);
    }
}
