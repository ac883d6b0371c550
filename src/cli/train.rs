//! `bbt train`.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::UsageError;
use super::config::ConfigArgs;
use super::progress::TrainProgress;
use crate::checkpoint::{Given, TrainingCheckpoint, rule_of};
use crate::config::{Config, Layers, ModelConfig, OptimizerName, QuantConfig};
use crate::launch::RankEnv;
use crate::libtorch::exit_at_once;
use crate::training::{Ddp, RunDir, Start, TrainError, Trainer, Verdict, setup_ddp};

/// Train a model, or continue training it
///
/// Examples:
///   bbt train --config configs/tiny.yaml
///   bbt train --config configs/tiny.yaml --resume auto        go on where it stopped
///   bbt train --config configs/small.yaml --set optim.lr=5e-4 --steps 10000
///   bbt train --data corpus/train --out ckpt.pt --init pretrained.pt --seq_len 1024
///   torchrun --no-python --nproc-per-node=8 bbt train --config configs/base.yaml --ddp
///
/// The run directory (--out) gets checkpoints, config.yaml, metrics.jsonl and TensorBoard event
/// files. Ctrl-C finishes the step, saves, and says how to resume; a second one exits at once.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Continue from a checkpoint, or `auto`: from the newest in the run directory, if there is one
    #[arg(long, value_name = "CKPT|auto", help_heading = "Start")]
    resume: Option<PathBuf>,
    /// With --resume: leave the checkpoint's optimizer state, starting the moments at zero
    #[arg(long, help_heading = "Start")]
    no_opt_state: bool,
    /// Start at step 0 with a checkpoint's weights
    #[arg(long, value_name = "CKPT", conflicts_with = "resume", help_heading = "Start")]
    init: Option<PathBuf>,
    /// Replace a run that --out holds already
    #[arg(long, help_heading = "Start")]
    allow_overwrite: bool,
    /// Train as one of many processes, started by torchrun or `bbt launch` (implied where they set RANK and
    /// WORLD_SIZE)
    #[arg(long, help_heading = "Run")]
    ddp: bool,
    /// Number of CPU threads to compute with
    #[arg(long, value_name = "N", help_heading = "Run")]
    threads: Option<usize>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    super::set_threads(args.threads);
    match RankEnv::from_env(args.ddp)? {
        None => train(&args, None),
        Some(env) => distributed(&args, env),
    }
}

/// One rank of many: fails together with the others, and one of them says why.
fn distributed(args: &Args, env: RankEnv) -> anyhow::Result<()> {
    // Before anything can fail that fails on every rank alike: from here on one speaks for all.
    let timeout = args.config.layers().and_then(|layers| layers.given()).unwrap_or_default().ddp.timeout;
    let on_failure = |message: Option<&str>| {
        if let Some(message) = message {
            super::say(message);
        }
        exit_at_once(1);
    };
    let ddp = Rc::new(setup_ddp(env, Duration::from_secs(timeout), Arc::new(on_failure))?);
    let error = match catch_unwind(AssertUnwindSafe(|| train(args, Some(&ddp)))) {
        Ok(Ok(())) => {
            ddp.done();
            return Ok(());
        }
        Ok(Err(error)) => error,
        Err(panic) => super::panic::error(panic.as_ref()),
    };
    let lost = error.downcast_ref().is_some_and(TrainError::is_lost_rank);
    if let Verdict::Tell(message) = ddp.fail(super::describe(&error), lost) {
        super::say(&message);
    }
    // The other ranks may hold this one's connections: nothing is waited for.
    exit_at_once(super::status(&error).into());
}

