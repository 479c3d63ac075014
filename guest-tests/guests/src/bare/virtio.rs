//! Virtio devices: where they are, and their queues. On the crate virtio-drivers, with what its
//! own queue leaves out.
#![allow(
    unsafe_code,
    reason = "device registers, and memory that devices write"
)]

use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::vec::Vec;
use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport as _};
use virtio_drivers::{BufferDirection, Error, Hal, PAGE_SIZE, PhysAddr};

use super::boot::Boot;
use super::{memory, serial};
use crate::mmio::{IGNORED, Window, windows};

/// The registers of a device.
pub type Transport = MmioTransport<'static>;

/// Feature bits that all devices share (virtio 1.2, 6).
pub mod feature {
    /// A request may be one descriptor that points to a table of others.
    pub const INDIRECT: u64 = 1 << 28;
    /// Each side says at which request it wants to be told next.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.
    pub const VERSION_1: u64 = 1 << 32;
}

/// A device that was found.
pub struct Device {
    /// Its registers.
    pub transport: Transport,
    /// Where they are, and its interrupt.
    pub window: Window,
}

/// The devices of these types that the command line names, in its order. One that can't be one is told
/// and left alone; the types that nobody asks for are passed over.
pub fn devices(boot: &Boot, wanted: &[DeviceType]) -> Vec<Device> {
    let mut found = Vec::new();
    for word in windows(boot.command_line()) {
        let ignore = |reason: &dyn fmt::Display| {
            serial::line(&format_args!("{IGNORED}{}: {reason}", Word(word)));
        };
        let Ok(window) = word else {
            ignore(&"no size@base:irq");
            continue;
        };
        if let Err(reason) = check(boot, window) {
            ignore(&reason);
            continue;
        }
        match probe(window) {
            Ok(transport) if wanted.contains(&transport.device_type()) => {
                found.push(Device { transport, window });
            }
            // Dropped it would be reset, and it may be another driver's.
            Ok(other) => core::mem::forget(other),
            Err(reason) => ignore(&reason),
        }
    }
    found
}

struct Word<'a>(Result<Window, &'a str>);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok(window) => window.fmt(f),
            Err(word) => f.write_str(word),
        }
    }
}

/// Whether there may be registers there.
fn check(boot: &Boot, window: Window) -> Result<(), &'static str> {
    let (base, size) = (window.base.0, window.size.0);
    let Some(end) = base.checked_add(size) else {
        return Err("beyond all addresses");
    };
    if size <= 0x100 || !base.is_multiple_of(4) {
        return Err("too small or not aligned");
    }
    if !memory::is_device(base) || !memory::is_device(end - 1) {
        return Err("not in the GiB of devices");
    }
    let is_ram = boot.memory().iter().any(|region| {
        region.is_ram() && region.base < end && base < region.base.saturating_add(region.size)
    });
    if is_ram {
        return Err("in RAM");
    }
    if window.irq > 23 {
        return Err("no such pin of the I/O APIC");
    }
    Ok(())
}

fn probe(window: Window) -> Result<Transport, &'static str> {
    let header = NonNull::new(window.base.0 as *mut VirtIOHeader).ok_or("at address 0")?;
    // SAFETY: `check` has made sure of the place: mapped, no RAM, nobody else's. If there is no
    // device the magic number is not there.
    let transport = unsafe { MmioTransport::new(header, window.size.0 as usize) };
    let transport = transport.map_err(|_| "no virtio device there")?;
    if transport.requires_legacy_layout() {
        // Dropped it is reset: nobody can use it.
        return Err("a device of before virtio 1");
    }
    Ok(transport)
}

/// Resets a device and agrees on features: those of `wanted` that it has.
///
/// # Errors
/// If it is not of virtio 1, or refuses.
pub fn negotiate(transport: &mut Transport, wanted: u64) -> Result<u64, &'static str> {
    let begun = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    transport.set_status(DeviceStatus::empty());
    while !transport.get_status().is_empty() {
        core::hint::spin_loop();
    }
    transport.set_status(DeviceStatus::ACKNOWLEDGE);
    transport.set_status(begun);
    let features = transport.read_device_features() & (wanted | feature::VERSION_1);
    if features & feature::VERSION_1 == 0 {
        return Err("the device doesn't offer VIRTIO_F_VERSION_1");
    }
    transport.write_driver_features(features);
    transport.set_status(begun | DeviceStatus::FEATURES_OK);
    if !transport.get_status().contains(DeviceStatus::FEATURES_OK) {
        return Err("the device refuses the features it offered");
    }
    Ok(features)
}

