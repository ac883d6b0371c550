//! What the ranks say, passed on in whole lines.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::LaunchError;
use super::lines::Lines;

/// How much of a failed rank's standard error is told: lines, and bytes of each.
const TAIL_LINES: usize = 20;
const TAIL_BYTES: usize = 4096;

/// One of a process's two.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// Where a rank's lines go.
pub struct Destination {
    /// Stands before each line.
    prefix: String,
    /// Whether they go to the launcher's own streams.
    shown: bool,
    log: Option<Log>,
    /// The last lines of standard error.
    tail: Mutex<VecDeque<Vec<u8>>>,
}

struct Log {
    path: PathBuf,
    file: Mutex<File>,
}

impl Destination {
    /// The launcher's own streams, each line after `prefix`.
    pub fn console(prefix: String) -> Self {
        Self { prefix, shown: true, log: None, tail: Mutex::default() }
    }

    /// The end of the file at `path`, and where `shown` is set the launcher's own streams, too.
    pub fn log(path: &Path, shown: bool) -> Result<Self, LaunchError> {
        let opened = path.parent().map_or(Ok(()), fs::create_dir_all);
        let opened = opened.and_then(|()| File::options().create(true).append(true).open(path));
        let file = opened.map_err(|source| LaunchError::Log { path: path.into(), source })?;
        let log = Log { path: path.into(), file: Mutex::new(file) };
        Ok(Self { prefix: String::new(), shown, log: Some(log), tail: Mutex::default() })
    }

    /// The last lines on standard error so far.
    pub fn tail(&self) -> Vec<String> {
        locked(&self.tail).iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }

    /// Passes on what comes out of `pipe` until nothing can come any more: all its writers have gone, or `ended`
    /// has been closed and what was written before has been read. (A daemon that a rank has left may hold the pipe
    /// open for ever.)
    pub fn follow(&self, stream: Stream, mut pipe: PipeReader, ended: &PipeReader) -> Result<(), LaunchError> {
        let (mut lines, mut chunk, mut whole) = (Lines::default(), vec![0; 1 << 16], vec![]);
        loop {
            let read = if readable(&pipe, ended) { pipe.read(&mut chunk).unwrap_or(0) } else { 0 };
            let add = |line: &[u8]| self.add(stream, line, &mut whole);
            if read > 0 {
                lines.split(&chunk[..read], add)
            } else {
                lines.finish(add)
            }
            self.write(stream, &whole)?;
            whole.clear();
            if read == 0 {
                return Ok(());
            }
        }
    }

    fn add(&self, stream: Stream, line: &[u8], whole: &mut Vec<u8>) {
        for part in [self.prefix.as_bytes(), line, b"\n"] {
            whole.extend_from_slice(part);
        }
        if stream == Stream::Stderr {
            let mut tail = locked(&self.tail);
            if tail.len() == TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(line[..line.len().min(TAIL_BYTES)].to_vec());
        }
    }

    fn write(&self, stream: Stream, lines: &[u8]) -> Result<(), LaunchError> {
        if lines.is_empty() {
            return Ok(());
        }
        if let Some(Log { path, file }) = &self.log {
            let written = locked(file).write_all(lines);
            written.map_err(|source| LaunchError::Log { path: path.clone(), source })?;
        }
        if self.shown { show(stream, lines) } else { Ok(()) }
    }
}

/// Writes lines to the launcher's own stream.
fn show(stream: Stream, lines: &[u8]) -> Result<(), LaunchError> {
    // One lock for both: they may be one pipe or terminal.
    static CONSOLE: Mutex<()> = Mutex::new(());
    let _guard = locked(&CONSOLE);
    match stream {
        Stream::Stdout => {
            let mut stdout = io::stdout().lock();
            let written = stdout.write_all(lines).and_then(|()| stdout.flush());
            written.map_err(|source| LaunchError::Output { stream: "standard output", source })
        }
        // What cannot be said to a person ends no run.
        Stream::Stderr => {
            let _ = io::stderr().lock().write_all(lines);
            Ok(())
        }
    }
}

/// Waits for something to read in `pipe`; false where `ended` has been closed and there is nothing.
fn readable(pipe: &PipeReader, ended: &PipeReader) -> bool {
    let mut both = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
    while poll(&mut both, PollTimeout::NONE) == Err(Errno::EINTR) {}
    both[0].any().unwrap_or(false)
}

/// What is under the lock is whole also where another thread has panicked.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
