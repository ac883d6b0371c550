//! Files as memory, and what happens when one is cut short meanwhile.
//!
//! A page of a mapped file that is no longer there, because the file was truncated or its disk fails, cannot be read: the
//! kernel sends SIGBUS, which ends the process without a word. A handler here says which file it was, and ends the
//! process with status 1.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use memmap2::Mmap;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::atomic::kind_of;
use crate::libtorch::exit_at_once;

/// A file, memory-mapped read-only: pages are read when they are first touched, and the system drops them again when it
/// needs the memory. The file must not be changed while it is mapped; see the module's page for what then happens.
#[derive(Debug)]
pub struct MappedFile {
    // Dropped first: afterwards the addresses may be something else's.
    _named: Named,
    map: Mmap,
}

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// A file that is missing or unreadable; a directory, a pipe or a device, which is said at once: opening it does
    /// not wait for a writer.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() {
            let message = format!("it is {}, not a file: its bytes cannot be read in any order", kind_of(kind));
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        // SAFETY: the map is read-only and handed out as bytes, of which every value is valid. That no other process
        // changes the file meanwhile cannot be enforced; it is asked for in the type's docs.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self { _named: Named::new(&map, path)?, map })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Which file some addresses are. The handler reads it at any moment, so it is never freed, only emptied.
#[derive(Debug)]
struct Range {
    start: AtomicUsize,
    end: AtomicUsize,
    /// What to say, in whole.
    message: String,
    next: *mut Range,
}

/// All that there ever were, the newest first.
static RANGES: AtomicPtr<Range> = AtomicPtr::new(ptr::null_mut());

/// Has the handler know a mapped file until it is dropped.
#[derive(Debug)]
struct Named(&'static Range);

// SAFETY: of a range that others can see, only the atomic numbers change.
unsafe impl Send for Named {}
// SAFETY: as above.
unsafe impl Sync for Named {}

impl Named {
    fn new(map: &[u8], path: &Path) -> io::Result<Self> {
        install()?;
        let message = format!(
            "bbt: {}: cannot be read any more: it was cut short, or its disk failed, while bbt was reading it\n",
            path.display()
        );
        let start = map.as_ptr() as usize;
        let range = Box::leak(Box::new(Range {
            start: start.into(),
            // Up to the end of the last page: the rest of that is memory, too.
            end: (start + map.len()).next_multiple_of(4096).into(),
            message,
            next: RANGES.load(Ordering::Acquire),
        }));
        let this: *mut Range = range;
        loop {
            // SAFETY: nobody else knows of it yet.
            let next = unsafe { (*this).next };
            match RANGES.compare_exchange(next, this, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: it is never freed, and from here on only read, but for its atomic numbers.
                Ok(_) => return Ok(Self(unsafe { &*this })),
                // SAFETY: as above.
                Err(newer) => unsafe { (*this).next = newer },
            }
        }
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::Release);
    }
}

/// What SIGBUS did before.
static BEFORE: OnceLock<SigAction> = OnceLock::new();

/// Installs the handler, once.
fn install() -> io::Result<()> {
    static RESULT: OnceLock<Result<(), nix::errno::Errno>> = OnceLock::new();
    let result = RESULT.get_or_init(|| {
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_sigbus), flags, SigSet::empty());
        // SAFETY: the handler does only what is async-signal-safe: it reads atomics and memory that is never freed, and
        // calls sigaction, write and _exit.
        let before = unsafe { sigaction(Signal::SIGBUS, &action) }?;
        let _ = BEFORE.set(before);
        Ok(())
    });
    Ok((*result)?)
}

extern "C" fn on_sigbus(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo_t, in which SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let mut next = RANGES.load(Ordering::Acquire);
    // SAFETY: what is in the list is never freed.
    while let Some(range) = unsafe { next.as_ref() } {
        if (range.start.load(Ordering::Acquire)..range.end.load(Ordering::Acquire)).contains(&address) {
            // SAFETY: the message is memory of that length. Whether it can be written changes nothing.
            unsafe { libc::write(libc::STDERR_FILENO, range.message.as_ptr().cast(), range.message.len()) };
            exit_at_once(1);
        }
        next = range.next;
    }
    // Not ours: what was to be done before is done when the instruction is tried again.
    if let Some(before) = BEFORE.get() {
        // SAFETY: it is what was installed before.
        let _ = unsafe { sigaction(Signal::SIGBUS, before) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_files_are_mapped_and_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: u8| {
            let path = dir.path().join(name.to_string());
            std::fs::write(&path, vec![name; 10_000]).unwrap();
            MappedFile::open(&path).unwrap()
        };
        let maps: Vec<MappedFile> = (0..20).map(open).collect();
        let known = |map: &[u8]| {
            let (mut next, mut found) = (RANGES.load(Ordering::Acquire), 0);
            // SAFETY: what is in the list is never freed.
            while let Some(range) = unsafe { next.as_ref() } {
                let addresses = range.start.load(Ordering::Acquire)..range.end.load(Ordering::Acquire);
                found += usize::from(addresses.contains(&(map.as_ptr() as usize + 9_999)));
                next = range.next;
            }
            found
        };
        for (name, map) in (0..).zip(&maps) {
            assert_eq!((&map[..], known(map)), (&[name; 10_000][..], 1));
        }
    }

    #[test]
    fn what_is_no_file_is_named_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let message = MappedFile::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains("a directory"), "{message}");
        let message = MappedFile::open(Path::new("/dev/null")).unwrap_err().to_string();
        assert!(message.contains("a device"), "{message}");
    }
}
