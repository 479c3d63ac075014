//! What the guest writes on its serial port, on its way to the host.
//!
//! The vCPU thread that writes a byte hands it to the kernel itself, so that a reader sees it at
//! once. What the kernel does not take is queued, and a thread hands it over later.
//! The queue is bounded; when it is full, the vCPU waits for room, or until it must leave the
//! guest ([`Interrupt`]): then the byte goes beyond the bound, so that nothing is lost.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::sink::Sink;
use super::wake::Wake;

/// How many bytes are queued before the guest waits.
pub const QUEUE: usize = 64 << 10;

/// Where the guest's output goes. Clones write to the same place.
#[derive(Clone, Debug)]
pub struct SerialOutput(Arc<Shared>);

/// Lets go vCPUs that wait for room. Clones do the same.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Shared>);

/// What is called when output that was refused can be tried again.
type OnRoom = Box<dyn Fn() + Send + Sync>;

struct Shared {
    state: Mutex<State>,
    on_room: Mutex<Option<OnRoom>>,
    /// There is room, or an interrupt.
    changed: Condvar,
    wake: Wake,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    queue: VecDeque<u8>,
    /// Without one, what the guest writes is thrown away.
    sink: Option<Arc<Sink>>,
    interrupted: bool,
    /// Whether [`SerialOutput::try_send`] has not taken all.
    refused: bool,
    /// Whether a lost byte has been told.
    warned: bool,
    /// Whether the console has been dropped: then nothing is kept.
    closed: bool,
}

/// The thread that hands over what is queued; dropping it ends it, and the output.
#[derive(Debug)]
pub(super) struct Drain {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Drain {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.replace_sink(None);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the console's output thread has panicked");
        }
    }
}

impl SerialOutput {
    /// Output to a sink, with the thread that hands over what is queued.
    pub(super) fn new(sink: Option<Sink>) -> io::Result<(Self, Drain)> {
        let state = State {
            queue: VecDeque::new(),
            sink: sink.map(Arc::new),
            interrupted: false,
            refused: false,
            warned: false,
            closed: false,
        };
        let shared = Shared {
            state: Mutex::new(state),
            on_room: Mutex::default(),
            changed: Condvar::new(),
            wake: Wake::new()?,
        };
        let shared = Arc::new(shared);
        let drained = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("console-out".into())
            .spawn(move || drained.drain_until_closed())?;
        Ok((
            Self(Arc::clone(&shared)),
            Drain {
                shared,
                thread: Some(thread),
            },
        ))
    }

    /// Sends output elsewhere from now on. What was queued for the place before is thrown away:
    /// that place is gone.
    pub(super) fn replace_sink(&self, sink: Option<Sink>) {
        self.0.replace_sink(sink);
    }

