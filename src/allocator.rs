//! The program's memory allocator, libtorch's included: jemalloc, which keeps what is freed for the next step.
//!
//! A step allocates and frees the same large tensors as the last. glibc gives such blocks back to the system, which has
//! to clear every page of the next one, and fragments besides (`docs/measurements.md`).

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What jemalloc reads when it starts: freed pages are kept, and may be huge ones. `MALLOC_CONF` in the environment
/// overrides it.
// SAFETY: jemalloc declares `const char *malloc_conf`, which this is: a pointer to a string that ends with NUL.
#[unsafe(no_mangle)]
#[used]
pub static malloc_conf: &std::ffi::c_char = {
    const SETTINGS: &std::ffi::CStr = c"thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1";
    // SAFETY: a pointer to the first byte of a constant.
    unsafe { &*SETTINGS.as_ptr() }
};