fn train(args: &Args, ddp: Option<&Rc<Ddp>>) -> anyhow::Result<()> {
    let mut layers = args.config.layers()?;
    let given = layers.given()?;
    let run = RunDir::new(&given.train.out);
    let main = ddp.is_none_or(|ddp| ddp.rank() == 0);
    // The checkpoint is rank 0's to read; what it says of the configuration all ranks must know.
    let (mut start, mut opened) = (Start::Fresh, None);
    if main {
        (start, opened) = self::start(args, &run, ddp.is_some_and(|ddp| ddp.restarted()), &given_of(&layers, &given))?;
    }
    let keeps_state = matches!(start, Start::Resume { optimizer_state: true, .. });
    let says = opened.as_ref().map(|checkpoint| Says {
        model: checkpoint.model_config().clone(),
        quant: *checkpoint.quant_config(),
        optimizer: checkpoint.optimizer_name().filter(|_| keeps_state),
    });
    let says = match ddp {
        Some(ddp) => ddp.share("checkpoint", main.then_some(says))?,
        None => says,
    };
    // A state of 8-bit moments is another optimizer's.
    if says.as_ref().and_then(|says| says.optimizer) == Some(OptimizerName::AdamW8bit) && !layers.has("optim", "name") {
        layers.set("the checkpoint", "optim.name", "adamw8bit")?;
        if main {
            eprintln!("optim.name is adamw8bit, as in the checkpoint");
        }
    }
    let config = layers.resolve(says.as_ref().map(|says| (&says.model, &says.quant)))?;
    if let Some(checkpoint) = &opened {
        if checkpoint.is_weights_alone() {
            eprintln!("{}", super::described(checkpoint.model_config(), config.quant.act));
        }
        if matches!(start, Start::Resume { .. })
            && let Some(note) = other_rule(checkpoint, &config, &layers)
        {
            eprintln!("{note}");
        }
    }
    // Its memory map is not needed twice.
    drop(opened);
    let total = config.train.steps;

    let mut trainer = match ddp {
        Some(ddp) => Trainer::distributed(config, start.clone(), ddp.clone())?,
        None => Trainer::new(config, start.clone())?,
    };
    let resumed = trainer.progress().completed;
    if let Start::Resume { path, .. } = &start {
        eprintln!("resuming from {} at step {resumed} of {total}", path.display());
    }
    if resumed >= total {
        if main {
            eprintln!("all {total} steps are done: raise --steps to go on, or choose another --out");
        }
        return Ok(());
    }
    // Continuing elsewhere is a new run there.
    let continued = matches!(&start, Start::Resume { path, .. } if lies_in(path, run.dir()));
    if main && !continued {
        // What a restarted run finds without a checkpoint is what it began itself.
        run.create(args.allow_overwrite || ddp.is_some_and(|ddp| ddp.restarted()))?;
    }

    let interrupt = Arc::new(AtomicBool::new(false));
    let same_signal = if ddp.is_some() { SAME_SIGNAL } else { Duration::ZERO };
    listen(interrupt.clone(), same_signal, main)?;

    let mut progress = TrainProgress::new(total, resumed);
    let summary = trainer.train(&mut progress, &interrupt);
    progress.finish();
    let summary = summary?;
    if !main {
        return Ok(());
    }
    if summary.finished {
        eprintln!("done: {} steps, {}", summary.completed, summary.checkpoint.display());
    } else {
        eprintln!("stopped after step {} of {total}, saved {}", summary.completed, summary.checkpoint.display());
        eprintln!("to go on: {}", trainer.resume_command());
    }
    Ok(())
}

/// What a checkpoint says of the configuration of a run that starts from it.
#[derive(Clone, Serialize, Deserialize)]
struct Says {
    model: ModelConfig,
    quant: QuantConfig,
    /// Whose state it holds, where that is taken over.
    optimizer: Option<OptimizerName>,
}

/// What the user has said of the model, for files that do not.
fn given_of(layers: &Layers, given: &Config) -> Given {
    Given {
        n_head: layers.has("model", "n_head").then_some(given.model.n_head),
        act: layers.has("quant", "act").then_some(given.quant.act),
    }
}

