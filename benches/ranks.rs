//! What ranks cost and bring, on this machine: `cargo bench --bench ranks`. Starts itself once per rank, trains a few
//! steps of the model of `configs/tiny.yaml` on synthetic bytes, and prints a table in Markdown.

#[path = "../src/allocator.rs"]
mod allocator;

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bbt::config::{Config, DeviceSpec, Layers, Precision};
use bbt::launch::RankEnv;
use bbt::libtorch::host_memory;
use bbt::training::metrics::{TrainObserver, TrainRow};
use bbt::training::{Start, Trainer, setup_ddp};
use serde::{Deserialize, Serialize};

/// Steps before the clock starts, and in all.
const WARM: u64 = 3;
const STEPS: u64 = 15;

/// One way to train.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Case {
    ranks: usize,
    threads: usize,
    zero_stage: u8,
    checkpointing: bool,
}

/// What one rank found.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    parameters: i64,
    step_seconds: f64,
    bytes_per_step: u64,
    backward: f64,
    communication: f64,
    overlap: f64,
    optimizer_bytes: u64,
    peak_bytes: u64,
    /// Of the last rank, which writes nothing.
    #[serde(default)]
    last_peak_bytes: u64,
}

fn main() -> anyhow::Result<()> {
    if let Ok(case) = std::env::var("BBT_BENCH_CASE") {
        return rank(serde_json::from_str(&case)?);
    }
    // `cargo test --benches` asks whether it runs, not how fast.
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let case = |ranks, threads, zero_stage| Case { ranks, threads, zero_stage, checkpointing: false };
    let cases = [case(1, 1, 0), case(1, 2, 0), case(2, 1, 0), case(2, 1, 1), case(4, 1, 0), case(4, 1, 1)];
    println!(
        "| ranks | threads each | ZeRO | ms per step | kB/s | sent per rank and step | backward ms | communication ms | of it hidden | optimizer state per rank | peak memory per rank |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for case in cases {
        // Three times, and the median: other programs come and go.
        let mut runs: Vec<Found> = (0..3).map(|_| run(&case)).collect::<Result<_, _>>()?;
        runs.sort_by(|a, b| a.step_seconds.total_cmp(&b.step_seconds));
        let found = &runs[1];
        let n = case.ranks as f64;
        let sent = 4.0 * found.parameters as f64 * 2.0 * (n - 1.0) / n;
        let hidden = match found.communication > 0.0 {
            true => format!("{:.0} %", 100.0 * found.overlap / found.communication),
            false => "–".into(),
        };
        let ms = |seconds: f64| if seconds > 0.0 { format!("{:.0}", seconds * 1e3) } else { "–".into() };
        println!(
            "| {} | {} | {} | {:.0} | {:.1} | {:.1} MB | {} | {} | {hidden} | {:.1} MiB | {:.0}, {:.0} MiB |",
            case.ranks,
            case.threads,
            case.zero_stage,
            found.step_seconds * 1e3,
            found.bytes_per_step as f64 / found.step_seconds / 1e3,
            sent / 1e6,
            ms(found.backward),
            ms(found.communication),
            found.optimizer_bytes as f64 / f64::from(1 << 20),
            found.peak_bytes as f64 / f64::from(1 << 20),
            found.last_peak_bytes as f64 / f64::from(1 << 20),
        );
    }
    Ok(())
}

/// Starts the ranks of a case; rank 0's account.
fn run(case: &Case) -> anyhow::Result<Found> {
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let ranks: Vec<_> = (0..case.ranks)
        .map(|rank| {
            Command::new(std::env::current_exe()?)
                .env("BBT_BENCH_CASE", serde_json::to_string(case).unwrap_or_default())
                .env("OMP_NUM_THREADS", case.threads.to_string())
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("WORLD_SIZE", case.ranks.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .stdout(Stdio::piped())
                .spawn()
        })
        .collect::<Result<_, _>>()?;
    let outputs: Vec<_> = ranks.into_iter().map(|rank| rank.wait_with_output()).collect::<Result<_, _>>()?;
    anyhow::ensure!(outputs.iter().all(|output| output.status.success()), "a rank failed");
    let mut found: Found = serde_json::from_slice(&outputs[0].stdout)?;
    let last: Found = serde_json::from_slice(&outputs[case.ranks - 1].stdout)?;
    found.last_peak_bytes = last.peak_bytes;
    Ok(found)
}

struct Clock {
    began: Option<Instant>,
    seconds: f64,
}

impl TrainObserver for Clock {
    fn on_step(&mut self, row: &TrainRow) {
        if row.step + 1 == WARM {
            self.began = Some(Instant::now());
        }
        if row.step + 1 == STEPS {
            self.seconds = self.began.map_or(0.0, |began| began.elapsed().as_secs_f64());
        }
    }
}

/// One rank's part.
fn rank(case: Case) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data.bin");
    std::fs::write(&data, (0..1u32 << 20).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect::<Vec<_>>())?;
    let mut layers = Layers::default();
    layers.add_file(std::path::Path::new("configs/tiny.yaml"))?;
    let mut config: Config = layers.resolve(None)?;
    config.data.train = data.display().to_string();
    config.data.val = None;
    config.train.out = dir.path().join("run");
    (config.train.steps, config.train.save_every, config.train.log_every) = (STEPS, 0, 1);
    config.train.device = DeviceSpec::Cpu;
    config.train.precision = Precision::Bf16;
    config.train.checkpointing = case.checkpointing;
    config.train.batch_size = 4 / case.ranks as i64;
    config.ddp.zero_stage = case.zero_stage;
    let env = RankEnv::from_env(true)?.ok_or_else(|| anyhow::anyhow!("no RANK"))?;
    let fail = |message: Option<&str>| {
        eprintln!("{}", message.unwrap_or("another rank failed"));
        bbt::libtorch::exit_at_once(1);
    };
    let ddp = Rc::new(setup_ddp(env, Duration::from_secs(60), Arc::new(fail))?);
    let mut trainer = Trainer::distributed(config, Start::Fresh, ddp.clone())?;
    let mut times = None;
    if let Some(reducer) = trainer.reducer() {
        reducer.measure_every(1)?;
    }
    let mut clock = Clock { began: None, seconds: 0.0 };
    trainer.train(&mut clock, &AtomicBool::new(false))?;
    if let Some(reducer) = trainer.reducer().filter(|_| case.ranks > 1) {
        times = Some(reducer.times()?);
    }
    ddp.done();
    let parameters: i64 = trainer.var_store().trainable_variables().iter().map(|p| p.numel() as i64).sum();
    let found = Found {
        parameters,
        step_seconds: clock.seconds / (STEPS - WARM) as f64,
        bytes_per_step: trainer.progress().bytes_seen / STEPS,
        backward: times.map_or(0.0, |t| t.backward),
        communication: times.map_or(0.0, |t| t.communication),
        overlap: times.map_or(0.0, |t| t.overlap),
        optimizer_bytes: trainer.optimizer_bytes(),
        peak_bytes: host_memory().peak,
        last_peak_bytes: 0,
    };
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}
