//! Memory whose pages come when they are touched: the kernel's userfaultfd.
//!
//! Whoever touches a missing page of registered memory sleeps, be it a vCPU, a thread or a system
//! call, until somebody puts the page there or wakes him. See userfaultfd(2) and ioctl_userfaultfd(2).
#![allow(
    unsafe_code,
    reason = "the ioctls of userfaultfd, which no safe interface offers"
)]

mod abi;
mod error;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub use self::error::UserfaultError;

use rustix::io::Errno;
use vm_memory::GuestAddress;

use self::abi::*;
use crate::bitmap::PageRun;
use crate::guest_io::GuestPages;
use crate::layout::{GuestRam, PAGE_SIZE};

/// Somebody touched a missing page and waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The host address, of the byte or of its page.
    pub address: u64,
    /// The thread that waits, as gettid(2) has it, if the kernel tells.
    pub thread: Option<u32>,
}

/// A userfaultfd. Dropped, it lets go of its memory: whoever waits goes on, and finds zeroes where
/// pages were missing.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    threads: bool,
}

impl Userfault {
    /// Opens one that serves faults of the kernel too, as KVM and system calls raise them.
    pub fn open() -> Result<Self, UserfaultError> {
        let fd = new()?;
        if handshake(fd.as_fd(), FEATURE_THREAD_ID).is_ok() {
            return Ok(Self { fd, threads: true });
        }
        // A refused handshake may have used the descriptor up.
        let fd = new()?;
        handshake(fd.as_fd(), 0).map_err(UserfaultError::Handshake)?;
        Ok(Self { fd, threads: false })
    }

