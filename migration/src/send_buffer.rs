//! How much of what is sent may wait in the kernel.
//!
//! The kernel grows the buffer of a connection up to what tcp_wmem allows, 4 MiB as a rule. On a
//! short link less is enough to keep it busy, and better: what waits no longer than it stays in the
//! processor's caches costs a fifth less to send and to receive (docs/performance.md), and what is sent last
//! has less to wait for.

use std::fs;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::net::sockopt;

/// No buffer is smaller: 1 MiB.
const LEAST: u64 = 1 << 20;

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

/// Bounds the buffer of a TCP connection with that round trip if that helps.
pub(crate) fn fit(socket: BorrowedFd<'_>, round_trip: Duration) {
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
    fn a_buffer_that_would_slow_the_link_down_is_left_alone() {
        let allowed = |us| allowed(DEFAULT_LIMIT, Duration::from_micros(us));
        assert_eq!(allowed(60), Some(2 * DEFAULT_LIMIT));
        assert_eq!(allowed(200), None);
    }
}
