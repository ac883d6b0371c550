//! `bbt train`.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};

use super::config::ConfigArgs;
use super::progress::TrainProgress;
use super::smoke_test::SmokeTest;
use super::{Newest, UsageError};
use crate::checkpoint::{Given, TrainingCheckpoint, rule_of};
use crate::config::{Config, Layers, ModelConfig, OnUsr1, OptimizerName, QuantConfig};
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
    /// Ten steps of a tiny model on random bytes, to see whether everything works; nothing is kept
    #[arg(long, conflicts_with_all = ["resume", "init"], help_heading = "Start")]
    smoke_test: bool,
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
    let waiting = say_what_is_waited_for(&env, timeout);
    let ddp = Rc::new(setup_ddp(env, Duration::from_secs(timeout), Arc::new(on_failure))?);
    drop(waiting);
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

/// How long a rank that waits for the store is silent about it.
const SILENCE: Duration = Duration::from_secs(5);

/// Tells whoever started one process, and whose environment says that it is one of many, what it waits for: rank 0 at
/// once where no launcher looks after all ranks, another after some seconds without the store, unless what is returned
/// is dropped before.
fn say_what_is_waited_for(env: &RankEnv, timeout: u64) -> Option<Sender<()>> {
    let RankEnv { rank, world_size, master_addr, master_port, .. } = env;
    let at = format!("at {master_addr}:{master_port} (MASTER_ADDR, MASTER_PORT), up to {timeout} s (ddp.timeout)");
    if *rank == 0 && !env.agent_store {
        if *world_size > 1 {
            super::note(&format!("rank 0 of WORLD_SIZE={world_size}: waiting for the other ranks {at}"));
        }
        return None;
    }
    let message = format!("rank {rank} of WORLD_SIZE={world_size}: waiting for the store of all ranks {at}");
    let (sender, dropped) = mpsc::channel();
    std::thread::spawn(move || {
        if dropped.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
            super::note(&message);
        }
    });
    Some(sender)
}

fn train(args: &Args, ddp: Option<&Rc<Ddp>>) -> anyhow::Result<()> {
    let mut layers = args.config.layers()?;
    let smoke_test = args.smoke_test.then(SmokeTest::new).transpose()?;
    if let Some(smoke_test) = &smoke_test {
        smoke_test.apply(&mut layers)?;
    }
    let given = layers.given()?;
    let main = ddp.is_none_or(|ddp| ddp.rank() == 0);
    let restarted = ddp.is_some_and(|ddp| ddp.restarted());
    let interrupt = Arc::new(AtomicBool::new(false));
    let save = Arc::new(AtomicBool::new(false));
    // From here on, since a warning would end a process that does not listen.
    let _warnings = listen_for_warnings(match given.train.on_usr1 {
        OnUsr1::Save => save.clone(),
        OnUsr1::Stop => interrupt.clone(),
    })?;

    let run = RunDir::new(&given.train.out);
    // The process that a launcher has ended may take a moment to be gone.
    let patience = if restarted { RESTART } else { Duration::ZERO };
    // Before the run is looked at: what another process trains changes meanwhile.
    let mut lock = if main { run.lock(patience)? } else { None };
    // The checkpoint is rank 0's to read; what it says of the configuration all ranks must know.
    let begin = if main { start(args, &run, restarted, &given_of(&layers, &given))? } else { Begin::default() };
    let Begin { start, checkpoint: opened, damaged } = begin;
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
            super::note("optim.name is adamw8bit, as in the checkpoint");
        }
    }
    let config = layers.resolve(says.as_ref().map(|says| (&says.model, &says.quant)))?;
    if let Some(checkpoint) = &opened {
        if checkpoint.is_weights_alone() {
            super::note(&super::described(checkpoint.model_config(), config.quant.act));
        }
        if matches!(start, Start::Resume { .. })
            && let Some(difference) = other_rule(checkpoint, &config, &layers)
        {
            super::note(&difference);
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
    if smoke_test.is_some() {
        super::note(&format!("smoke test: {} steps done; nothing was kept", summary.completed));
    } else if summary.finished {
        super::note(&format!("done: {} steps, {}", summary.completed, summary.checkpoint.display()));
    } else {
        let (completed, checkpoint) = (summary.completed, summary.checkpoint.display());
        super::note(&format!("stopped after step {completed} of {total}, saved {checkpoint}"));
        super::note(&format!("to go on: {}", trainer.resume_command()));
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
fn start(args: &Args, run: &RunDir, restarted: bool, given: &Given) -> anyhow::Result<Begin> {
    let open = |path: &Path| TrainingCheckpoint::open_given(path, given);
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