    /// Whether post-copy can work here: opens one and puts a page in place.
    pub fn probe() -> Result<(), UserfaultError> {
        let unmapped = |error: &dyn std::fmt::Display| UserfaultError::Probe(error.to_string());
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), PAGE_SIZE as usize)])
            .map_err(|error| unmapped(&error))?;
        let memory = GuestPages::new(ram).map_err(|error| unmapped(&error))?;
        let page = PageRun { first: 0, count: 1 };
        let userfault = Self::open()?;
        userfault.register(&memory, page)?;
        let data = [0x5a; PAGE_SIZE as usize];
        let placed = userfault.copy(&memory, page, &data)?;
        if placed != 1 || memory.crc(0) != crc32fast::hash(&data) {
            return Err(UserfaultError::Broken);
        }
        userfault.unregister(&memory, page)
    }

    /// Whether single pages can be put into this memory, which nobody watches yet: not if it has
    /// huge pages, or is a file on a disk.
    pub fn check(memory: &GuestPages) -> Result<(), UserfaultError> {
        let userfault = Self::open()?;
        let end = memory.layout().pages();
        let mut first = 0;
        while first < end {
            let count = end - first;
            let region = memory.within_region(PageRun { first, count });
            userfault.register(memory, region)?;
            first = region.end();
        }
        Ok(())
    }

    /// Whether faults tell their thread.
    pub fn tells_threads(&self) -> bool {
        self.threads
    }

    /// Watches a run of pages within one region: from now on, whoever touches a missing one waits.
    pub fn register(&self, memory: &GuestPages, run: PageRun) -> Result<(), UserfaultError> {
        let mut argument = Register {
            range: range(memory, run),
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: `argument` is the structure that the request takes. Missing pages of the range
        // belong to the guest, and nobody of this process relies on reading zeroes there.
        unsafe { self.ioctl(UFFDIO_REGISTER, &raw mut argument) }
            .map_err(failed("watching", memory, run))?;
        if argument.ioctls & RANGE_IOCTLS != RANGE_IOCTLS {
            return Err(UserfaultError::Unsupported);
        }
        Ok(())
    }

    /// No longer watches a run of pages within one region. Whoever waits there goes on, and finds
    /// zeroes where pages are missing.
    pub fn unregister(&self, memory: &GuestPages, run: PageRun) -> Result<(), UserfaultError> {
        let mut argument = range(memory, run);
        // SAFETY: `argument` is the structure that the request takes; no contents change.
        unsafe { self.ioctl(UFFDIO_UNREGISTER, &raw mut argument) }.map_err(failed(
            "letting go of",
            memory,
            run,
        ))
    }

    /// Puts `data` into the missing pages of a run within one region, and wakes who waits for
    /// them. Returns how many pages were placed; if not all, the one after them is there already,
    /// and was left as it is. The run is as long as `data`, in whole pages.
    pub fn copy(
        &self,
        memory: &GuestPages,
        run: PageRun,
        data: &[u8],
    ) -> Result<u64, UserfaultError> {
        assert_eq!(data.len() as u64, run.count * PAGE_SIZE, "data of the run");
        let to = range(memory, run);
        self.fill(to.len, |done| {
            let mut argument = Copy {
                to: to.start + done,
                from: data.as_ptr() as u64 + done,
                len: to.len - done,
                ..Copy::default()
            };
            // SAFETY: `argument` is the structure that the request takes. The kernel reads what is
            // left of `data`, which is as long as the range, and puts it where nothing is mapped,
            // in memory of the guest.
            let result = unsafe { self.ioctl(UFFDIO_COPY, &raw mut argument) };
            (argument.copied, result)
        })
        .map_err(failed("placing", memory, run))
    }

    /// Makes the missing pages of a run within one region zero, and wakes who waits for them.
    /// Returns what [`Self::copy`] does.
    pub fn zero(&self, memory: &GuestPages, run: PageRun) -> Result<u64, UserfaultError> {
        let to = range(memory, run);
        self.fill(to.len, |done| {
            let mut argument = ZeroPage {
                range: Range {
                    start: to.start + done,
                    len: to.len - done,
                },
                ..ZeroPage::default()
            };
            // SAFETY: `argument` is the structure that the request takes. The kernel puts zeroes
            // where nothing is mapped, in memory of the guest.
            let result = unsafe { self.ioctl(UFFDIO_ZEROPAGE, &raw mut argument) };
            (argument.zeroed, result)
        })
        .map_err(failed("placing zeroes in", memory, run))
    }

    /// Wakes who waits for pages of a run within one region. Who finds his page missing still
    /// waits again, and that is a new fault.
    pub fn wake(&self, memory: &GuestPages, run: PageRun) -> Result<(), UserfaultError> {
        let mut argument = range(memory, run);
        // SAFETY: `argument` is the structure that the request takes; no contents change.
        unsafe { self.ioctl(UFFDIO_WAKE, &raw mut argument) }.map_err(failed(
            "waking who waits for",
            memory,
            run,
        ))
    }

    /// Adds the faults that nobody has read yet to `faults`; doesn't wait for any.
    pub fn read_faults(&self, faults: &mut Vec<Fault>) -> Result<(), UserfaultError> {
        let mut buffer = [0; MESSAGE * MESSAGES_PER_READ];
        loop {
            let len = match rustix::io::read(&self.fd, &mut buffer) {
                Ok(len) => len,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(UserfaultError::Read(error.into())),
            };
            let (messages, _) = buffer[..len].as_chunks::<MESSAGE>();
            faults.extend(messages.iter().filter_map(|message| self.fault(message)));
            if messages.len() < MESSAGES_PER_READ {
                return Ok(());
            }
        }
    }

    /// `struct uffd_msg`, of a page fault.
    fn fault(&self, message: &[u8; MESSAGE]) -> Option<Fault> {
        let (&event, _) = message.split_first()?;
        let (&address, rest) = message.get(16..)?.split_first_chunk()?;
        let (&thread, _) = rest.split_first_chunk()?;
        (event == EVENT_PAGEFAULT).then_some(Fault {
            address: u64::from_ne_bytes(address),
            thread: self.threads.then_some(u32::from_ne_bytes(thread)),
        })
    }

    /// Fills `len` bytes in as many calls as it takes; `call` is told how many are done, and
    /// returns the kernel's count and result. Returns how many pages were filled before one that
    /// was there already.
    fn fill(
        &self,
        len: u64,
        mut call: impl FnMut(u64) -> (i64, io::Result<()>),
    ) -> io::Result<u64> {
        let mut done = 0;
        while done < len {
            let (count, result) = call(done);
            match (u64::try_from(count), result) {
                // Some of it, whatever stopped it then: the next call tells.
                (Ok(count @ 1..), _) => done += count.min(len - done),
                (_, Err(error)) => match error.raw_os_error() {
                    Some(libc::EEXIST) => break,
                    Some(libc::EAGAIN | libc::EINTR) => {}
                    _ => return Err(error),
                },
                (_, Ok(())) => return Err(io::ErrorKind::WriteZero.into()),
            }
        }
        Ok(done / PAGE_SIZE)
    }

    /// # Safety
    ///
    /// `argument` points to the structure that the request takes, and what the request does to
    /// the memory that it names is allowed.
    unsafe fn ioctl<T>(&self, request: libc::c_ulong, argument: *mut T) -> io::Result<()> {
        // SAFETY: as the caller says.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Userfault {
    /// What is readable when there are faults to read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A new one, before its handshake, by either way.
fn new() -> Result<OwnedFd, UserfaultError> {
    from_device()
        .or_else(|device| from_call().map_err(|call| UserfaultError::Unavailable { device, call }))
}

/// Without UFFD_USER_MODE_ONLY, with which KVM's faults and those of system calls would fail.
const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

fn from_device() -> io::Result<OwnedFd> {
    let mut options = File::options();
    let device = options.read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the request takes flags, and returns a new descriptor; it touches no memory.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn from_call() -> io::Result<OwnedFd> {
    // SAFETY: the system call takes flags, and returns a new descriptor; it touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn handshake(fd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let mut api = Api {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: `api` is the structure that the request takes; it touches no other memory.
    match unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where a run is. It must be within one region, as regions are not neighbours on the host.
fn range(memory: &GuestPages, run: PageRun) -> Range {
    assert_eq!(memory.within_region(run), run, "a run across regions");
    Range {
        start: memory.host_address(run.first),
        len: run.count * PAGE_SIZE,
    }
}

fn failed(
    doing: &'static str,
    memory: &GuestPages,
    run: PageRun,
) -> impl FnOnce(io::Error) -> UserfaultError {
    let run = memory.addresses(run);
    move |error| UserfaultError::Pages {
        doing,
        pages: run.pages,
        address: run.address,
        error,
    }
}
