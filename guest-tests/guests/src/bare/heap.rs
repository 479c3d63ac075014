//! Memory for the guests that allocate, and for their devices: all that is free, in pieces of
//! powers of two, each aligned to its size. Physical and virtual addresses are the same.
#![allow(unsafe_code, reason = "an allocator")]

use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::cell::UnsafeCell;
use core::ptr::null_mut;

use super::boot::Boot;
use super::memory;

/// log2 of the smallest piece: a pointer to the next free one fits.
const SMALLEST: usize = 4;
/// Sizes: the largest is 8 GiB.
const SIZES: usize = 30;
const RANGES: usize = 8;

struct Heap {
    /// What was never given out: from, to.
    fresh: [(usize, usize); RANGES],
    /// What was freed, by size.
    freed: [*mut u8; SIZES],
}

struct Global(UnsafeCell<Heap>);
// SAFETY: only guests with one vCPU allocate, and no interrupt handler does.
unsafe impl Sync for Global {}

#[global_allocator]
static HEAP: Global = Global(UnsafeCell::new(Heap {
    fresh: [(0, 0); RANGES],
    freed: [null_mut(); SIZES],
}));

/// Bytes of the stack: what allocates also has large things on the stack, and the one in the vCPU's
/// block is not made for that.
const STACK: usize = 1 << 20;

/// Takes all free memory, and goes on with `main` on a large stack. Before it nothing can be
/// allocated.
pub fn start(boot: &Boot, main: extern "C" fn(&Boot) -> !) -> ! {
    initialize(boot);
    let Ok(layout) = Layout::from_size_align(STACK, 4096) else {
        super::give_up(&"a stack of impossible size");
    };
    // SAFETY: the layout is not empty.
    let stack = unsafe { alloc::alloc::alloc_zeroed(layout) };
    if stack.is_null() {
        super::give_up(&"not enough free memory for a stack");
    }
    // SAFETY: the new stack is as large as said and never freed; `call` aligns it as a function
    // expects. `boot` is on the old stack, which stays.
    unsafe {
        asm!(
            "mov rsp, {top}",
            "xor ebp, ebp",
            "call {main}",
            "ud2",
            top = in(reg) stack.add(STACK),
            main = in(reg) main,
            in("rdi") boot,
            options(noreturn),
        )
    }
}

fn initialize(boot: &Boot) {
    // SAFETY: the first vCPU, before anything is allocated.
    let heap = unsafe { &mut *HEAP.0.get() };
    let mut ranges = heap.fresh.iter_mut();
    memory::free(boot, 0, |base, end| {
        if let Some(range) = ranges.next() {
            *range = (base as usize, end as usize);
        }
    });
}

fn size(layout: Layout) -> Option<usize> {
    let bytes = layout.size().max(layout.align()).max(1 << SMALLEST);
    let size = bytes.checked_next_power_of_two()?.ilog2() as usize - SMALLEST;
    (size < SIZES).then_some(size)
}

impl Heap {
    fn fresh(&mut self, size: usize) -> *mut u8 {
        let bytes = 1usize << (size + SMALLEST);
        for (from, to) in &mut self.fresh {
            let base = from.next_multiple_of(bytes);
            if *to >= base && *to - base >= bytes {
                *from = base + bytes;
                return base as *mut u8;
            }
        }
        null_mut()
    }
}

// SAFETY: pieces don't overlap, are as large and as aligned as asked for, and are given out again
// only after they were freed.
unsafe impl GlobalAlloc for Global {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(size) = size(layout) else {
            return null_mut();
        };
        // SAFETY: one vCPU.
        let heap = unsafe { &mut *self.0.get() };
        let first = heap.freed[size];
        if first.is_null() {
            return heap.fresh(size);
        }
        // SAFETY: `dealloc` has put the next one's address there.
        heap.freed[size] = unsafe { first.cast::<*mut u8>().read() };
        first
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let Some(size) = size(layout) else {
            return;
        };
        // SAFETY: one vCPU; the piece is nobody's now, and large enough for a pointer.
        unsafe {
            let heap = &mut *self.0.get();
            pointer.cast::<*mut u8>().write(heap.freed[size]);
            heap.freed[size] = pointer;
        }
    }
}