    /// How many bytes are queued.
    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.0.lock().queue.len()
    }

    /// The handle that lets waiting writers go.
    pub fn interrupt(&self) -> Interrupt {
        Interrupt(Arc::clone(&self.0))
    }

    /// Waits until everything has been taken, but no longer than until `deadline`. False if
    /// something is left.
    pub fn flush_until(&self, deadline: Instant) -> bool {
        let mut state = self.0.lock();
        while !state.queue.is_empty() {
            let Some(patience) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            state = self
                .0
                .changed
                .wait_timeout(state, patience)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Writes as much as there is room for, in order and without waiting; returns how many bytes.
    /// After it has not taken all, what [`on_room`](Self::on_room) has set is called when there
    /// is room.
    pub fn try_send(&self, bytes: &[u8]) -> usize {
        let mut state = self.0.lock();
        let mut rest = bytes;
        if state.queue.is_empty() {
            rest = state.write_through(rest);
        }
        if rest.is_empty() || state.sink.is_none() {
            return bytes.len();
        }
        let room = QUEUE.saturating_sub(state.queue.len()).min(rest.len());
        let (now, later) = rest.split_at(room);
        if state.queue.is_empty() {
            self.0.wake.wake();
        }
        state.queue.extend(now);
        state.refused = !later.is_empty();
        bytes.len() - later.len()
    }

    /// Sets what is called when output that was refused can be tried again, on a thread of the
    /// console's. It replaces what was set before.
    pub fn on_room(&self, on_room: Box<dyn Fn() + Send + Sync>) {
        *self.0.hook() = Some(on_room);
    }

    /// Writes all bytes, in order: see the module. Never fails.
    pub fn send(&self, bytes: &[u8]) {
        let mut state = self.0.lock();
        let mut rest = bytes;
        if state.queue.is_empty() {
            rest = state.write_through(rest);
        }
        while !rest.is_empty() {
            if state.sink.is_none() {
                return;
            }
            let room = if state.interrupted {
                rest.len()
            } else {
                QUEUE.saturating_sub(state.queue.len()).min(rest.len())
            };
            if room == 0 {
                state = self
                    .0
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (now, later) = rest.split_at(room);
            if state.queue.is_empty() {
                self.0.wake.wake();
            }
            state.queue.extend(now);
            rest = later;
        }
    }
}

impl io::Write for SerialOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes);
        Ok(bytes.len())
    }

    /// Does nothing: nothing is held back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Interrupt {
    /// From now on no writer waits, until [`clear`](Self::clear).
    pub fn raise(&self) {
        self.0.lock().interrupted = true;
        self.0.changed.notify_all();
    }

    /// Writers may wait again.
    pub fn clear(&self) {
        self.0.lock().interrupted = false;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hook(&self) -> MutexGuard<'_, Option<OnRoom>> {
        self.on_room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room was made.
    fn tell_room(&self, mut state: MutexGuard<'_, State>) {
        let refused = std::mem::take(&mut state.refused);
        drop(state);
        self.changed.notify_all();
        if refused && let Some(on_room) = &*self.hook() {
            on_room();
        }
    }

    fn drain_until_closed(&self) {
        loop {
            let (sink, closed, queued) = {
                let state = self.lock();
                (state.sink.clone(), state.closed, !state.queue.is_empty())
            };
            if closed {
                return;
            }
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            if let (Some(sink), true) = (&sink, queued) {
                fds.push(PollFd::new(&**sink, PollFlags::OUT));
            }
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return tracing::error!(%error, "the console's output ends"),
            }
            let ready = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            drop(fds);
            self.wake.clear();
            if ready {
                self.drain();
            }
        }
    }

    fn replace_sink(&self, sink: Option<Sink>) {
        let mut state = self.lock();
        state.queue.clear();
        state.sink = if state.closed {
            None
        } else {
            sink.map(Arc::new)
        };
        state.warned = false;
        self.tell_room(state);
        self.wake.wake();
    }

    /// Hands over what the kernel takes of the queue.
    fn drain(&self) {
        let mut state = self.lock();
        let mut queue = std::mem::take(&mut state.queue);
        let bytes = queue.make_contiguous();
        let rest = state.write_through(bytes).len();
        queue.drain(..queue.len().saturating_sub(rest));
        // write_through has let go of the sink if it is gone, and then the rest goes too.
        if state.sink.is_some() {
            state.queue = queue;
        }
        self.tell_room(state);
    }
}

impl State {
    /// Writes what goes in without waiting; returns what does not.
    fn write_through<'a>(&mut self, mut bytes: &'a [u8]) -> &'a [u8] {
        while let (Some(sink), false) = (&self.sink, bytes.is_empty()) {
            match sink.try_write(bytes) {
                Ok(0) => return bytes,
                Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
                Err(error) => {
                    let gone = matches!(error, Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN);
                    if gone {
                        self.sink = None;
                    }
                    if !self.warned {
                        self.warned = true;
                        tracing::warn!(%error, "the guest's console output is lost");
                    }
                    return &[];
                }
            }
        }
        if self.sink.is_none() { &[] } else { bytes }
    }
}
