//! `bbt train`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::config::ConfigArgs;
use super::progress::TrainProgress;
use super::{Newest, UsageError};
use crate::checkpoint::TrainingCheckpoint;
use crate::config::OnUsr1;
use crate::launch::{RankEnv, Signal, SignalListener};
use crate::libtorch::exit_at_once;
use crate::training::{Ddp, RunDir, RunDirError, Start, TrainError, Trainer, Verdict, setup_ddp};

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
/// files; beside --out models/a.pt they are called a-00000500.pt, a.config.yaml, a.metrics.jsonl and a.tb/.
/// Ctrl-C finishes the step, saves, and says how to resume; a second one exits at once.
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
    let layers = args.config.layers()?;
    let given = layers.given()?.train;
    let main = ddp.is_none_or(|ddp| ddp.rank() == 0);
    let restarted = ddp.is_some_and(|ddp| ddp.restarted());
    let (interrupt, save) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    // From here on, since a warning would end a process that does not listen.
    let _warnings = listen_for_warnings(match given.on_usr1 {
        OnUsr1::Save => save.clone(),
        OnUsr1::Stop => interrupt.clone(),
    })?;

    let run = RunDir::new(&given.out);
    // The process that a launcher has ended may take a moment to be gone.
    let patience = if restarted { RESTART } else { Duration::ZERO };
    // Before the run is looked at: what another process trains changes meanwhile.
    let mut lock = if main { run.lock(patience)? } else { None };
    let (begin, checkpoint) = match main {
        true => {
            let begin = start(args, &run, restarted)?;
            let shape = begin.checkpoint.as_ref().map(|c| (c.model_config().clone(), *c.quant_config()));
            (begin, Some(shape))
        }
        // The checkpoint is rank 0's to read.
        false => (Begin::default(), None),
    };
    let Begin { start, checkpoint: _, damaged } = begin;
    let checkpoint = match ddp {
        Some(ddp) => ddp.share("checkpoint", checkpoint)?,
        None => checkpoint.flatten(),
    };
    let config = layers.resolve(checkpoint.as_ref().map(|(model, quant)| (model, quant)))?;
    let total = config.train.steps;

    let mut trainer = match ddp {
        Some(ddp) => Trainer::distributed(config, start.clone(), ddp.clone())?,
        None => Trainer::new(config, start.clone())?,
    };
    let resumed = trainer.progress().completed;
    if let Start::Resume { path, .. } = &start {
        let best = if *path == run.best() { " (the best: the run has no newer one)" } else { "" };
        super::note(&format!("resuming from {} at step {resumed} of {total}{best}", path.display()));
    }
    if resumed >= total {
        if main {
            super::note(&format!("all {total} steps are done: raise --steps to go on, or choose another --out"));
        }
        return Ok(());
    }
    // Continuing elsewhere is a new run there.
    let continued = matches!(&start, Start::Resume { path, .. } if run.owns(path));
    if main {
        if lock.is_none() {
            run.ensure()?;
            lock = run.lock(patience)?;
        }
        if !continued {
            // What a restarted run finds without a checkpoint is what it began itself.
            run.create(args.allow_overwrite || restarted).map_err(|error| match error {
                RunDirError::Exists { out, found } if args.resume.is_some() && start == Start::Fresh => anyhow!(
                    "{} holds {found} of a run, but no checkpoint to resume from: add --allow-overwrite to begin anew, or \
                     choose another --out",
                    out.display()
                ),
                error => error.into(),
            })?;
        }
        for path in damaged {
            run.set_aside(&path)?;
        }
    }

    let same_signal = if ddp.is_some() { SAME_SIGNAL } else { Duration::ZERO };
    let _listener = listen(interrupt.clone(), same_signal, main)?;

    let mut progress = TrainProgress::new(total, resumed);
    trainer.save_at(save);
    let summary = trainer.train(&mut progress, &interrupt);
    progress.finish();
    let summary = summary?;
    drop(lock);
    if !main {
        return Ok(());
    }
    if summary.finished {
        super::note(&format!("done: {} steps, {}", summary.completed, summary.checkpoint.display()));
    } else {
        let (completed, checkpoint) = (summary.completed, summary.checkpoint.display());
        super::note(&format!("stopped after step {completed} of {total}, saved {checkpoint}"));
        super::note(&format!("to go on: {}", trainer.resume_command()));
    }
    Ok(())
}

