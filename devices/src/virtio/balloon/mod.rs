//! The memory balloon (section 5.5): the guest gives memory back to the host, when it is asked to,
//! and when it doesn't need it anyway.
//!
//! - *Inflating*: the driver names pages that it has taken from its kernel; they are
//!   [dropped](discard). It does so until it has reached the target, which the host's user sets.
//! - *Reporting*: the driver names free pages as they become free. They are dropped before the
//!   buffer is given back, and only then may the guest use them.
//! - *Hinting*: asked at the beginning of a migration, the driver names free pages, so that they
//!   need not be sent: see [`hints`]. They are not dropped.
//! - *Statistics*: the driver hands over figures with a buffer, which the device keeps until
//!   somebody wants newer ones.
//!
//! What a dropped page holds then: zeroes. A page in the balloon has no contents that the guest
//! could rely on. A reported page may be expected to hold what the guest's kernel fills free
//! pages with (VIRTIO_BALLOON_F_PAGE_POISON): if that is anything but zeroes, nothing is dropped.
//!
//! In a migration dropped pages are pages that were written: they become zero at the destination
//! as well, also one that was sent before. It would be allowed to leave the old contents there,
//! but a page whose contents change while it is sent fails its checksum, so that the engine must
//! learn of the change in any case.

mod discard;
pub mod hints;
mod saved;
mod server;
mod space;
mod stats;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};

use serde::{Deserialize, Serialize};

use super::activation::Activation;
use super::notifier::Notifier;
use super::worker::Worker;
use super::{DeviceKind, VirtioDevice, read_config_bytes};
use crate::state::SaveRestore;
use hints::{FreePages, Hints};
use server::Server;
use space::Space;
pub use stats::GuestStats;

const NAME: &str = "virtio-balloon";

/// VIRTIO_BALLOON_F_STATS_VQ.
const F_STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: a guest that runs out of memory may take pages back.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_FREE_PAGE_HINT.
const F_FREE_PAGE_HINT: u64 = 1 << 3;
/// VIRTIO_BALLOON_F_PAGE_POISON.
const F_PAGE_POISON: u64 = 1 << 4;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const F_PAGE_REPORTING: u64 = 1 << 5;

/// The unit of the balloon, in bytes, whatever the guest's own pages are.
pub const PAGE: u64 = 4096;

const QUEUES: usize = 5;
const QUEUE_SIZE: u16 = 128;

/// What a balloon offers its guest beside being inflated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Free pages are dropped as the guest reports them.
    pub free_page_reporting: bool,
    /// Free pages are left out of a migration.
    pub free_page_hint: bool,
    /// A guest that runs out of memory may take pages back.
    pub deflate_on_oom: bool,
}

/// As on QEMU's command line: `free-page-reporting=on,…`.
impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |on| if on { "on" } else { "off" };
        write!(
            f,
            "free-page-reporting={},free-page-hint={},deflate-on-oom={}",
            on(self.free_page_reporting),
            on(self.free_page_hint),
            on(self.deflate_on_oom)
        )
    }
}

/// What is called when the guest has changed the balloon's size.
pub type OnChange = Box<dyn Fn() + Send + Sync>;

/// A memory balloon.
pub struct Balloon {
    worker: Worker,
    features: u64,
    shared: Arc<Shared>,
    /// While a driver is there.
    activation: Mutex<Option<Arc<Activation>>>,
    on_change: Mutex<Option<OnChange>>,
}

/// What the device's thread shares with the vCPUs and the commands.
#[derive(Debug)]
struct Shared {
    /// The guest's RAM, in balloon pages.
    ram_pages: u64,
    space: Mutex<Space>,
    stats: Mutex<Option<GuestStats>>,
    stats_wanted: AtomicBool,
    hints: Mutex<Hints>,
    /// Wakes the thread when statistics are wanted.
    wake: Notifier,
}

