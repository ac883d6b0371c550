//! `bbt train`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use super::UsageError;
use super::config::ConfigArgs;
use super::progress::TrainProgress;
use super::smoke_test::SmokeTest;
use crate::checkpoint::TrainingCheckpoint;
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
        Err(panic) => anyhow!(super::panic_message(panic.as_ref())),
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
            super::remark(&format!("rank 0 of WORLD_SIZE={world_size}: waiting for the other ranks {at}"));
        }
        return None;
    }
    let message = format!("rank {rank} of WORLD_SIZE={world_size}: waiting for the store of all ranks {at}");
    let (sender, dropped) = mpsc::channel();
    std::thread::spawn(move || {
        if dropped.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
            super::remark(&message);
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
    let out = layers.given()?.train.out;
    let run = RunDir::new(&out);
    let main = ddp.is_none_or(|ddp| ddp.rank() == 0);
    let (start, checkpoint) = match main {
        true => {
            let start = start(args, &run, ddp.is_some_and(|ddp| ddp.restarted()))?;
            let checkpoint = match &start {
                Start::Fresh => None,
                Start::Init(path) | Start::Resume { path, .. } => {
                    let checkpoint = TrainingCheckpoint::open(path)?;
                    Some((checkpoint.model_config().clone(), *checkpoint.quant_config()))
                }
            };
            (start, Some(checkpoint))
        }
        // The checkpoint is rank 0's to read.
        false => (Start::Fresh, None),
    };
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
    if smoke_test.is_some() {
        eprintln!("smoke test: {} steps done; nothing was kept", summary.completed);
    } else if summary.finished {
        eprintln!("done: {} steps, {}", summary.completed, summary.checkpoint.display());
    } else {
        eprintln!("stopped after step {} of {total}, saved {}", summary.completed, summary.checkpoint.display());
        eprintln!("to go on: {}", trainer.resume_command());
    }
    Ok(())
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

/// Where the run starts, as the flags say; a run that a launcher has restarted starts where it was.
fn start(args: &Args, run: &RunDir, restarted: bool) -> Result<Start, UsageError> {
    if restarted && let Some(path) = run.newest() {
        return Ok(Start::Resume { path, optimizer_state: true });
    }
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
