//! Getting all of guest memory before the guest is there, so that none is missing later.

use std::num::NonZero;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use migration::layout::GuestRam;
use rustix::io::Errno;
use vm_memory::GuestMemoryBackend;

use super::{MemoryError, advice, meminfo};

/// What a thread takes at a time, in bytes.
const PIECE: usize = 1 << 30;

/// The same, of memory that has not one piece for each thread.
const SMALL_PIECE: usize = 64 << 20;

/// Populates all of it, on as many threads as there are CPUs. `from_host`: it is taken from what
/// the host has available.
pub(super) fn populate(ram: &GuestRam, from_host: bool) -> Result<(), MemoryError> {
    let since = Instant::now();
    let bytes = ram.iter().map(|region| region.size() as u64).sum();
    // Otherwise the kernel would begin to end processes.
    if from_host
        && let Some(available) = meminfo("MemAvailable").filter(|&available| available < bytes)
    {
        return Err(MemoryError::NotAvailable { bytes, available });
    }
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let piece = match bytes / PIECE as u64 {
        pieces if pieces >= cpus as u64 => PIECE,
        _ => SMALL_PIECE,
    };
    let pieces: Vec<_> = ram
        .iter()
        .flat_map(|region| {
            let offsets = (0..region.size()).step_by(piece);
            offsets.map(move |offset| (region, offset, piece.min(region.size() - offset)))
        })
        .collect();
    let threads = cpus.min(pieces.len()).max(1);
    let pieces = Mutex::new(pieces.into_iter());
    let next = || pieces.lock().ok()?.next();
    let work = || -> Result<(), Errno> {
        while let Some((region, offset, len)) = next() {
            advice::populate(region, offset, len)?;
        }
        Ok(())
    };
    let result = thread::scope(|scope| {
        // This thread is one of them.
        let others: Vec<_> = (1..threads)
            .filter_map(|_| {
                let thread = thread::Builder::new().name("prealloc".to_owned());
                thread.spawn_scoped(scope, work).ok()
            })
            .collect();
        let mine = work();
        others.into_iter().fold(mine, |result, thread| {
            result.and(thread.join().unwrap_or(Err(Errno::FAULT)))
        })
    });
    result.map_err(|errno| MemoryError::Populate {
        bytes,
        error: errno.into(),
    })?;
    tracing::info!(bytes, threads, elapsed = ?since.elapsed(), "guest memory is allocated");
    Ok(())
}