/// A terminal sends a Ctrl-C to every process of torchrun's, which passes it on once more: what a launched process
/// gets within this time is the same one.
const SAME_SIGNAL: Duration = Duration::from_secs(1);

/// How long a restarted run waits for the process before it to be gone.
const RESTART: Duration = Duration::from_secs(10);

/// A signal by which a cluster warns of the end of a job's time sets `request`.
fn listen_for_warnings(request: Arc<AtomicBool>) -> anyhow::Result<SignalListener> {
    SignalListener::start(&[Signal::SIGUSR1, Signal::SIGUSR2], move |_| request.store(true, Ordering::SeqCst))
        .context("cannot listen for SIGUSR1")
}

/// The first signal sets `interrupt`; a second one, later than `same_signal`, ends the process.
fn listen(interrupt: Arc<AtomicBool>, same_signal: Duration, speak: bool) -> anyhow::Result<SignalListener> {
    let mut first: Option<Instant> = None;
    SignalListener::start(&SignalListener::ENDING, move |_| match first {
        Some(first) if first.elapsed() > same_signal => exit_at_once(130),
        Some(_) => {}
        None => {
            first = Some(Instant::now());
            interrupt.store(true, Ordering::SeqCst);
            if speak {
                super::note("\nfinishing the step, then saving; once more to exit at once");
            }
        }
    })
    .context("cannot listen for Ctrl-C")
}

/// Where a run starts.
struct Begin {
    start: Start,
    /// What it starts from.
    checkpoint: Option<TrainingCheckpoint>,
    /// Newer checkpoints than that, which are damaged.
    damaged: Vec<PathBuf>,
}

impl Default for Begin {
    fn default() -> Self {
        Self { start: Start::Fresh, checkpoint: None, damaged: vec![] }
    }
}

/// Where the run starts, as the flags say; a run that a launcher has restarted starts where it was.
fn start(args: &Args, run: &RunDir, restarted: bool) -> anyhow::Result<Begin> {
    let open = TrainingCheckpoint::open;
    let newest = |run: &RunDir, optimizer_state| -> anyhow::Result<Option<Begin>> {
        let found = super::newest_whole(run, open)?;
        Ok(found.map(|Newest { path, content, damaged }| Begin {
            start: Start::Resume { path, optimizer_state },
            checkpoint: Some(content),
            damaged,
        }))
    };
    if restarted && let Some(begin) = newest(run, true)? {
        return Ok(begin);
    }
    if let Some(path) = &args.init {
        return Ok(Begin { start: Start::Init(path.clone()), checkpoint: Some(open(path)?), damaged: vec![] });
    }
    let Some(resume) = &args.resume else { return Ok(Begin::default()) };
    let optimizer_state = !args.no_opt_state;
    if resume.as_os_str() == "auto" {
        if args.allow_overwrite && run.newest().is_some() {
            return Err(UsageError(
                "--resume auto continues the run that --allow-overwrite would replace: give one of them".into(),
            )
            .into());
        }
        return Ok(newest(run, optimizer_state)?.unwrap_or_default());
    }
    if resume.is_dir() {
        let begin = newest(&RunDir::new(resume), optimizer_state)?;
        return begin.ok_or_else(|| UsageError(format!("--resume: {}", RunDir::new(resume).no_checkpoint())).into());
    }
    let checkpoint = Some(open(resume)?);
    Ok(Begin { start: Start::Resume { path: resume.clone(), optimizer_state }, checkpoint, damaged: vec![] })
}
