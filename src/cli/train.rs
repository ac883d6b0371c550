//! `bbt train`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use super::UsageError;
use super::config::ConfigArgs;
use super::progress::TrainProgress;
use crate::checkpoint::TrainingCheckpoint;
use crate::libtorch::exit_at_once;
use crate::training::{RunDir, Start, Trainer};

/// Train a model, or continue training it
///
/// Examples:
///   bbt train --config configs/tiny.yaml
///   bbt train --config configs/tiny.yaml --resume auto        go on where it stopped
///   bbt train --config configs/small.yaml --set optim.lr=5e-4 --steps 10000
///   bbt train --data corpus/train --out ckpt.pt --init pretrained.pt --seq_len 1024
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
    /// Number of CPU threads to compute with
    #[arg(long, value_name = "N", help_heading = "Run")]
    threads: Option<usize>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    super::set_threads(args.threads);
    let layers = args.config.layers()?;
    let out = layers.given()?.train.out;
    let run = RunDir::new(&out);
    let start = start(&args, &run)?;
    let config = match &start {
        Start::Fresh => layers.resolve(None)?,
        Start::Init(path) | Start::Resume { path, .. } => {
            let checkpoint = TrainingCheckpoint::open(path)?;
            layers.resolve(Some((checkpoint.model_config(), checkpoint.quant_config())))?
        }
    };
    let total = config.train.steps;

    let mut trainer = Trainer::new(config, start.clone())?;
    let resumed = trainer.progress().completed;
    if let Start::Resume { path, .. } = &start {
        eprintln!("resuming from {} at step {resumed} of {total}", path.display());
        if resumed >= total {
            eprintln!("all {total} steps are done: raise --steps to go on, or choose another --out");
            return Ok(());
        }
        // Continuing elsewhere is a new run there.
        if !lies_in(path, run.dir()) {
            run.create(args.allow_overwrite)?;
        }
    } else {
        run.create(args.allow_overwrite)?;
    }

    let interrupt = Arc::new(AtomicBool::new(false));
    let flag = interrupt.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            exit_at_once(130);
        }
        eprintln!("\nfinishing the step, then saving; once more to exit at once");
    })
    .context("cannot listen for Ctrl-C")?;

    let mut progress = TrainProgress::new(total, resumed);
    let summary = trainer.train(&mut progress, &interrupt);
    progress.finish();
    let summary = summary?;
    if summary.finished {
        eprintln!("done: {} steps, {}", summary.completed, summary.checkpoint.display());
    } else {
        eprintln!("stopped after step {} of {total}, saved {}", summary.completed, summary.checkpoint.display());
        eprintln!("to go on: {}", trainer.resume_command());
    }
    Ok(())
}

/// Whether the file at `path` is one of the directory `dir`, however both are spelled.
fn lies_in(path: &Path, dir: &Path) -> bool {
    match (path.canonicalize(), dir.canonicalize()) {
        (Ok(path), Ok(dir)) => path.parent() == Some(dir.as_path()),
        _ => false,
    }
}

fn start(args: &Args, run: &RunDir) -> Result<Start, UsageError> {
    if let Some(path) = &args.init {
        return Ok(Start::Init(path.clone()));
    }
    let Some(resume) = &args.resume else { return Ok(Start::Fresh) };
    let optimizer_state = !args.no_opt_state;
    if resume.as_os_str() == "auto" {
        if args.allow_overwrite && run.newest().is_some() {
            return Err(UsageError(
                "--resume auto continues the run that --allow-overwrite would replace: give one of them".into(),
            ));
        }
        return Ok(match run.newest() {
            Some(path) => Start::Resume { path, optimizer_state },
            None => Start::Fresh,
        });
    }
    let path = match resume.is_dir() {
        true => RunDir::new(resume)
            .newest()
            .ok_or_else(|| UsageError(format!("--resume {}: the directory holds no checkpoint", resume.display())))?,
        false => resume.clone(),
    };
    Ok(Start::Resume { path, optimizer_state })
}
