//! A destination whose memory is locked.
#![allow(unsafe_code, reason = "mlock, which no safe interface offers")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use migration::layout::{GuestRam, PAGE_SIZE};
use migration::source::{Guest, Outcome};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{Moving, at_once, busy, require_userfault};

/// A page in the middle of the last region.
fn lock_a_page(ram: &GuestRam) -> bool {
    let page = ram.get_host_address(GuestAddress((1 << 32) + 7 * PAGE_SIZE));
    // SAFETY: a page of the test's own memory; locking it changes no contents.
    unsafe { libc::mlock(page.unwrap().cast(), PAGE_SIZE as usize) == 0 }
}

#[test]
fn locked_memory_is_refused_before_any_page_moves() {
    require_userfault!();
    let locked = Arc::new(AtomicBool::new(false));
    let lock = {
        let locked = Arc::clone(&locked);
        move |ram: &GuestRam| locked.store(lock_a_page(ram), Ordering::SeqCst)
    };
    let mut moving = Moving::begin_via(
        busy(4096),
        None,
        |job, _| at_once(job),
        |there| there.on_prepare = Some(Box::new(lock)),
    );
    moving.settle();
    if !locked.load(Ordering::SeqCst) {
        return guest_tests::driver::skip("cannot lock a page of memory (ulimit -l)");
    }
    let transferred = moving.left.snapshot().bytes;
    let (vm, outcome) = moving.source.join().unwrap();
    let (there, arrival) = moving.arriving.join().unwrap();
    let reason = arrival.unwrap_err().to_string();
    for part in ["0x100000000", "locked", "postcopy-ram"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
    assert!(
        matches!(
            outcome,
            Outcome::Failed {
                guest: Guest::Untouched,
                ..
            }
        ),
        "{outcome:?}"
    );
    assert!(format!("{outcome:?}").contains("locked"), "{outcome:?}");
    assert!(vm.is_running() && !there.ran.load(Ordering::SeqCst));
    assert_eq!(
        (transferred.pages, transferred.zero, transferred.state),
        (0, 0, 0)
    );
}
