//! How many packets went which way.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts packets.
#[derive(Debug, Default)]
pub(super) struct Counters {
    received: AtomicU64,
    receive_dropped: AtomicU64,
    sent: AtomicU64,
    send_dropped: AtomicU64,
}

/// How many packets went which way since the device was made here, as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketCounts {
    /// To the guest.
    pub received: u64,
    /// That the guest had no room for, or came while the link was down.
    pub receive_dropped: u64,
    /// By the guest.
    pub sent: u64,
    /// That were malformed, or given while the link or the tap was down.
    pub send_dropped: u64,
}

impl Counters {
    pub(super) fn received(&self) {
        self.received.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn receive_dropped(&self) {
        self.receive_dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn sent(&self) {
        self.sent.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn send_dropped(&self) {
        self.send_dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn now(&self) -> PacketCounts {
        PacketCounts {
            received: self.received.load(Ordering::Relaxed),
            receive_dropped: self.receive_dropped.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
            send_dropped: self.send_dropped.load(Ordering::Relaxed),
        }
    }
}
