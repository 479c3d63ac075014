//! What the host sends to the guest's serial port. No more is read from the host than the port
//! has room for, so a guest that does not read makes the host's side wait.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::wake::Wake;

/// The guest's side of the input: a serial port.
///
/// Both methods are called on a thread of their own, and may wait for a lock that a vCPU holds
/// while it waits for room in the output.
pub trait SerialInput: Send + Sync {
    /// How many bytes it takes now. After it has said 0, [`InputWaker::wake`] must be called when
    /// there is room.
    fn room(&self) -> usize;

    /// Takes bytes, no more than there is [`room`](Self::room) for: nobody else pushes.
    fn push(&self, bytes: &[u8]);

    /// Takes a break condition. The default does nothing.
    fn push_break(&self) {}
}

/// Tells the console that the guest has made room. Clones do the same.
#[derive(Clone, Debug)]
pub struct InputWaker(pub(super) Arc<Inlet>);

impl InputWaker {
    /// To be called whenever the guest has read, with or without the port's lock held. Cheap if
    /// nobody waits.
    pub fn wake(&self) {
        if self.0.starving.swap(false, Ordering::SeqCst) {
            self.0.wake.wake();
        }
    }
}

/// Where input goes in.
pub(super) struct Inlet {
    wake: Wake,
    /// Whether the input thread waits for room.
    starving: AtomicBool,
    closed: AtomicBool,
    guest: Mutex<Option<Arc<dyn SerialInput>>>,
}

impl fmt::Debug for Inlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inlet").finish_non_exhaustive()
    }
}

/// Bytes on their way from a descriptor to the guest; the 16550's FIFO has 16.
pub(super) type Chunk = [u8; 64];

impl Inlet {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            wake: Wake::new()?,
            starving: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            guest: Mutex::new(None),
        }))
    }

    fn guest_slot(&self) -> MutexGuard<'_, Option<Arc<dyn SerialInput>>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn connect(&self, guest: Arc<dyn SerialInput>) {
        *self.guest_slot() = Some(guest);
        self.wake.wake();
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake.wake();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(super) fn guest(&self) -> Option<Arc<dyn SerialInput>> {
        self.guest_slot().clone()
    }

    /// How much the guest takes now; if nothing, a wake follows when it does.
    pub(super) fn room(&self) -> usize {
        let Some(guest) = self.guest() else { return 0 };
        let room = guest.room();
        if room > 0 {
            return room;
        }
        // Looked at again after the announcement: room made in between would go unnoticed.
        self.starving.store(true, Ordering::SeqCst);
        guest.room()
    }

    pub(super) fn push(&self, bytes: &[u8]) {
        if let (Some(guest), false) = (self.guest(), bytes.is_empty()) {
            guest.push(bytes);
        }
    }

    /// Reads from a readable descriptor as much as there is room for, and hands it to the guest.
    /// False at the end of the input.
    pub(super) fn transfer(&self, from: impl AsFd, room: usize) -> bool {
        let mut chunk: Chunk = [0; _];
        let room = room.min(chunk.len());
        match rustix::io::read(from, chunk.get_mut(..room).unwrap_or_default()) {
            Ok(0) => room == 0,
            Ok(len) => {
                self.push(chunk.get(..len).unwrap_or_default());
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => true,
            Err(_) => false,
        }
    }

    /// Waits for a wake or for one of the descriptors, or for the time; returns what the
    /// descriptors are ready for.
    pub(super) fn wait<const N: usize>(
        &self,
        fds: [Option<(BorrowedFd<'_>, PollFlags)>; N],
        time: Option<&Timespec>,
    ) -> [PollFlags; N] {
        let mut polled = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let mut slots = [None; N];
        for (slot, fd) in slots.iter_mut().zip(fds) {
            if let Some((fd, flags)) = fd {
                *slot = Some(polled.len());
                polled.push(PollFd::from_borrowed_fd(fd, flags));
            }
        }
        match poll(&mut polled, time) {
            Ok(_) => {}
            Err(Errno::INTR) => return [PollFlags::empty(); N],
            Err(error) => tracing::warn!(%error, "cannot wait for console input"),
        }
        let ready = slots.map(|slot| {
            slot.and_then(|slot| polled.get(slot))
                .map_or(PollFlags::empty(), PollFd::revents)
        });
        drop(polled);
        self.wake.clear();
        ready
    }
}
