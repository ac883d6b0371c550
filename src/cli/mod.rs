//! The command line: parse, call the library, print. One file per subcommand.
//!
//! Machine output goes to stdout, human output to stderr. Exit status 0, 1 for failures, 2 for usage; what
//! `bbt launch` starts keeps its own.

mod config;
mod convert;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod launch;
mod pack;
mod panic;
mod plot;
mod progress;
mod spelling;
mod train;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::config::ConfigError;
use crate::data::DataError;
use crate::launch::{EnvError, LaunchError};
use crate::libtorch::{self, CpuKernels};
use crate::training::{RunDir, RunDirError};

/// Trains, evaluates, samples and exports BitByteLM: byte-level transformers with ternary weights.
#[derive(Parser)]
#[command(name = "bbt", version, arg_required_else_help = true)]
#[command(after_help = "Every flag may be spelled with hyphens or underscores: --n-layer, --n_layer.\n\n\
Examples:\n  \
bbt pack --out corpus --val-frac 0.05 ~/notes\n  \
bbt train --config configs/tiny.yaml\n  \
bbt train --config configs/tiny.yaml --resume auto\n  \
bbt eval --ckpt runs/tiny/ckpt.pt --data corpus/val --seq-len 512\n  \
bbt generate --ckpt runs/tiny/ckpt.pt --prompt 'fn main'")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(Box<train::Args>),
    Launch(launch::Args),
    Eval(eval::Args),
    Generate(generate::Args),
    Pack(pack::Args),
    Convert(convert::Args),
    Inspect(inspect::Args),
    Plot(plot::Args),
    Config(Box<config::Args>),
    Doctor(doctor::Args),
    Completions(Completions),
}

/// Print a completion script for a shell
///
/// Example:
///   bbt completions bash > ~/.local/share/bash-completion/completions/bbt
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

fn parsed(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut command = spelling::with_underscores(Cli::command());
    let matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match parsed(std::env::args_os()) {
        Ok(cli) => cli,
        // clap's own: help and version on stdout with status 0, usage errors on stderr with 2.
        Err(error) => error.exit(),
    };
    panic::note_places();
    let result = catch_unwind(AssertUnwindSafe(|| run(cli.command)));
    let error = match result {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => error,
        Err(panic) => panic::error(panic.as_ref()),
    };
    // A reader of our output that has seen enough (`| head`) is no failure.
    if error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(is_broken_pipe)) {
        return ExitCode::SUCCESS;
    }
    say(&describe(&error));
    ExitCode::from(status(&error))
}

/// A message of failure on stderr.
fn say(message: &str) {
    let red = if io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        ("\x1b[1;31m", "\x1b[0m")
    } else {
        ("", "")
    };
    eprintln!("{}bbt:{} {message}", red.0, red.1);
}

/// The exit status for a failure: that of a launched rank, 2 where the user asked for what cannot be, else 1.
fn status(error: &anyhow::Error) -> u8 {
    let usage = error.chain().any(|cause| {
        cause.is::<ConfigError>()
            || cause.is::<UsageError>()
            || cause.is::<EnvError>()
            || matches!(cause.downcast_ref(), Some(DataError::Invalid { .. }))
    });
    match error.downcast_ref::<LaunchError>() {
        Some(error) => error.exit_status(),
        None => 1 + u8::from(usage),
    }
}

/// What went wrong and why, down the chain of causes. Most of our errors tell their cause themselves, so what
/// was said is not said again.
fn describe(error: &anyhow::Error) -> String {
    if let Some(libtorch::Error::OutOfMemory(how)) = error.chain().find_map(|cause| cause.downcast_ref()) {
        return format!(
            "out of memory: make train.batch_size, data.seq_len or the model smaller, or set train.checkpointing ({how})"
        );
    }
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Flags that do not go together, or a value that clap cannot judge.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

fn is_broken_pipe(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

fn set_up_logging() -> anyhow::Result<()> {
    let filter = log_filter(&std::env::var_os("BBT_LOG").unwrap_or_default().to_string_lossy())?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    Ok(())
}

/// What `BBT_LOG` asks for. A word that is neither a level nor a part of bbt would turn on nothing: it is refused.
fn log_filter(text: &str) -> Result<EnvFilter, UsageError> {
    let known = |directive: &str| {
        let target = directive.split(['=', '[']).next().unwrap_or_default();
        target == "bbt" || target.starts_with("bbt::") || directive.parse::<LevelFilter>().is_ok()
    };
    let text = if text.trim().is_empty() { "off" } else { text };
    let unknown = text.split(',').find(|directive| !known(directive));
    match (unknown, EnvFilter::try_new(text)) {
        (None, Ok(filter)) => Ok(filter),
        _ => Err(UsageError(format!(
            "BBT_LOG={text}: set it to off, error, warn, info, debug or trace, or to such a level of a module, as in \
             BBT_LOG=bbt::training=debug"
        ))),
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    set_up_logging()?;
    // Where BBT_CPU_KERNELS asks for kernels that are not there.
    CpuKernels::chosen().map_err(|error| UsageError(error.text().into()))?;
    match command {
        Command::Train(args) => train::run(*args),
        Command::Launch(args) => launch::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Pack(args) => pack::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Plot(args) => plot::run(args),
        Command::Config(args) => config::run(*args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(Completions { shell }) => {
            let mut script = vec![];
            clap_complete::generate(shell, &mut Cli::command(), "bbt", &mut script);
            Ok(stdout().write_all(&script)?)
        }
    }
}

/// Standard output, locked. Unlike `println!` it does not panic where that is full or closed.
fn stdout() -> impl Write {
    Stdout(io::stdout().lock())
}

/// Its errors say whose they are.
struct Stdout(io::StdoutLock<'static>);

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(on_stdout)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(on_stdout)
    }
}

fn on_stdout(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("standard output: {error}"))
}

/// The checkpoint that `--ckpt` names: a file, or the newest of a run directory.
fn checkpoint(path: &Path) -> Result<PathBuf, RunDirError> {
    if !path.is_dir() {
        return Ok(path.into());
    }
    RunDir::new(path).newest().ok_or_else(|| RunDirError::NoCheckpoint(path.into()))
}

/// Sets the number of threads that libtorch computes with.
fn set_threads(threads: Option<usize>) {
    if let Some(threads) = threads {
        tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
    }
}

/// The arguments of this process: for tests of the parser.
#[cfg(test)]
fn parse<const N: usize>(args: [&str; N]) -> Result<Command, clap::Error> {
    let args = std::iter::once("bbt").chain(args).map(OsString::from);
    parsed(args).map(|cli| cli.command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_bbt_log_may_say() {
        for text in ["", "off", "debug", "WARN", "bbt=debug", "bbt::training=trace", "warn,bbt::data=debug"] {
            assert!(log_filter(text).is_ok(), "{text}");
        }
        for text in ["bogus", "bogus[", "degub", "bbt=degub", "debug,bogus", "="] {
            assert!(log_filter(text).is_err_and(|error| error.0.contains(text)), "{text}");
        }
    }

    #[test]
    fn a_usage_error_has_status_two() {
        for args in [["train", "--no-such-flag"], ["train", "--steps=x"], ["nothing", "here"]] {
            assert_eq!(parse(args).err().map(|e| e.exit_code()), Some(2), "{args:?}");
        }
    }
}
