//! Getting a thread out of KVM_RUN without a race.
//!
//! The kick is a signal. Its handler sets `immediate_exit` in the `kvm_run` of the thread that it
//! runs on, so it works wherever the thread is: in KVM_RUN, the signal itself interrupts it; just
//! before, KVM_RUN sees `immediate_exit` and returns at once. The thread clears `immediate_exit`
//! after each exit and only then looks whether a pause is asked for, while the one who asks sets
//! the request first and kicks second: of the two, one always sees the other.

#![allow(
    unsafe_code,
    reason = "a signal handler, and a byte that it shares with its thread"
)]

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use rustix::thread::gettid;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

thread_local! {
    // Const-initialised and without a destructor: reading it in a signal handler neither
    // allocates nor registers anything.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: not null only while this thread's `Kickable` lives, which borrows the vCPU.
        unsafe { (*flag).store(1, Ordering::SeqCst) };
    }
}

/// Installs the handler, once in the process. The signal is the first real-time signal that libc
/// leaves free.
pub(super) fn install() -> Result<(), io::Error> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| error.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// The current thread, ready to be kicked out of a vCPU.
pub(super) struct Kickable {
    flag: *const AtomicU8,
    // The flag in the thread-local must be reset by the same thread.
    not_send: PhantomData<*const ()>,
}

impl Kickable {
    /// Prepares the thread. The vCPU's descriptor must live longer than the result.
    pub(super) fn new(vcpu: &mut VcpuFd) -> Result<Self, io::Error> {
        let byte: *mut u8 = &raw mut vcpu.get_kvm_run().immediate_exit;
        let flag: *const AtomicU8 = byte.cast();
        IMMEDIATE_EXIT.set(flag);
        let this = Self {
            flag,
            not_send: PhantomData,
        };
        // The thread inherits its mask from the one that started it.
        unblock_signal(SIGRTMIN()).map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(this)
    }

    /// Whether the next KVM_RUN returns at once, but for finishing the access that the vCPU left
    /// the guest for.
    pub(super) fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the mapping of kvm_run lives as long as the vCPU, which outlives `self`.
        unsafe { (*self.flag).store(u8::from(on), Ordering::SeqCst) };
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}

/// A timer that kicks the thread that has made it.
pub(super) struct KickTimer {
    timer: libc::timer_t,
    // It kicks the thread that it was made on.
    not_send: PhantomData<*const ()>,
}

impl KickTimer {
    pub(super) fn new() -> Result<Self, io::Error> {
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: all zeroes is a value of this C structure.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN();
        event.sigev_notify_thread_id = gettid().as_raw_nonzero().get();
        // SAFETY: both pointers are to locals of the right type.
        let result = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            timer,
            not_send: PhantomData,
        })
    }

    /// Kicks once, after that time; what was started before is forgotten.
    pub(super) fn start(&self, after: Duration) -> Result<(), io::Error> {
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = libc::itimerspec {
            it_interval: none,
            it_value: libc::timespec {
                tv_sec: after.as_secs() as libc::time_t,
                // All zeroes would stop it.
                tv_nsec: libc::c_long::from(after.subsec_nanos()).max(1),
            },
        };
        // SAFETY: the timer exists until `self` is dropped; the value is a local.
        let result = unsafe { libc::timer_settime(self.timer, 0, &value, ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: the timer exists, and nobody uses it afterwards. A kick that is under way finds
        // the thread, as `self` never leaves it.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// Kicks a thread. Nothing happens to one that isn't [`Kickable`] any more.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the handle has not been joined (joining consumes it), so the thread's id is valid
    // even if the thread has ended.
    let result = unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
    if result != 0 && result != libc::ESRCH {
        tracing::error!(
            error = %io::Error::from_raw_os_error(result),
            "cannot signal a vCPU thread"
        );
    }
}
