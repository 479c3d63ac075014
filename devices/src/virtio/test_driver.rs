//! A driver for unit tests: it negotiates through the registers, and makes requests.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::transport::{QUEUE_NOTIFY, VirtioMmio};
use super::{F_VERSION_1, GuestRam, VirtioDevice};

/// The memory of the driver's machine, in bytes.
pub(crate) const MEMORY: usize = 16 << 20;

/// Where the rings of a queue are.
const RINGS: u64 = 1 << 20;
const RING_LEN: u64 = 1 << 16;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// From where on buffers are allocated.
const BUFFERS: u64 = 8 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

pub(crate) struct TestDriver {
    pub(crate) transport: VirtioMmio,
    pub(crate) memory: GuestRam,
    irqfd: EventFd,
    state: Mutex<State>,
}

/// The driver's own view of its queues.
#[derive(Clone)]
struct State {
    queues: Vec<Queue>,
    next_buffer: u64,
}

#[derive(Clone, Default)]
struct Queue {
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

/// A request that was made.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) head: u16,
    /// The buffers that the device can write: address and length.
    pub(crate) writable: Vec<(u64, u32)>,
}

/// A request that was answered.
#[derive(Clone, Debug)]
pub(crate) struct Used {
    pub(crate) written: u32,
    /// All that the device could write, whether it did or not.
    pub(crate) data: Vec<u8>,
}

