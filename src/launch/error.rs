//! What can go wrong with a launched run.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;

use nix::sys::signal::Signal;

/// A run that did not end well.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A rank ended with another status than 0, or by a signal.
    #[error("rank {rank} (pid {pid}) {}{}", fate(*status), quoted(stderr))]
    Failed {
        /// Which, of all nodes' ranks.
        rank: u64,
        /// Its process.
        pid: u32,
        /// How it ended.
        status: ExitStatus,
        /// Its last lines on standard error.
        stderr: Vec<String>,
    },
    /// The user would not wait for the ranks to save.
    #[error("killed all ranks at the third signal ({0})")]
    Interrupted(Signal),
    /// A rank cannot be started.
    #[error("cannot start {}: {source}", program.display())]
    Start {
        /// The program of all ranks.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What the ranks say has nowhere to go.
    #[error("{stream}: {source}; all ranks were ended")]
    Output {
        /// Of the launcher: standard output.
        stream: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A log file cannot be written.
    #[error("{}: {source}: choose a writable --log-dir with room in it", path.display())]
    Log {
        /// The file, or its directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Signals cannot be listened for.
    #[error("cannot listen for signals: {0}")]
    Signals(io::Error),
    /// An environment variable of Slurm is missing or is not what it should be.
    #[error("{name} is {}, not {expected}: give {flag}", value.as_ref().map_or("not set".into(), |v| format!("{v:?}")))]
    Slurm {
        /// The variable.
        name: &'static str,
        /// What it says.
        value: Option<String>,
        /// What it should say.
        expected: &'static str,
        /// The flag that says it instead.
        flag: &'static str,
    },
}

impl LaunchError {
    /// The exit status that the launcher ends with, as a shell has it: the failed rank's own, 128 + the number of
    /// the signal, or 1.
    pub fn exit_status(&self) -> u8 {
        let status = match self {
            Self::Failed { status, .. } => status.code().or(status.signal().map(|signal| 128 + signal)),
            Self::Interrupted(signal) => Some(128 + *signal as i32),
            _ => None,
        };
        status.and_then(|status| u8::try_from(status).ok()).unwrap_or(1)
    }
}

fn fate(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit status {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(name) => format!("was killed by {name} (signal {signal})"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        (None, None) => format!("ended: {status}"),
    }
}

fn quoted(stderr: &[String]) -> String {
    if stderr.is_empty() { String::new() } else { format!(":\n{}", stderr.join("\n")) }
}
