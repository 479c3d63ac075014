//! The console (section 5.3): one port, without a size and without the control queues of
//! VIRTIO_CONSOLE_F_MULTIPORT.
//!
//! Nothing waits for the host: output that it doesn't take stays in the queue, where the guest's
//! driver waits for it, and input is taken from the host only as long as there is [room](Console::room).
//! At a pause each byte that the guest sent is either with the host or still in the queue: a
//! request that was taken in part goes back, and how much of it was taken is saved.

mod port;
mod saved;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::notifier::Notifier;
use super::worker::Worker;
use super::{DeviceKind, VirtioDevice};
use crate::state::SaveRestore;
use port::Port;

const NAME: &str = "virtio-console";

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 64;

/// How many bytes of input wait for a guest that gives no buffers for them.
pub const INPUT: usize = 4096;

/// Where the guest's output goes.
pub trait Output: Send {
    /// Takes what it can without waiting; returns how many bytes. If that is less than all,
    /// [`Console::output_has_room`] must be called when it can take more.
    fn try_write(&self, bytes: &[u8]) -> usize;
}

/// What is called when there is room for input again.
pub type OnRoom = Box<dyn Fn() + Send + Sync>;

/// A console.
#[derive(Debug)]
pub struct Console {
    worker: Worker,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Input that the guest has not got yet: at most [`INPUT`] bytes.
    input: Mutex<VecDeque<u8>>,
    /// How much of the first request in the transmit queue the host has taken, in bytes.
    transmitted: AtomicU64,
    /// Wakes the thread when there is input, or room for output.
    wake: Notifier,
}

impl Shared {
    fn input(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Console {
    /// A console as after power-on. `on_room` is called on the device's thread, after
    /// [`room`](Self::room) may have said 0.
    pub fn new(output: Box<dyn Output>, on_room: OnRoom) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            input: Mutex::default(),
            transmitted: AtomicU64::new(0),
            wake: Notifier::new()?,
        });
        let port = Port::new(Arc::clone(&shared), output, on_room);
        Ok(Self {
            worker: Worker::spawn(NAME, &[RECEIVE, TRANSMIT], port)?,
            shared,
        })
    }

    /// How many bytes of input it takes now.
    pub fn room(&self) -> usize {
        INPUT.saturating_sub(self.shared.input().len())
    }

    /// Takes input, as much as there is room for; returns how many bytes.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let mut input = self.shared.input();
        let taken = bytes.len().min(INPUT.saturating_sub(input.len()));
        input.extend(bytes.iter().take(taken));
        drop(input);
        self.shared.wake.notify();
        taken
    }

    /// The output can take more than before.
    pub fn output_has_room(&self) {
        self.shared.wake.notify();
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn name(&self) -> &str {
        NAME
    }

    fn features(&self) -> u64 {
        0
    }

    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // Without its features no field means anything.
        data.fill(0);
    }

    fn reset(&self) {
        self.worker.deactivate();
        self.shared.input().clear();
        self.shared.transmitted.store(0, Ordering::SeqCst);
        // There is room: the thread says so when it works again.
        self.shared.wake.notify();
    }

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        Some(self)
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}
