//! One run handed back and forth between bbt and PyTorch goes on as if it had never left either.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use bbt::checkpoint::{Value, torch_file};
use bbt::config::{ActQuant, Config, ModelConfig, OptimizerName, Order, Precision, WeightQuant};
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

fn pytorch_trains(from: &Path, stop: u64, to: &Path, optimizer: &str, is_quantized: bool) -> Vec<f64> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/bitbytelm.py");
    let stop = stop.to_string();
    let (from, text, to) = (from.as_os_str(), text(), to.as_os_str());
    let quantization = if is_quantized { "quantized" } else { "full precision" };
    let [stop, optimizer, quantization] = [&stop, optimizer, quantization].map(std::ffi::OsStr::new);
    let printed =
        crate::common::python(&[script.as_os_str(), from, text.as_os_str(), stop, to, optimizer, quantization]);
    printed.lines().map(|line| line.parse().expect("a loss")).collect()
}

/// Weights and activations in full precision: last bits stay last bits over a whole run.
fn smooth(mut config: Config) -> Config {
    (config.quant.weight, config.quant.act) = (WeightQuant::None, ActQuant::None);
    config
}

/// A file whose first window is that of step `step`: what PyTorch saves does not say where in the data it was.
fn rest_of_the_text(step: u64, dir: &Path) -> String {
    let rest = dir.join("rest.bin");
    let bytes = std::fs::read(text()).expect("text.bin");
    std::fs::write(&rest, &bytes[(step * 3 * 48) as usize..]).expect("writes");
    rest.to_str().expect("a UTF-8 path").into()
}

/// In bbt, PyTorch and bbt, a third of the steps each, beside as many in bbt alone. Returns what PyTorch wrote.
fn a_run_goes_on_in_pytorch_and_comes_back(
    n_kv_head: Option<i64>,
    (name, python_name): (OptimizerName, &str),
    bound: f64,
) -> Value {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = |out: &str| {
        let mut config = smooth(config(&dir.path().join(out), n_kv_head));
        config.optim.name = name;
        config
    };
    let initial = Start::Init(initial(dir.path(), n_kv_head));
    let whole = bbt_trains(config("whole"), initial.clone());

    let mut first = config("first");
    first.train.stop_at = Some(STEPS / 3);
    let mut losses = bbt_trains(first, initial);
    let theirs = dir.path().join("theirs.pt");
    losses.extend(pytorch_trains(&dir.path().join("first/ckpt.pt"), 2 * STEPS / 3, &theirs, python_name, false));

    let mut last = config("last");
    last.data.train = rest_of_the_text(2 * STEPS / 3, dir.path());
    losses.extend(bbt_trains(last, Start::Resume { path: theirs.clone(), optimizer_state: true }));

    assert_eq!(whole.len(), losses.len());
    let apart: Vec<f64> = whole.iter().zip(&losses).map(|(a, b)| (a - b).abs()).collect();
    println!("{python_name}, {n_kv_head:?}: {:.1e} apart", apart.iter().fold(0f64, |a, &b| a.max(b)));
    assert!(apart.iter().all(|&apart| apart < bound), "{whole:?} in one piece, {losses:?} in three");
    assert!(whole[STEPS as usize - 1] < whole[0] - 1.0, "it does not learn: {whole:?}");
    torch_file::read(&theirs).expect("reads")
}

/// Initial weights, of a run that was interrupted before its first step: no optimizer state yet, as in PyTorch.
fn initial(dir: &Path, n_kv_head: Option<i64>) -> PathBuf {
    let mut trainer = Trainer::new(config(&dir.join("initial"), n_kv_head), Start::Fresh).expect("a trainer");
    trainer.train(&mut (), &AtomicBool::new(true)).expect("saves");
    dir.join("initial/ckpt.pt")
}

#[test]
fn a_run_goes_on_with_torchs_adamw() {
    for n_kv_head in [None, Some(2)] {
        a_run_goes_on_in_pytorch_and_comes_back(n_kv_head, (OptimizerName::AdamW, "adamw"), 1e-5);
    }
}

#[test]
fn a_run_goes_on_with_bitsandbytes_adamw8bit() {
    // Where a moment lies between two codes, its last bit decides.
    let theirs = a_run_goes_on_in_pytorch_and_comes_back(None, (OptimizerName::AdamW8bit, "adamw8bit"), 2e-4);
    // It kept what it was given in 8 bits, and stepped it.
    let state = theirs.get("opt").and_then(|opt| opt.get("state")).expect("state").entries();
    let (_, embedding) = &state[0];
    assert_eq!(embedding.get("step").and_then(Value::as_i64), Some(2 * STEPS as i64 / 3));
    assert!(embedding.get("__bnb_optimizer_quant_state__").and_then(|moments| moments.get("absmax2")).is_some());
}

/// Quantized, the step after a change of hands is the step that would have come without it. Only that one: roundings
/// that turn make another run of those behind it (`golden_training.rs`).
#[test]
fn a_quantized_run_takes_the_same_step_in_pytorch_and_back() {
    for n_kv_head in [None, Some(2)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| dir.path().join(name);
        let resume = |path: &Path| Start::Resume { path: path.into(), optimizer_state: true };
        let mut first = config(&path("first"), n_kv_head);
        first.train.stop_at = Some(8);
        bbt_trains(first, Start::Fresh);
        let begun = path("first/ckpt.pt");
        let mut next = config(&path("next"), n_kv_head);
        next.train.stop_at = Some(9);
        let ours = bbt_trains(next, resume(&begun));
        let theirs = pytorch_trains(&begun, 9, &path("theirs.pt"), "adamw", true);
        let mut back = config(&path("back"), n_kv_head);
        back.data.train = rest_of_the_text(9, dir.path());
        back.train.stop_at = Some(10);
        let back = bbt_trains(back, resume(&path("theirs.pt")));
        let onwards = pytorch_trains(&path("theirs.pt"), 10, &path("onwards.pt"), "adamw", true);
        println!("{n_kv_head:?}: {ours:?} {theirs:?}, {back:?} {onwards:?}");
        assert_eq!([&ours, &theirs, &back, &onwards].map(Vec::len), [1; 4]);
        assert!((ours[0] - theirs[0]).abs() < 3e-3, "{ours:?} {theirs:?}");
        assert!((back[0] - onwards[0]).abs() < 3e-3, "{back:?} {onwards:?}");
    }
}

#[test]
fn pytorch_starts_from_initial_weights_of_ours() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let initial = initial(dir.path(), None);
    for is_quantized in [false, true] {
        let mut run = config(&dir.path().join(format!("run{is_quantized}")), None);
        run = if is_quantized { run } else { smooth(run) };
        let expected = bbt_trains(run, Start::Init(initial.clone()));
        let losses = pytorch_trains(&initial, 4, &dir.path().join("theirs.pt"), "adamw", is_quantized);
        assert_eq!(losses.len(), 4);
        let (bound, steps) = if is_quantized { (3e-3, 1) } else { (1e-5, 4) };
        for (a, b) in expected.iter().zip(&losses).take(steps) {
            assert!((a - b).abs() < bound, "{a} {b}");
        }
    }
}
