//! How much of what is sent may wait in the kernel.
//!
//! The kernel grows the buffer of a connection up to what tcp_wmem allows, 4 MiB as a rule. On a
//! short and fast link less is enough to keep it busy, and better: what waits no longer than it stays
//! in the processor's caches costs a fifth less to send and to receive (docs/performance.md), and what is
//! sent last has less to wait for. On a slow one a large buffer keeps the link busy while the sender
//! waits for a CPU.

use std::fs;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::net::sockopt;

/// No buffer is smaller: 1 MiB.
const LEAST: u64 = 1 << 20;

/// After so many bytes it is clear whether the link is fast.
const SAMPLE: u64 = 16 << 20;

/// A fast link takes so many bytes a second: most of 10 Gbit/s.
const FAST: f64 = 800e6;

/// What the kernel goes up to by itself; from there on it does better.
const MOST: u64 = 4 << 20;

/// No connection is faster, in bytes a second.
const FASTEST: f64 = 4e9;

/// What `net.core.wmem_max` is if nobody has changed it.
const DEFAULT_LIMIT: u64 = 212_992;

/// How large it is to be on a link with that round trip; `None` if that is the kernel's to say.
fn size(round_trip: Duration) -> Option<u64> {
    let needed = (2.0 * round_trip.as_secs_f64() * FASTEST) as u64;
    (needed <= MOST).then_some(needed.max(LEAST))
}

/// What this process gets without privileges: enough for that round trip, or nothing.
fn allowed(limit: u64, round_trip: Duration) -> Option<u64> {
    // The kernel doubles what is asked for, to have room for its own.
    let allowed = 2 * limit;
    (allowed as f64 >= round_trip.as_secs_f64() * FASTEST).then_some(allowed)
}

/// Finds out whether the buffer is better bounded.
#[derive(Debug)]
pub(crate) struct SendBuffer {
    round_trip: Duration,
    bytes: u64,
    sending: Duration,
}

impl SendBuffer {
    /// For a connection with that round trip.
    pub(crate) fn new(round_trip: Duration) -> Self {
        Self {
            round_trip,
            bytes: 0,
            sending: Duration::ZERO,
        }
    }

    /// Sending so many bytes took so long. Says when it has found out, and has bounded the buffer
    /// if that is better.
    pub(crate) fn sent(&mut self, socket: BorrowedFd<'_>, bytes: u64, took: Duration) -> bool {
        self.bytes += bytes;
        self.sending += took;
        if self.bytes < SAMPLE {
            return false;
        }
        if self.is_fast() {
            fit(socket, self.round_trip);
        }
        true
    }

    fn is_fast(&self) -> bool {
        self.bytes as f64 >= FAST * self.sending.as_secs_f64()
    }
}

/// Bounds the buffer of a TCP connection with that round trip if that helps.
fn fit(socket: BorrowedFd<'_>, round_trip: Duration) {
    let Some(size) = size(round_trip) else {
        return;
    };
    if sockopt::set_socket_send_buffer_size_force(socket, (size / 2) as usize).is_ok() {
        return;
    }
    let limit = fs::read_to_string("/proc/sys/net/core/wmem_max");
    let limit = limit.ok().and_then(|limit| limit.trim().parse().ok());
    if let Some(allowed) = allowed(limit.unwrap_or(DEFAULT_LIMIT), round_trip) {
        // Else it stays as it is.
        let _ = sockopt::set_socket_send_buffer_size(socket, (size.min(allowed) / 2) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_links_get_a_small_buffer_and_long_ones_the_kernels() {
        let size = |us| size(Duration::from_micros(us));
        assert_eq!(size(50), Some(LEAST));
        assert_eq!(size(300), Some(2_400_000));
        assert_eq!(size(1000), None);
    }

    #[test]
    fn only_a_fast_link_is_better_off() {
        let after = |rate: f64| SendBuffer {
            round_trip: Duration::ZERO,
            bytes: SAMPLE,
            sending: Duration::from_secs_f64(SAMPLE as f64 / rate),
        };
        assert!(after(1.1e9).is_fast());
        assert!(!after(1.6e8).is_fast());
    }

    #[test]
    fn a_buffer_that_would_slow_the_link_down_is_left_alone() {
        let allowed = |us| allowed(DEFAULT_LIMIT, Duration::from_micros(us));
        assert_eq!(allowed(60), Some(2 * DEFAULT_LIMIT));
        assert_eq!(allowed(200), None);
    }
}
