//! Leaving the process while libtorch computes.

/// Ends the process now, with `status`, from any thread.
///
/// `std::process::exit` would run libtorch's static destructors while other threads still compute, which often
/// crashes.
pub fn exit_at_once(status: i32) -> ! {
    // SAFETY: _exit takes any status and never returns; nothing is unwound or destroyed.
    unsafe { libc::_exit(status) }
}
