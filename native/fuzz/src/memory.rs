// SPDX-License-Identifier: Apache-2.0
//! An allocator that counts what is held, so that a target can say what an input may make the code
//! hold: `LIMIT` bytes beyond the caches, whatever a header claims.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What opening, checking or serving may hold beyond its caches.
pub const LIMIT: usize = 64 << 20;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
pub struct Counting;

fn add(len: usize) {
    let held = HELD.fetch_add(len, Relaxed) + len;
    PEAK.fetch_max(held, Relaxed);
}

// SAFETY: every call goes on to the system's allocator as it came; only numbers are kept here.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        // While it is moved, both are there.
        add(len);
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(place, layout, len) }
    }
}

/// Run `body`; the most that was held at once above what was held before must be within `limit`.
pub fn bounded<T>(what: &str, limit: usize, body: impl FnOnce() -> T) -> T {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = body();
    let peak = PEAK.load(Relaxed).saturating_sub(before);
    assert!(
        peak <= limit,
        "{what} held {peak} bytes at once, {limit} are allowed"
    );
    result
}
