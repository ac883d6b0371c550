//! Leaving the process while libtorch computes.

/// Ends the process now, with `status`, from any thread.
///
/// `std::process::exit` would run libtorch's static destructors under the threads that still compute, which
/// ends in a crash as often as not.
pub fn exit_at_once(status: i32) -> ! {
    // SAFETY: _exit takes any status and never returns; nothing is unwound or destroyed.
    unsafe { libc::_exit(status) }
}
