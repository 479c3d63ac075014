//! How urgent the engine's threads are to the host's scheduler.

/// Of a thread that brings what a vCPU waits for. See setpriority(2).
const URGENT: i32 = -10;

/// Has the calling thread go first, if the process may do so (`CAP_SYS_NICE`).
pub(crate) fn urgent() {
    // Without a process it is about the calling thread, on Linux.
    if let Err(error) = rustix::process::setpriority_process(None, URGENT) {
        tracing::debug!(URGENT, "the thread's priority stays as it is: {error}");
    }
}
