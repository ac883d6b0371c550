//! The signals that the launcher passes on.

use std::fs;
use std::io;
use std::thread;

use nix::sys::signal::Signal;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// Listens to SIGINT, SIGTERM and SIGHUP for as long as it lives.
pub struct SignalListener(Handle);

impl SignalListener {
    /// Calls `each` with the signal to pass on for each one received: a terminal that hangs up is a SIGTERM.
    pub fn start(mut each: impl FnMut(Signal) + Send + 'static) -> io::Result<Self> {
        // SIGCHLD only to be sure that it is not ignored: an ended child would then leave no status.
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGCHLD])?;
        // Under nohup it stays ignored.
        if !is_ignored(SIGHUP) {
            signals.add_signal(SIGHUP)?;
        }
        let handle = signals.handle();
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                match signal {
                    SIGINT => each(Signal::SIGINT),
                    SIGTERM | SIGHUP => each(Signal::SIGTERM),
                    _ => {}
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
fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
