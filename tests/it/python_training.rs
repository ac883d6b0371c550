//! One run handed back and forth between bbt and PyTorch goes on as if it had never left either.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use bbt::checkpoint::{Value, torch_file};
use bbt::config::{Config, ModelConfig, OptimizerName, Order, Precision};
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

fn pytorch_trains(from: &Path, stop: u64, to: &Path, optimizer: &str) -> Vec<f64> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/bitbytelm.py");
    let stop = stop.to_string();
    let (from, text, to) = (from.as_os_str(), text(), to.as_os_str());
    let printed =
        crate::common::python(&[script.as_os_str(), from, text.as_os_str(), stop.as_ref(), to, optimizer.as_ref()]);
    printed.lines().map(|line| line.parse().expect("a loss")).collect()
}

/// In bbt, PyTorch and bbt, a third of the steps each, beside as many in bbt alone. Returns what PyTorch wrote.
fn a_run_goes_on_in_pytorch_and_comes_back(n_kv_head: Option<i64>, name: OptimizerName, python_name: &str) -> Value {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = |out: &str| {
        let mut config = config(&dir.path().join(out), n_kv_head);
        config.optim.name = name;
        config
    };
    let whole = bbt_trains(config("whole"), Start::Fresh);

    let mut first = config("first");
    first.train.stop_at = Some(STEPS / 3);
    let mut losses = bbt_trains(first, Start::Fresh);
    let theirs = dir.path().join("theirs.pt");
    losses.extend(pytorch_trains(&dir.path().join("first/ckpt.pt"), 2 * STEPS / 3, &theirs, python_name));

    // What PyTorch saves does not say where in the data it was: bbt reads on from a file that begins there.
    let mut last = config("last");
    let rest = dir.path().join("rest.bin");
    let bytes = std::fs::read(text()).expect("text.bin");
    std::fs::write(&rest, &bytes[(2 * STEPS / 3 * 3 * 48) as usize..]).expect("writes");
    last.data.train = rest.to_str().expect("a UTF-8 path").into();
    losses.extend(bbt_trains(last, Start::Resume { path: theirs.clone(), optimizer_state: true }));

    assert_eq!(whole.len(), losses.len());
    for (step, (a, b)) in whole.iter().zip(&losses).enumerate() {
        // Rounding to ternary and int8 makes last-bit differences grow: those of the golden data are 2e-3.
        assert!((a - b).abs() < 2e-3, "step {step}: {a} in one piece, {b} in three");
    }
    assert!(whole[STEPS as usize - 1] < whole[0] - 1.0, "it does not learn: {whole:?}");
    torch_file::read(&theirs).expect("reads")
}

#[test]
fn a_run_goes_on_with_torchs_adamw() {
    for n_kv_head in [None, Some(2)] {
        a_run_goes_on_in_pytorch_and_comes_back(n_kv_head, OptimizerName::AdamW, "adamw");
    }
}

#[test]
fn a_run_goes_on_with_bitsandbytes_adamw8bit() {
    let theirs = a_run_goes_on_in_pytorch_and_comes_back(None, OptimizerName::AdamW8bit, "adamw8bit");
    // It kept what it was given in 8 bits, and stepped it.
    let state = theirs.get("opt").and_then(|opt| opt.get("state")).expect("state").entries();
    let (_, embedding) = &state[0];
    assert_eq!(embedding.get("step").and_then(Value::as_i64), Some(2 * STEPS as i64 / 3));
    assert!(embedding.get("__bnb_optimizer_quant_state__").and_then(|moments| moments.get("absmax2")).is_some());
}

#[test]
fn pytorch_starts_from_initial_weights_of_ours() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // Interrupted before the first step: no optimizer state yet, as in PyTorch.
    let mut trainer = Trainer::new(config(dir.path(), None), Start::Fresh).expect("a trainer");
    trainer.train(&mut (), &AtomicBool::new(true)).expect("saves");
    let expected = bbt_trains(config(&dir.path().join("run"), None), Start::Fresh);
    let losses = pytorch_trains(&dir.path().join("ckpt.pt"), 4, &dir.path().join("theirs.pt"), "adamw");
    for (a, b) in expected.iter().zip(&losses) {
        assert!((a - b).abs() < 2e-3, "{a} {b}");
    }
}
