//! The allocator of this test program: it counts what each thread asks for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
    static TOTAL: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has dropped its cells; what it still asks for is not counted.
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        let _ = TOTAL.try_with(|total| total.set(total.get().saturating_add(layout.size())));
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Sets the counts of this thread to zero.
pub fn reset() {
    LARGEST.set(0);
    TOTAL.set(0);
}

/// The largest single request of this thread since [`reset`], in bytes.
pub fn largest() -> usize {
    LARGEST.get()
}

/// All that this thread asked for since [`reset`], in bytes.
pub fn total() -> usize {
    TOTAL.get()
}
