//! A tap interface of the host's: Ethernet packets, each behind a virtio header.
// The ioctls have no safe wrapper, and packets go to and from the guest's memory without a copy.
// The crates for taps (tun-rs, tappers) hide the virtio header, which is what we need.
#![allow(unsafe_code)]

mod interface;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, ioctl};
use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::volatile_memory::PtrGuardMut;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

pub use self::interface::{MAX_NAME, TapError};
use super::spec::{feature, header};
use crate::virtio::GuestRam;
use crate::virtio::chain::Buffer;

/// The most buffers of one packet. Each may lie across two regions of memory, and IOV_MAX is 1024.
pub(super) const MAX_BUFFERS: usize = 500;

/// An interface that gives and takes packets.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
    mtu: u16,
    offloads: u64,
}

/// What a transfer of a packet came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    /// It is done: this many bytes.
    Done(usize),
    /// Not now.
    WouldBlock,
    /// The packet is lost.
    Lost,
    /// The interface is gone.
    Gone,
}

impl Tap {
    /// Attaches to the tap of that name, or creates it; `%d` in the name stands for the first
    /// number that is free.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let (file, name) = interface::open(name)?;
        let mtu = interface::mtu(&name)?;
        let mut tap = Self {
            fd: file.into(),
            name,
            mtu,
            offloads: 0,
        };
        tap.offloads = tap.probe();
        tap.set_guest_offloads(0)
            .map_err(|err| interface::failed(&tap.name, "cannot set offloads", err))?;
        Ok(tap)
    }

    /// A tap that isn't one, for tests: a socket that keeps packets apart.
    #[cfg(test)]
    pub(in crate::virtio) fn of_socket(fd: OwnedFd, mtu: u16, offloads: u64) -> Self {
        rustix::io::ioctl_fionbio(&fd, true).unwrap();
        Self {
            fd,
            name: "fake0".to_owned(),
            mtu,
            offloads,
        }
    }

    /// Its name, with the number that the kernel chose.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's MTU in bytes, when it was opened.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The features of a network device that it can offer.
    pub(super) fn offloads(&self) -> u64 {
        self.offloads
    }

    /// Finds out what the kernel can do, in both directions.
    fn probe(&self) -> u64 {
        use feature::*;
        let mut offers = CSUM;
        for guest in [
            GUEST_CSUM,
            GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN,
            GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6,
        ] {
            if self.set_guest_offloads(guest).is_ok() {
                offers |= guest;
            }
        }
        // A tap that gives such packets takes them as well.
        for (guest, host) in [
            (GUEST_TSO4, HOST_TSO4),
            (GUEST_TSO6, HOST_TSO6),
            (GUEST_ECN, HOST_ECN),
            (GUEST_USO4, HOST_USO),
        ] {
            if offers & guest != 0 {
                offers |= host;
            }
        }
        offers
    }

    /// Says what the packets may look like that the guest receives.
    pub(super) fn set_guest_offloads(&self, features: u64) -> Result<(), Errno> {
        use feature::*;
        let mut flags = 0;
        for (bit, flag) in [
            (GUEST_CSUM, libc::TUN_F_CSUM),
            (GUEST_TSO4, libc::TUN_F_TSO4),
            (GUEST_TSO6, libc::TUN_F_TSO6),
            (GUEST_ECN, libc::TUN_F_TSO_ECN),
        ] {
            if features & bit != 0 {
                flags |= flag;
            }
        }
        // The kernel has one switch for both.
        if features & (GUEST_USO4 | GUEST_USO6) == GUEST_USO4 | GUEST_USO6 {
            flags |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
        }
        // All else builds upon it (section 5.1.3.1).
        if features & GUEST_CSUM == 0 {
            flags = 0;
        }
        // SAFETY: the argument is a number.
        unsafe {
            let flags =
                IntegerSetter::<{ libc::TUNSETOFFLOAD as Opcode }>::new_usize(flags as usize);
            ioctl(&self.fd, flags)
        }
    }

    /// Reads a packet with its header into guest memory, and what doesn't fit into `rest`. There
    /// are at most [`MAX_BUFFERS`] buffers.
    pub(super) fn read<'a>(
        &self,
        memory: &GuestRam,
        buffers: impl Iterator<Item = &'a Buffer>,
        rest: &mut [u8],
    ) -> Transfer {
        let slices = slices(memory, buffers);
        let guards: Vec<PtrGuardMut> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let mut pieces: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| piece(guard.as_ptr(), guard.len()))
            .collect();
        pieces.push(piece(rest.as_mut_ptr(), rest.len()));
        let fd = self.fd.as_raw_fd();
        // SAFETY: the pieces are guest memory, mapped while `slices` borrows it, and `rest`.
        // Guest memory may change at any time, so nobody has a reference to it.
        let count = unsafe { libc::readv(fd, pieces.as_ptr(), pieces.len() as i32) };
        let transfer = transferred(count);
        if let Transfer::Done(mut left) = transfer {
            for slice in &slices {
                let written = left.min(slice.len());
                slice.bitmap().mark_dirty(0, written);
                left -= written;
            }
        }
        transfer
    }

    /// Writes a packet: a header, then what is in guest memory: at most [`MAX_BUFFERS`]
    /// buffers.
    pub(super) fn write<'a>(
        &self,
        memory: &GuestRam,
        header: &[u8],
        buffers: impl Iterator<Item = &'a Buffer>,
    ) -> Transfer {
        let slices = slices(memory, buffers);
        let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
        let mut pieces = vec![piece(header.as_ptr().cast_mut(), header.len())];
        pieces.extend(
            guards
                .iter()
                .map(|guard| piece(guard.as_ptr().cast_mut(), guard.len())),
        );
        let fd = self.fd.as_raw_fd();
        // SAFETY: as in `read`; these pieces are only read.
        let count = unsafe { libc::writev(fd, pieces.as_ptr(), pieces.len() as i32) };
        transferred(count)
    }

    /// Writes a packet with its header that lies in our own memory.
    pub(super) fn write_own(&self, packet: &[u8]) -> Result<(), Errno> {
        rustix::io::write(&self.fd, packet).map(|_| ())
    }

    /// Throws a packet away, if there is one.
    pub(super) fn discard(&self) -> Transfer {
        // What doesn't fit goes.
        match rustix::io::read(&self.fd, &mut [0; header::LEN]) {
            Ok(count) => Transfer::Done(count),
            Err(err) => not_transferred(err),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The buffers as they are mapped. They lie in RAM, as all buffers of a chain do.
fn slices<'a, 'm>(
    memory: &'m GuestRam,
    buffers: impl Iterator<Item = &'a Buffer>,
) -> Vec<VolatileSlice<'m, MS<'m, GuestRam>>> {
    buffers
        .flat_map(|buffer| memory.get_slices(buffer.address, buffer.len as usize))
        .map_while(Result::ok)
        .collect()
}

fn piece(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    }
}

fn transferred(count: isize) -> Transfer {
    match usize::try_from(count) {
        Ok(count) => Transfer::Done(count),
        Err(_) => not_transferred(errno(&io::Error::last_os_error())),
    }
}

fn not_transferred(error: Errno) -> Transfer {
    match error {
        Errno::AGAIN | Errno::INTR => Transfer::WouldBlock,
        // The interface was deleted, or its network namespace.
        Errno::BADFD | Errno::BADF => Transfer::Gone,
        // The packet is malformed, or the interface is down.
        _ => Transfer::Lost,
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
