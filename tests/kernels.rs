//! `quant.kernel`: the fused kernels train as the reference does, and a run may change from one to the other.

mod common;

use std::sync::atomic::AtomicBool;

use bbt::config::{Config, ModelConfig, Precision, QuantKernel, TrainConfig};
use bbt::training::metrics::{TrainObserver, TrainRow};
use bbt::training::{RunDir, Start, Trainer};

/// Losses of the logged steps.
#[derive(Default)]
struct Losses(Vec<f64>);

impl TrainObserver for Losses {
    fn on_step(&mut self, row: &TrainRow) {
        self.0.push(row.loss);
    }
}

fn config(dir: &std::path::Path, kernel: QuantKernel, precision: Precision) -> Config {
    let mut config = Config::default();
    config.model = ModelConfig { n_layer: 2, d_model: 96, n_head: 3, d_ff: 256, ..config.model };
    config.quant.kernel = kernel;
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/src/training/*.rs");
    (config.data.train, config.data.seq_len) = (sources.into(), Some(128));
    (config.optim.lr, config.optim.warmup_frac) = (3e-3, 0.1);
    config.train = TrainConfig {
        steps: 300,
        batch_size: 4,
        precision,
        log_every: 1,
        save_every: 0,
        checkpointing: true,
        out: dir.join(format!("{kernel:?}{precision:?}")),
        ..config.train
    };
    config
}

fn losses(config: Config, start: Start) -> Vec<f64> {
    RunDir::new(&config.train.out).ensure().unwrap();
    // Small products, and another test beside: threads would only wait for each other.
    tch::set_num_threads(1);
    let mut losses = Losses::default();
    Trainer::new(config, start).unwrap().train(&mut losses, &AtomicBool::new(false)).unwrap();
    losses.0
}

/// Mean of the last 60 of 300 losses, in which noise of single batches is the same for all: they read the same.
fn end(losses: &[f64]) -> f64 {
    losses[losses.len() - 60..].iter().sum::<f64>() / 60.0
}

#[test]
fn fused_and_reference_learn_the_same() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let dir = tempfile::tempdir().unwrap();
        // One start for both: the random generator is the process's, not the seed's alone.
        let mut first = config(dir.path(), QuantKernel::Reference, precision);
        (first.train.steps, first.train.out) = (1, dir.path().join("start"));
        losses(first, Start::Fresh);
        let start = Start::Init(dir.path().join("start/ckpt.pt"));
        let [reference, fused] = [QuantKernel::Reference, QuantKernel::Fused]
            .map(|kernel| losses(config(dir.path(), kernel, precision), start.clone()));
        assert!((reference[0] - fused[0]).abs() < 5e-3 * reference[0], "{} {}", reference[0], fused[0]);
        let (reference, fused) = (end(&reference), end(&fused));
        println!("{precision:?}: reference {reference:.4}, fused {fused:.4}");
        // That something was learned at all: 5.5 is knowing nothing.
        assert!(reference < 2.8, "{reference}");
        assert!((fused / reference - 1.0).abs() < 5e-3, "{precision:?}: reference {reference}, fused {fused}");
    }
}

#[test]
fn a_run_may_change_its_kernel() {
    let dir = tempfile::tempdir().unwrap();
    let part = |from: &str, name: &str, kernel, stop_at| {
        let mut config = config(dir.path(), kernel, Precision::Bf16);
        (config.train.steps, config.train.stop_at) = (20, Some(stop_at));
        config.train.out = dir.path().join(name);
        let start = match from {
            "" => Start::Fresh,
            from => Start::Resume { path: dir.path().join(from).join("ckpt.pt"), optimizer_state: true },
        };
        losses(config, start)
    };
    part("", "begun", QuantKernel::Reference, 5);
    let expected = part("begun", "reference", QuantKernel::Reference, 20);
    let mut changing = part("begun", "fused", QuantKernel::Fused, 10);
    changing.extend(part("fused", "reference again", QuantKernel::Reference, 15));
    changing.extend(part("reference again", "fused again", QuantKernel::Auto, 20));
    assert_eq!(changing.len(), 15);
    for (changing, expected) in changing.iter().zip(&expected) {
        assert!((changing / expected - 1.0).abs() < 1e-2, "{changing} {expected}");
    }
}
