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
mod smoke_test;
mod spelling;
mod train;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::cgroup;
use crate::checkpoint::{CheckpointError, Given, TrainingCheckpoint};
use crate::config::{ActQuant, ConfigError, ModelConfig};
use crate::data::DataError;
use crate::kernels::CpuFeatures;
use crate::launch::{EnvError, LaunchError};
use crate::libtorch;
use crate::training::RunDir;

/// Trains, evaluates, samples and exports BitByteLM: byte-level transformers with ternary weights.
#[derive(Parser)]
#[command(name = "bbt", version, arg_required_else_help = true)]
// A flag that is given twice: the last one holds, as in argparse. Wrappers rely on it.
#[command(args_override_self = true)]
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
        // Usage errors, on stderr with status 2.
        Err(error) if error.use_stderr() => error.exit(),
        // Help and version, on stdout with 0, unless that cannot be written.
        Err(help) => match help.print().and_then(|()| io::stdout().flush()) {
            Err(error) if !is_broken_pipe(&error) => {
                say(&on_stdout(error).to_string());
                return ExitCode::FAILURE;
            }
            _ => return ExitCode::SUCCESS,
        },
    };
    panic::note_places();
    if let Err(error) = survive_file_size_limit() {
        say(&format!("cannot listen for SIGXFSZ: {error}"));
        return ExitCode::FAILURE;
    }
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

/// Makes a write beyond the limit of a file's size (`ulimit -f`) an error, which has a message: by itself the signal ends
/// the process.
fn survive_file_size_limit() -> io::Result<()> {
    signal_hook::flag::register(libc::SIGXFSZ, Arc::default()).map(drop)
}

/// Whether stderr is a terminal that can move its cursor and show colours. One whose TERM is `dumb` or not set
/// (Emacs, some CI) gets plain lines, as a pipe does.
fn stderr_is_capable() -> bool {
    let term = std::env::var_os("TERM").unwrap_or_default();
    io::stderr().is_terminal() && !term.is_empty() && term != "dumb"
}

/// A message of failure on stderr.
fn say(message: &str) {
    let red = if stderr_is_capable() && std::env::var_os("NO_COLOR").is_none() {
        ("\x1b[1;31m", "\x1b[0m")
    } else {
        ("", "")
    };
    note(&format!("{}bbt:{} {message}", red.0, red.1));
}

/// A line on stderr for a person to read. Where stderr cannot be written (a full disk, a pipe that nobody reads) the
/// command goes on: a remark decides nothing.
fn note(message: &str) {
    let _ = io::stderr().write_all(format!("{message}\n").as_bytes());
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
        .with_ansi(stderr_is_capable())
        // It would say with eprintln! that stderr cannot be written.
        .log_internal_errors(false)
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
    CpuFeatures::chosen().map_err(|error| UsageError(error.text().into()))?;
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

/// What `open` makes of the checkpoint that `--ckpt` names: a file, or the newest whole one of a run directory.
fn checkpoint<T>(path: &Path, open: impl Fn(&Path) -> Result<T, CheckpointError>) -> anyhow::Result<T> {
    if !path.is_dir() {
        return Ok(open(path)?);
    }
    let run = RunDir::new(path);
    let newest = newest_whole(&run, open)?;
    newest.map(|newest| newest.content).ok_or_else(|| run.no_checkpoint().into())
}

/// A checkpoint of a run, opened.
struct Newest<T> {
    path: PathBuf,
    content: T,
    /// Newer ones, which cannot be used.
    damaged: Vec<PathBuf>,
}

/// The newest checkpoint of `run` that `open` can open; none where there is no checkpoint. Those that it cannot, such
/// as one that a power failure has cut off, are told of and passed over.
fn newest_whole<T>(
    run: &RunDir,
    open: impl Fn(&Path) -> Result<T, CheckpointError>,
) -> Result<Option<Newest<T>>, CheckpointError> {
    let (mut damaged, mut errors) = (vec![], vec![]);
    for path in run.checkpoints() {
        match open(&path) {
            Ok(content) => {
                for error in errors {
                    note(&format!("{error}\n  passed over: {} is older, and whole", path.display()));
                }
                return Ok(Some(Newest { path, content, damaged }));
            }
            Err(error @ CheckpointError::Content { .. }) => {
                damaged.push(path);
                errors.push(error);
            }
            Err(error) => return Err(error),
        }
    }
    errors.into_iter().next().map_or(Ok(None), Err)
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
        self.announce(path, &checkpoint)?;
        Ok(checkpoint)
    }

    /// The same of what `--ckpt` names, a file or the newest whole one of a run directory; and which file it is.
    fn open_newest(&self, ckpt: &Path) -> anyhow::Result<(PathBuf, TrainingCheckpoint)> {
        let given = self.given();
        let open = |path: &Path| Ok((path.to_path_buf(), TrainingCheckpoint::open_given(path, &given)?));
        let (path, checkpoint) = checkpoint(ckpt, open)?;
        self.announce(&path, &checkpoint)?;
        Ok((path, checkpoint))
    }

    /// Says what the model of weights alone was taken for, and refuses what contradicts a checkpoint that says it itself.
    fn announce(&self, path: &Path, checkpoint: &TrainingCheckpoint) -> Result<(), UsageError> {
        self.check(path, checkpoint)?;
        if checkpoint.is_weights_alone() {
            note(&described(checkpoint.model_config(), checkpoint.quant_config().act));
        }
        Ok(())
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

/// Sets the number of threads that libtorch computes with: `threads`, or where neither they nor OMP_NUM_THREADS say,
/// libtorch's own choice, but no more than the container may use of the CPU.
fn set_threads(threads: Option<usize>) {
    let chosen = ["OMP_NUM_THREADS", "MKL_NUM_THREADS"].iter().any(|name| std::env::var_os(name).is_some());
    let allowed = || cgroup::limits().threads().filter(|&allowed| !chosen && allowed < tch::get_num_threads() as usize);
    if let Some(threads) = threads.or_else(allowed) {
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
