//! The signals that a command listens to.

use std::fs;
use std::io;
use std::thread;

pub use nix::sys::signal::Signal;
use signal_hook::iterator::{Handle, Signals};

/// Listens to signals for as long as it lives.
///
/// A signal that this process was started with ignored stays ignored, as POSIX asks of programs: nohup ignores SIGHUP,
/// and a shell without job control ignores SIGINT for what it starts in the background.
pub struct SignalListener(Handle);

impl SignalListener {
    /// Those that ask a program to end: Ctrl-C, kill, and a terminal that hangs up.
    pub const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

    /// Calls `each`, on a thread of its own, with each of `signals` that is received.
    ///
    /// # Errors
    /// The system's.
    pub fn start(signals: &[Signal], mut each: impl FnMut(Signal) + Send + 'static) -> io::Result<Self> {
        let listened = signals.iter().filter(|&&signal| !is_ignored(signal)).map(|&signal| signal as i32);
        let mut received = Signals::new(listened)?;
        let handle = received.handle();
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in received.forever() {
                if let Ok(signal) = Signal::try_from(signal) {
                    each(signal);
                }
            }
        })?;
        Ok(Self(handle))
    }
}

impl Drop for SignalListener {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Whether this process was started with `signal` ignored.
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}
