//! An allocator that ends the process when an input makes it hold too much, and the file that readers of files are given.
//!
//! The C decoders (lzma, zstd) have an allocator of their own: their windows are bounded by the code, and libFuzzer's
//! `-rss_limit_mb` and `-malloc_limit_mb` see them.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The most that anything may hold on the heap, in bytes.
pub const CAP: usize = 1 << 30;

static HELD: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(CAP);

/// Counts what is held, and aborts above the limit.
pub struct Capped;

#[global_allocator]
static ALLOCATOR: Capped = Capped;

fn more(size: usize) {
    let held = HELD.fetch_add(size, Relaxed) + size;
    let limit = LIMIT.load(Relaxed);
    if held > limit {
        // What the message itself needs must not come here again.
        LIMIT.store(usize::MAX, Relaxed);
        eprintln!("an allocation of {size} bytes makes {held}: over the limit of {limit}");
        std::process::abort();
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Capped {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The difference alone: a large block grows in place.
        match size.checked_sub(layout.size()) {
            Some(growth) => more(growth),
            None => drop(HELD.fetch_sub(layout.size() - size, Relaxed)),
        }
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Runs `work`, which may hold at most `bytes` more than is held now.
pub fn within<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    let before = LIMIT.swap(HELD.load(Relaxed).saturating_add(bytes).min(CAP), Relaxed);
    let result = work();
    LIMIT.store(before, Relaxed);
    result
}

/// Writes `bytes` to a file of this process, in memory where there is such a place, and gives its path to `work`.
pub fn with_file<T>(bytes: &[u8], work: impl FnOnce(&Path) -> T) -> T {
    let shm = Path::new("/dev/shm");
    let folder = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
    let path: PathBuf = folder.join(format!("fairway-fuzz-{}", std::process::id()));
    let written = File::create(&path).and_then(|mut file| file.write_all(bytes));
    written.expect("a place for the input");
    let result = work(&path);
    let _ = std::fs::remove_file(&path);
    result
}
