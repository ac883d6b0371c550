//! A working directory that has been deleted.
//!
//! libtorch's MKL, when it is loaded, ends the process where there is no working directory, and blames one of its own
//! files. Libraries are set up before `main`; what stands in the executable's `.preinit_array` runs before them.

/// What the dynamic linker calls first.
#[used]
// SAFETY: the section holds pointers to functions of this type, which glibc calls in the executable once, before the
// libraries' own; it ignores the arguments that it passes.
#[unsafe(link_section = ".preinit_array")]
static CHECK: extern "C" fn() = check;

/// Ends the process with a message where the working directory is gone.
extern "C" fn check() {
    const MESSAGE: &str = "bbt: the working directory has been deleted: change to one that is there\n";
    let mut path = [0; libc::PATH_MAX as usize];
    // SAFETY: getcwd writes into the buffer up to its length; errno is this thread's own; write reads the message and
    // its length; _exit never returns. None of them needs what a library sets up.
    unsafe {
        if libc::getcwd(path.as_mut_ptr(), path.len()).is_null() && *libc::__errno_location() == libc::ENOENT {
            libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(1);
        }
    }
}