/// Says how a resumed run trains otherwise than before, where the user has not asked for it.
fn other_rule(checkpoint: &TrainingCheckpoint, config: &Config, layers: &Layers) -> Option<String> {
    let now: BTreeMap<_, _> = rule_of(config).into_iter().collect();
    let asked = |key: &str| key.split_once('.').is_some_and(|(section, key)| layers.has(section, key));
    let before = checkpoint.rule().into_iter();
    let other: Vec<_> = before.filter(|(key, value)| now.get(key) != Some(value) && !asked(key)).collect();
    if other.is_empty() {
        return None;
    }
    let all = |word: &dyn Fn(&(&'static str, String)) -> String, between: &str| {
        other.iter().map(word).collect::<Vec<_>>().join(between)
    };
    Some(format!(
        "the checkpoint's run, {}, trained with {}; this one goes on with {} (to keep the former: {})",
        if checkpoint.is_ours() { "bbt's" } else { "the PyTorch original's" },
        all(&|(key, value)| format!("{key} {value}"), ", "),
        all(&|(key, _)| now.get(key).cloned().unwrap_or_default(), ", "),
        all(&|(key, value)| format!("--set {key}={value}"), " "),
    ))
}

/// A terminal sends a Ctrl-C to every process of torchrun's, which passes it on once more: what a launched process
/// gets within this time is the same one.
const SAME_SIGNAL: Duration = Duration::from_secs(1);

/// The first signal sets `interrupt`; a second one, later than `same_signal`, ends the process.
fn listen(interrupt: Arc<AtomicBool>, same_signal: Duration, speak: bool) -> anyhow::Result<()> {
    let mut first: Option<Instant> = None;
    ctrlc::set_handler(move || match first {
        Some(first) if first.elapsed() > same_signal => exit_at_once(130),
        Some(_) => {}
        None => {
            first = Some(Instant::now());
            interrupt.store(true, Ordering::SeqCst);
            if speak {
                eprintln!("\nfinishing the step, then saving; once more to exit at once");
            }
        }
    })
    .context("cannot listen for Ctrl-C")
}

/// Whether the file at `path` is one of the directory `dir`, however both are spelled.
fn lies_in(path: &Path, dir: &Path) -> bool {
    match (path.canonicalize(), dir.canonicalize()) {
        (Ok(path), Ok(dir)) => path.parent() == Some(dir.as_path()),
        _ => false,
    }
}

/// Where the run starts, as the flags say, and its checkpoint; a run that a launcher has restarted starts where it was.
fn start(
    args: &Args,
    run: &RunDir,
    restarted: bool,
    given: &Given,
) -> anyhow::Result<(Start, Option<TrainingCheckpoint>)> {
    if restarted && let Some((path, checkpoint)) = newest_whole(run, given)? {
        return Ok((Start::Resume { path, optimizer_state: true }, Some(checkpoint)));
    }
    if let Some(path) = &args.init {
        return Ok((Start::Init(path.clone()), Some(TrainingCheckpoint::open_given(path, given)?)));
    }
    let Some(resume) = &args.resume else { return Ok((Start::Fresh, None)) };
    let optimizer_state = !args.no_opt_state;
    if resume.as_os_str() == "auto" {
        if args.allow_overwrite && run.newest().is_some() {
            return Err(UsageError(
                "--resume auto continues the run that --allow-overwrite would replace: give one of them".into(),
            )
            .into());
        }
        return Ok(match newest_whole(run, given)? {
            Some((path, checkpoint)) => (Start::Resume { path, optimizer_state }, Some(checkpoint)),
            None => (Start::Fresh, None),
        });
    }
    let path = match resume.is_dir() {
        true => RunDir::new(resume)
            .newest()
            .ok_or_else(|| UsageError(format!("--resume {}: the directory holds no checkpoint", resume.display())))?,
        false => resume.clone(),
    };
    let checkpoint = TrainingCheckpoint::open_given(&path, given)?;
    Ok((Start::Resume { path, optimizer_state }, Some(checkpoint)))
}

/// The newest checkpoint of a run that is whole, if there is any. What is newer and damaged is told of.
///
/// # Errors
/// There are checkpoints, but none that can be read: the newest one's error.
fn newest_whole(run: &RunDir, given: &Given) -> anyhow::Result<Option<(PathBuf, TrainingCheckpoint)>> {
    let mut damaged = vec![];
    for path in run.checkpoints() {
        match TrainingCheckpoint::open_given(&path, given) {
            Ok(checkpoint) => {
                for error in &damaged {
                    eprintln!("{error}; going on from {}", path.display());
                }
                return Ok(Some((path, checkpoint)));
            }
            Err(error) => damaged.push(error),
        }
    }
    match damaged.into_iter().next() {
        Some(newest) => Err(newest.into()),
        None => Ok(None),
    }
}
