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

use crate::checkpoint::{CheckpointError, Given, TrainingCheckpoint};
use crate::config::{ActQuant, ConfigError, ModelConfig};
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
    set_up_logging();
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

fn set_up_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BBT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

fn run(command: Command) -> anyhow::Result<()> {
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

/// What weights alone do not tell of their model.
#[derive(clap::Args)]
struct ModelArgs {
    /// Number of heads, for weights alone, whose shapes do not tell it
    #[arg(long, value_name = "N")]
    n_head: Option<i64>,
    /// Activations in full precision, for weights alone
    #[arg(long)]
    no_act_quant: bool,
}

impl ModelArgs {
    fn given(&self) -> Given {
        Given { n_head: self.n_head, act: self.no_act_quant.then_some(ActQuant::None) }
    }

    /// Opens the checkpoint at `path`, and says what its model was taken for where it holds weights alone.
    fn open(&self, path: &Path) -> anyhow::Result<TrainingCheckpoint> {
        let checkpoint = TrainingCheckpoint::open_given(path, &self.given())?;
        self.check(path, &checkpoint)?;
        if checkpoint.is_weights_alone() {
            eprintln!("{}", described(checkpoint.model_config(), checkpoint.quant_config().act));
        }
        Ok(checkpoint)
    }

    /// The same of what `--ckpt` names, a file or a run directory; and which file it is. Where a run's newest
    /// checkpoint cannot be read, the error names the newest one that can.
    fn open_newest(&self, ckpt: &Path) -> anyhow::Result<(PathBuf, TrainingCheckpoint)> {
        let path = checkpoint(ckpt)?;
        match self.open(&path) {
            Ok(checkpoint) => Ok((path, checkpoint)),
            Err(error) if ckpt.is_dir() && error.is::<CheckpointError>() => {
                let older = RunDir::new(ckpt).checkpoints().into_iter().skip(1);
                match older.into_iter().find(|path| TrainingCheckpoint::open_given(path, &self.given()).is_ok()) {
                    Some(whole) => anyhow::bail!("{error}; {} is whole: --ckpt takes a file, too", whole.display()),
                    None => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Refuses what contradicts a checkpoint that says it itself.
    fn check(&self, path: &Path, checkpoint: &TrainingCheckpoint) -> Result<(), UsageError> {
        let (has, path) = (checkpoint.model_config().n_head, path.display());
        if let Some(n_head) = self.n_head.filter(|&n_head| n_head != has) {
            return Err(UsageError(format!("--n-head {n_head}: {path} says that its model has {has}")));
        }
        if self.no_act_quant && checkpoint.quant_config().act != ActQuant::None {
            return Err(UsageError(format!("--no-act-quant: {path} says that its model quantizes activations")));
        }
        Ok(())
    }
}

/// What weights alone are taken for.
fn described(model: &ModelConfig, act: ActQuant) -> String {
    format!(
        "weights alone, taken for {} layers × {} with {} heads ({} key/value), d_ff {}, rope_base {}, activations in {}",
        model.n_layer,
        model.d_model,
        model.n_head,
        model.kv_heads(),
        model.d_ff,
        model.rope_base,
        match act {
            ActQuant::Int8 => "int8",
            ActQuant::None => "full precision",
        }
    )
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
    fn a_usage_error_has_status_two() {
        for args in [["train", "--no-such-flag"], ["train", "--steps=x"], ["nothing", "here"]] {
            assert_eq!(parse(args).err().map(|e| e.exit_code()), Some(2), "{args:?}");
        }
    }
}