impl TestDriver {
    pub(crate) fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let irqfd = EventFd::new(0).unwrap();
        let transport =
            VirtioMmio::new(0, device, memory.clone(), irqfd.try_clone().unwrap()).unwrap();
        let state = State {
            queues: Vec::new(),
            next_buffer: BUFFERS,
        };
        Self {
            transport,
            memory,
            irqfd,
            state: Mutex::new(state),
        }
    }

    /// A driver that takes over from `self` with another device, as after a migration: memory and
    /// the transport's and device's state are those of `self`.
    pub(crate) fn migrate_to(&self, device: Arc<dyn VirtioDevice>) -> Self {
        let other = Self::new(device);
        let mut all = vec![0; MEMORY];
        self.memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        other.memory.write_slice(&all, GuestAddress(0)).unwrap();
        *other.state.lock().unwrap() = self.state.lock().unwrap().clone();
        let (from, to) = (self.transport.device(), other.transport.device());
        if let Some(state) = from.saved_state() {
            let body = state.save().unwrap();
            let there = to.saved_state().unwrap();
            there.restore(state.version(), &body).unwrap();
        }
        use crate::state::SaveRestore;
        let body = self.transport.save().unwrap();
        other
            .transport
            .restore(self.transport.version(), &body)
            .unwrap();
        other
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    pub(crate) fn offered(&self) -> u64 {
        self.set(0x14, 0);
        let low = self.get(0x10);
        self.set(0x14, 1);
        u64::from(low) | u64::from(self.get(0x10)) << 32
    }

    /// Negotiates `features` beside VIRTIO_F_VERSION_1; all queues at the size that is offered.
    pub(crate) fn start(&self, features: u64) {
        self.start_queues(features, |_| true);
    }

    /// The same with some of the queues.
    pub(crate) fn start_queues(&self, features: u64, used: impl Fn(u32) -> bool) {
        let features = features | F_VERSION_1;
        for bits in [1, 3] {
            self.set(0x70, bits);
        }
        for sel in [0, 1] {
            self.set(0x24, sel);
            self.set(0x20, (features >> (32 * sel)) as u32);
        }
        self.set(0x70, 11);
        assert_eq!(self.get(0x70) & 8, 8, "features {features:#x} were refused");
        let mut state = self.state.lock().unwrap();
        state.queues.clear();
        for index in 0.. {
            self.set(0x30, index);
            let size = self.get(0x34);
            if size == 0 {
                break;
            }
            let rings = RINGS + u64::from(index) * RING_LEN;
            self.set(0x38, size);
            for (offset, address) in [
                (0x80, rings),
                (0x90, rings + AVAILABLE),
                (0xa0, rings + USED),
            ] {
                self.set(offset, address as u32);
                self.set(offset + 4, (address >> 32) as u32);
            }
            self.memory
                .write_slice(&[0; RING_LEN as usize], GuestAddress(rings))
                .unwrap();
            self.set(0x44, used(index).into());
            state.queues.push(Queue {
                size: size as u16,
                ..Queue::default()
            });
        }
        drop(state);
        self.set(0x70, 15);
    }

    pub(crate) fn run(&self) {
        self.transport.run();
    }

    pub(crate) fn pause(&self) {
        self.transport.device().request_pause();
        self.transport.device().wait_paused();
    }

    /// Puts a request into a queue, without telling the device.
    pub(crate) fn add(&self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Pending {
        let mut state = self.state.lock().unwrap();
        let mut buffers = Vec::new();
        for data in readable {
            let address = state.allocate(data.len() as u32);
            self.memory
                .write_slice(data, GuestAddress(address))
                .unwrap();
            buffers.push((address, data.len() as u32, 0));
        }
        let mut given = Vec::new();
        for &len in writable {
            let address = state.allocate(len);
            buffers.push((address, len, WRITE));
            given.push((address, len));
        }
        drop(state);
        let head = self.add_descriptors(queue, &buffers);
        Pending {
            head,
            writable: given,
        }
    }

    /// Puts a chain of (address, length, flags but NEXT) into a queue; returns its head.
    pub(crate) fn add_descriptors(&self, index: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let mut state = self.state.lock().unwrap();
        let queue = &mut state.queues[index];
        let rings = RINGS + index as u64 * RING_LEN;
        let head = queue.next_descriptor;
        let mut at = head;
        for (number, &(address, len, flags)) in buffers.iter().enumerate() {
            let next = (at + 1) % queue.size;
            let more = number + 1 < buffers.len();
            let mut bytes = Vec::new();
            bytes.extend(address.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend((flags | if more { NEXT } else { 0 }).to_le_bytes());
            bytes.extend(if more { next } else { 0 }.to_le_bytes());
            let place = GuestAddress(rings + 16 * u64::from(at));
            self.memory.write_slice(&bytes, place).unwrap();
            at = next;
        }
        queue.next_descriptor = at;
        let slot = rings + AVAILABLE + 4 + 2 * u64::from(queue.available % queue.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        queue.available = queue.available.wrapping_add(1);
        self.set_available(index, queue.available);
        head
    }

    /// Writes the index of the available ring, true or not.
    pub(crate) fn set_available(&self, index: usize, available: u16) {
        let rings = RINGS + index as u64 * RING_LEN;
        self.memory
            .store(
                available,
                GuestAddress(rings + AVAILABLE + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Says after which index of the used ring to interrupt.
    pub(crate) fn set_used_event(&self, index: usize, event: u16) {
        let size = self.state.lock().unwrap().queues[index].size;
        let rings = RINGS + index as u64 * RING_LEN;
        let place = GuestAddress(rings + AVAILABLE + 4 + 2 * u64::from(size));
        self.memory.write_obj(event, place).unwrap();
    }

    /// Makes the device believe that it has taken the next request already.
    pub(crate) fn skip_available(&self, queue: usize) {
        self.transport.skip_available(queue);
    }

    pub(crate) fn notify(&self, queue: usize) {
        self.set(QUEUE_NOTIFY, queue as u32);
    }

    /// What the device has used in a queue since the last time: (head, written).
    pub(crate) fn take_used(&self, index: usize) -> Vec<(u16, u32)> {
        let mut state = self.state.lock().unwrap();
        let queue = &mut state.queues[index];
        let rings = RINGS + index as u64 * RING_LEN;
        let event = GuestAddress(rings + AVAILABLE + 4 + 2 * u64::from(queue.size));
        let ring = rings + USED;
        let mut used = Vec::new();
        loop {
            // With VIRTIO_F_EVENT_IDX: an interrupt about the next one, please.
            self.memory
                .store(queue.used, event, Ordering::SeqCst)
                .unwrap();
            let end: u16 = self
                .memory
                .load(GuestAddress(ring + 2), Ordering::SeqCst)
                .unwrap();
            if queue.used == end {
                return used;
            }
            while queue.used != end {
                let place = ring + 4 + 8 * u64::from(queue.used % queue.size);
                let head: u32 = self.memory.read_obj(GuestAddress(place)).unwrap();
                let written: u32 = self.memory.read_obj(GuestAddress(place + 4)).unwrap();
                used.push((head as u16, written));
                queue.used = queue.used.wrapping_add(1);
            }
        }
    }

    /// Waits for an interrupt, and acknowledges it; returns its reasons.
    pub(crate) fn wait_interrupt(&self) -> u32 {
        self.irqfd.read().unwrap();
        let status = self.get(0x60);
        self.set(0x64, status);
        status
    }

    /// The contents of the buffers that the device could write.
    pub(crate) fn data(&self, pending: &Pending) -> Vec<u8> {
        let mut all = Vec::new();
        for &(address, len) in &pending.writable {
            let mut data = vec![0; len as usize];
            self.memory
                .read_slice(&mut data, GuestAddress(address))
                .unwrap();
            all.extend(data);
        }
        all
    }

    /// Waits until the device has used a request; there must be no other.
    pub(crate) fn wait_for(&self, queue: usize, pending: &Pending) -> Used {
        loop {
            if let [(head, written)] = *self.take_used(queue) {
                assert_eq!(head, pending.head);
                return Used {
                    written,
                    data: self.data(pending),
                };
            }
            self.wait_interrupt();
        }
    }

    /// Makes a request and waits for it.
    pub(crate) fn request(&self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Used {
        let pending = self.add(queue, readable, writable);
        self.notify(queue);
        self.wait_for(queue, &pending)
    }
}

impl State {
    fn allocate(&mut self, len: u32) -> u64 {
        let address = self.next_buffer;
        let end = address + u64::from(len);
        assert!(end <= MEMORY as u64, "the test's driver is out of memory");
        self.next_buffer = end.next_multiple_of(16);
        address
    }
}