impl Shared {
    fn space(&self) -> MutexGuard<'_, Space> {
        lock(&self.space)
    }

    /// Whether the guest expects free pages to hold something else than zeroes.
    fn poisons(&self, activation: &Activation) -> bool {
        activation.has(F_PAGE_POISON) && self.space().poison != 0
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Balloon {
    /// An empty balloon for a guest with `ram` bytes of RAM.
    pub fn new(options: Options, ram: u64) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            ram_pages: ram / PAGE,
            space: Mutex::default(),
            stats: Mutex::default(),
            stats_wanted: AtomicBool::new(false),
            hints: Mutex::default(),
            wake: Notifier::new()?,
        });
        let Options {
            free_page_reporting,
            free_page_hint,
            deflate_on_oom,
        } = options;
        let features = [
            (true, F_STATS_VQ | F_PAGE_POISON),
            (free_page_reporting, F_PAGE_REPORTING),
            (free_page_hint, F_FREE_PAGE_HINT),
            (deflate_on_oom, F_DEFLATE_ON_OOM),
        ];
        let queues: Vec<usize> = (0..QUEUES).collect();
        Ok(Self {
            worker: Worker::spawn(NAME, &queues, Server::new(Arc::clone(&shared)))?,
            features: features
                .iter()
                .filter(|(offered, _)| *offered)
                .fold(0, |all, (_, bits)| all | bits),
            shared,
            activation: Mutex::default(),
            on_change: Mutex::default(),
        })
    }

    /// Asks the guest to inflate or deflate the balloon until `bytes` of RAM are left to it: at
    /// most what it has, and rounded to whole pages. It does so when it can.
    pub fn set_target(&self, bytes: u64) {
        let left = (bytes / PAGE).min(self.shared.ram_pages);
        let pages = u32::try_from(self.shared.ram_pages - left).unwrap_or(u32::MAX);
        {
            let mut space = self.shared.space();
            if space.target == pages {
                return;
            }
            space.target = pages;
        }
        self.config_changed();
    }

    /// The RAM that the guest has with the balloon as it is, in bytes.
    pub fn actual(&self) -> u64 {
        let inside = u64::from(self.shared.space().actual);
        self.shared.ram_pages.saturating_sub(inside) * PAGE
    }

    /// What the guest has told of its memory last; `None` as long as it has not. Asks it for new
    /// figures, which a later call returns.
    pub fn guest_stats(&self) -> Option<GuestStats> {
        self.shared.stats_wanted.store(true, Ordering::SeqCst);
        self.shared.wake.notify();
        *lock(&self.shared.stats)
    }

    /// Sets what is called when the guest has changed the balloon's size: on a vCPU's thread, so
    /// it must be quick.
    pub fn on_change(&self, on_change: OnChange) {
        *lock(&self.on_change) = Some(on_change);
    }

    /// Whether the guest can be asked for free pages. It can't if its driver doesn't know that,
    /// or fills free pages with something that the destination's must hold as well.
    pub fn gives_hints(&self) -> bool {
        lock(&self.activation).as_ref().is_some_and(|activation| {
            activation.has(F_FREE_PAGE_HINT) && !self.shared.poisons(activation)
        })
    }

    /// Asks the guest for free pages; false if it [gives none](Self::gives_hints). See [`hints`]
    /// for what must be done before.
    pub fn start_hints(&self) -> bool {
        let gives = self.gives_hints();
        if gives {
            let mut hints = lock(&self.shared.hints);
            self.shared.space().hint_command = hints.begin(self.shared.ram_pages * PAGE);
            drop(hints);
            self.config_changed();
        }
        gives
    }

    /// The pages that the guest has named since the last call: each was free at some time after
    /// the [start](Self::start_hints), and may be in use again.
    pub fn take_hints(&self) -> Vec<FreePages> {
        lock(&self.shared.hints).take()
    }

    /// Ends the asking: what the guest names from here on is not listened to.
    pub fn stop_hints(&self) {
        if lock(&self.shared.hints).end() {
            self.shared.space().hint_command = hints::DONE;
            self.config_changed();
        }
    }

    fn config_changed(&self) {
        if let Some(activation) = &*lock(&self.activation) {
            activation.interrupt().config_changed();
        }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn name(&self) -> &str {
        NAME
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.space().to_bytes(), offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let changed = {
            let mut space = self.shared.space();
            let before = space.actual;
            space.write(offset, data, self.shared.ram_pages);
            space.actual != before
        };
        if changed && let Some(on_change) = &*lock(&self.on_change) {
            on_change();
        }
    }

    fn activate(&self, activation: Arc<Activation>) {
        *lock(&self.activation) = Some(Arc::clone(&activation));
        self.worker.activate(activation);
    }

    fn reset(&self) {
        *lock(&self.activation) = None;
        self.worker.deactivate();
        // Whatever was in the balloon is the guest's again. The target is the host's.
        self.shared.space().reset();
        lock(&self.shared.hints).end();
        *lock(&self.shared.stats) = None;
    }

    fn saved_state(&self) -> Option<&dyn SaveRestore> {
        Some(self)
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}
