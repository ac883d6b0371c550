//! One rank's process: in a group of its own, and never left behind.

use std::io::{self, PipeReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getppid};

use super::output::Stream;

/// A child process that leads a process group, so that a terminal's Ctrl-C passes it by and its own children can
/// be ended with it. When this is dropped nothing of the group is left.
pub struct Process {
    child: Child,
    reaped: bool,
}

impl Process {
    /// Starts `command` without input; returned besides is what comes out of it. The calling thread must live as
    /// long as the process should: the kernel ends the process with SIGKILL when that thread ends, be it by `kill -9`.
    pub fn start(mut command: Command) -> io::Result<(Self, [(Stream, PipeReader); 2])> {
        let launcher = Pid::this();
        let ((stdout, to_stdout), (stderr, to_stderr)) = (io::pipe()?, io::pipe()?);
        command.process_group(0).stdin(Stdio::null()).stdout(to_stdout).stderr(to_stderr);
        // SAFETY: between fork and exec only what is async-signal-safe may be called. prctl and getppid are, and
        // neither they nor an error made of a number allocate.
        unsafe {
            command.pre_exec(move || {
                set_pdeathsig(Signal::SIGKILL)?;
                // The launcher may have ended before that was asked for.
                if getppid() == launcher { Ok(()) } else { Err(Errno::ESRCH.into()) }
            });
        }
        let process = Self { child: command.spawn()?, reaped: false };
        Ok((process, [(Stream::Stdout, stdout), (Stream::Stderr, stderr)]))
    }

    /// Its id, which is its group's.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// A function that returns when the process has ended. It leaves the process to be reaped, so that until then
    /// its id is no other's.
    pub fn waiter(&self) -> impl FnOnce() + Send + 'static {
        let pid = self.pid();
        move || while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
    }

    /// Whether the process has ended.
    pub fn has_ended(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        self.reaped || waitid(Id::Pid(self.pid()), flags) != Ok(WaitStatus::StillAlive)
    }

    /// Sends a signal to the process, which decides about its children. One that has ended is passed over.
    pub fn signal(&self, signal: Signal) {
        if !self.reaped {
            let _ = kill(self.pid(), signal);
        }
    }

    /// Ends at once what there is of the group. A process that has ended by itself keeps its status.
    pub fn kill(&self) {
        if !self.reaped {
            let _ = killpg(self.pid(), Signal::SIGKILL);
        }
    }

    /// Ends the rest of the group, and waits for the process.
    pub fn reap(&mut self) -> ExitStatus {
        self.kill();
        self.reaped = true;
        self.child.wait().expect("a child of ours until now")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.reap();
    }
}