/// Lowers a device's interrupt line; whether its configuration has changed. What the device sets
/// between the look and the acknowledgement would keep the line high, and an edge-triggered
/// interrupt would never come again: so it is looked at until nothing is left.
pub fn acknowledge(transport: &mut Transport) -> bool {
    const TRIES: u32 = 16;
    let mut changed = false;
    for _ in 0..TRIES {
        let status = transport.ack_interrupt();
        if status.is_empty() {
            break;
        }
        changed |= status.contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT);
    }
    changed
}

/// Memory that devices use: their addresses are the guest's.
pub struct Identity;

fn pages(count: usize) -> Option<Layout> {
    let bytes = count.checked_mul(PAGE_SIZE).filter(|&bytes| bytes > 0)?;
    Layout::from_size_align(bytes, PAGE_SIZE).ok()
}

// SAFETY: memory of the allocator, zeroed, aligned, and nobody else's.
unsafe impl Hal for Identity {
    fn dma_alloc(count: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the layout is not empty.
        let memory = pages(count).map(|layout| unsafe { alloc_zeroed(layout) });
        match memory.and_then(NonNull::new) {
            Some(memory) => (memory.as_ptr() as u64, memory),
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_: PhysAddr, memory: NonNull<u8>, count: usize) -> i32 {
        if let Some(layout) = pages(count) {
            // SAFETY: `dma_alloc` has allocated it so.
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// Descriptors of a queue, if nothing else is said, and so its largest number of requests.
pub const DESCRIPTORS: usize = 128;

/// A queue.
pub struct Queue<const N: usize = DESCRIPTORS> {
    ring: VirtQueue<Identity, N>,
    index: u16,
    added: u16,
    notified: u16,
}

impl<const N: usize> Queue<N> {
    /// Sets a queue up, before `finish_init`.
    ///
    /// # Errors
    /// If the device has no such queue, or a smaller one.
    pub fn new(transport: &mut Transport, index: u16, features: u64) -> Result<Self, Error> {
        let indirect = features & feature::INDIRECT != 0;
        let event_idx = features & feature::EVENT_IDX != 0;
        Ok(Self {
            ring: VirtQueue::new(transport, index, indirect, event_idx)?,
            index,
            added: 0,
            notified: 0,
        })
    }

    /// Puts a request into the queue, of which [`Queue::notify`] tells the device. The token comes
    /// back when it is done; `None` if there is no room.
    ///
    /// # Safety
    /// The buffers must stay, and only the device may use them, until `take` has given the token.
    pub unsafe fn add<'b>(
        &mut self,
        inputs: &[&'b [u8]],
        outputs: &mut [&'b mut [u8]],
    ) -> Option<u16> {
        // SAFETY: the caller vouches for the buffers.
        let token = unsafe { self.ring.add(inputs, outputs) }.ok()?;
        self.added = self.added.wrapping_add(1);
        Some(token)
    }

    /// Tells the device about what was added, if it wants to know; whether it was told.
    pub fn notify(&mut self, transport: &mut Transport) -> bool {
        if self.added == self.notified {
            return false;
        }
        self.notified = self.added;
        // The device must see the request before the guest looks whether it wants to be told
        // (virtio 1.2, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        // The crate compares the indices as if they never wrapped: right after they did, it may
        // take a device that waits for one that doesn't.
        let wrapped = usize::from(self.added) <= N;
        let wanted = wrapped || self.ring.should_notify();
        if wanted {
            transport.notify(self.index);
        }
        wanted
    }

    /// The token of a request that is done; it stays until it is taken.
    #[must_use]
    pub fn done(&self) -> Option<u16> {
        self.ring.peek_used().or_else(|| {
            // The device must see what was taken last before the guest looks for the last time: or
            // it would see no reason for an interrupt.
            fence(Ordering::SeqCst);
            self.ring.peek_used()
        })
    }

    /// Takes a request that is done: how many bytes the device says it wrote.
    ///
    /// # Safety
    /// The buffers must be those of `add`.
    ///
    /// # Errors
    /// If another request is next, or none.
    pub unsafe fn take<'a>(
        &mut self,
        token: u16,
        inputs: &'a [&'a [u8]],
        outputs: &'a mut [&'a mut [u8]],
    ) -> Result<u32, Error> {
        // SAFETY: the caller vouches for the buffers.
        unsafe { self.ring.pop_used(token, inputs, outputs) }
    }

    /// Asks for interrupts, or for none (which needs a queue without EVENT_IDX).
    pub fn want_interrupts(&mut self, wanted: bool) {
        self.ring.set_dev_notify(wanted);
    }
}
