//! One run handed back and forth between bbt and PyTorch goes on as if it had never left either.

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use bbt::config::{Config, ModelConfig, Order, Precision};
use bbt::training::metrics::{TrainObserver, TrainRow};
use bbt::training::{Start, Trainer};

const STEPS: u64 = 24;

fn config(out: &Path, n_kv_head: Option<i64>) -> Config {
    let mut config = Config {
        model: ModelConfig { n_layer: 2, d_model: 64, n_head: 4, n_kv_head, d_ff: 96, ..ModelConfig::default() },
        ..Config::default()
    };
    config.data.train = text().to_str().expect("a UTF-8 path").into();
    config.data.order = Order::Sequential;
    config.data.seq_len = Some(48);
    config.train.steps = STEPS;
    config.train.batch_size = 3;
    config.train.precision = Precision::Fp32;
    config.train.log_every = 1;
    config.train.out = out.into();
    config
}

fn text() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bitbyte_tiny/text.bin")
}

#[derive(Default)]
struct Losses(Vec<f64>);

impl TrainObserver for Losses {
    fn on_step(&mut self, row: &TrainRow) {
        self.0.push(row.loss);
    }
}

fn bbt_trains(config: Config, start: Start) -> Vec<f64> {
    let mut losses = Losses::default();
    Trainer::new(config, start).expect("a trainer").train(&mut losses, &AtomicBool::new(false)).expect("trains");
    losses.0
}

fn pytorch_trains(from: &Path, stop: u64, to: &Path) -> Vec<f64> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/bitbytelm.py");
    let stop = stop.to_string();
    let printed =
        common::python(&[script.as_os_str(), from.as_os_str(), text().as_os_str(), stop.as_ref(), to.as_os_str()]);
    printed.lines().map(|line| line.parse().expect("a loss")).collect()
}

#[test]
fn a_run_goes_on_in_pytorch_and_comes_back() {
    for n_kv_head in [None, Some(2)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let whole = bbt_trains(config(&dir.path().join("whole"), n_kv_head), Start::Fresh);

        // bbt, PyTorch, bbt: a third of the steps each.
        let parts = dir.path().join("parts");
        let mut first = config(&parts, n_kv_head);
        first.train.stop_at = Some(STEPS / 3);
        let mut losses = bbt_trains(first, Start::Fresh);
        let theirs = dir.path().join("theirs.pt");
        losses.extend(pytorch_trains(&parts.join("ckpt.pt"), 2 * STEPS / 3, &theirs));

        // What PyTorch saves does not say where in the data it was: bbt reads on from a file that begins there.
        let mut last = config(&dir.path().join("last"), n_kv_head);
        let rest = dir.path().join("rest.bin");
        let bytes = std::fs::read(text()).expect("text.bin");
        std::fs::write(&rest, &bytes[(2 * STEPS / 3 * 3 * 48) as usize..]).expect("writes");
        last.data.train = rest.to_str().expect("a UTF-8 path").into();
        losses.extend(bbt_trains(last, Start::Resume { path: theirs, optimizer_state: true }));

        assert_eq!(whole.len(), losses.len());
        for (step, (a, b)) in whole.iter().zip(&losses).enumerate() {
            // Rounding to ternary and int8 makes last-bit differences grow: those of the golden data are 2e-3.
            assert!((a - b).abs() < 2e-3, "step {step}: {a} in one piece, {b} in three");
        }
        assert!(whole[STEPS as usize - 1] < whole[0] - 1.0, "it does not learn: {whole:?}");
    }
}

#[test]
fn pytorch_starts_from_initial_weights_of_ours() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // Interrupted before the first step: no optimizer state yet, as in PyTorch.
    let mut trainer = Trainer::new(config(dir.path(), None), Start::Fresh).expect("a trainer");
    trainer.train(&mut (), &AtomicBool::new(true)).expect("saves");
    let expected = bbt_trains(config(&dir.path().join("run"), None), Start::Fresh);
    let losses = pytorch_trains(&dir.path().join("ckpt.pt"), 4, &dir.path().join("theirs.pt"));
    for (a, b) in expected.iter().zip(&losses) {
        assert!((a - b).abs() < 2e-3, "{a} {b}");
    }
}
