//! bbt as a contender of `make bench` (benches/compare.py): trains as `bbt train` does, some steps at a time.
//!
//! Its argument is a configuration in JSON. Each line on standard input is a number of steps to train, answered by a
//! line of JSON: milliseconds and loss of each step, and the peak of memory so far. Ends where its input does.

#[path = "../src/allocator.rs"]
mod allocator;

use std::io::{self, BufRead};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use bbt::config::Config;
use bbt::libtorch::exit_at_once;
use bbt::training::metrics::{TrainObserver, TrainRow};
use bbt::training::{Start, Trainer};
use serde::Serialize;

/// The steps asked for by one line.
#[derive(Serialize)]
struct Block {
    #[serde(skip)]
    steps: usize,
    #[serde(skip)]
    began: Instant,
    ms: Vec<f64>,
    losses: Vec<f64>,
    peak_bytes: u64,
}

impl Block {
    /// Waits for the next line.
    fn asked() -> Self {
        let mut line = String::new();
        match io::stdin().lock().read_line(&mut line) {
            Ok(0) => exit_at_once(0),
            Ok(_) => {}
            Err(error) => fail(&format!("standard input: {error}")),
        }
        let steps = line.trim().parse().unwrap_or(0);
        if steps == 0 {
            fail(&format!("standard input: {:?} is no number of steps", line.trim()));
        }
        Self { steps, began: Instant::now(), ms: vec![], losses: vec![], peak_bytes: 0 }
    }
}

impl TrainObserver for Block {
    fn on_step(&mut self, row: &TrainRow) {
        self.ms.push(self.began.elapsed().as_secs_f64() * 1e3);
        self.losses.push(row.loss);
        self.peak_bytes = row.peak_memory_bytes;
        self.began = Instant::now();
        if self.ms.len() == self.steps {
            println!("{}", serde_json::to_string(self).unwrap_or_default());
            *self = Self::asked();
        }
    }
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    exit_at_once(1);
}

pub fn main() -> anyhow::Result<()> {
    // `cargo test --benches` asks whether it runs, not how fast.
    let Some(config) = std::env::args().nth(1).filter(|arg| arg.starts_with('{')) else {
        return Ok(());
    };
    let mut config: Config = serde_json::from_str(&config)?;
    // More than anyone waits for, and the clock's owner hears of each.
    (config.train.steps, config.train.log_every) = (1 << 30, 1);
    (config.train.eval_every, config.train.save_every) = (0, 0);
    let mut trainer = Trainer::new(config, Start::Fresh)?;
    trainer.train(&mut Block::asked(), &AtomicBool::new(false))?;
    Ok(())
}
