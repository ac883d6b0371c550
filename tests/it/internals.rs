//! A look inside says what PyTorch finds in the same model, whatever computes it, and changes nothing.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::common::{assert_same_checkpoint, free_port, text};
use bbt::checkpoint::torch_file;
use bbt::config::{ActQuant, Config, ModelConfig, Order, Precision, QuantKernel, TrainConfig, WeightQuant};
use bbt::launch::RankEnv;
use bbt::training::metrics::{self, InternalsRow, LayerRow, Row, TrainObserver, TrainRow};
use bbt::training::utilisation::flops_per_byte;
use bbt::training::{Start, Trainer, setup_ddp};

const STEPS: u64 = 4;

fn config(out: &Path) -> Config {
    let mut config = Config {
        model: ModelConfig {
            n_layer: 2,
            d_model: 64,
            n_head: 4,
            n_kv_head: Some(2),
            d_ff: 96,
            ..ModelConfig::default()
        },
        ..Config::default()
    };
    config.data.train = text().to_str().expect("a UTF-8 path").into();
    config.data.order = Order::Sequential;
    config.data.seq_len = Some(48);
    config.train = TrainConfig {
        steps: STEPS,
        batch_size: 3,
        precision: Precision::Fp32,
        log_every: 1,
        internals_every: 1,
        out: out.into(),
        ..config.train
    };
    config
}

#[derive(Default)]
struct Seen {
    rows: Vec<TrainRow>,
    looks: Vec<InternalsRow>,
}

impl TrainObserver for Seen {
    fn on_step(&mut self, row: &TrainRow) {
        self.rows.push(row.clone());
    }
    fn on_internals(&mut self, row: &InternalsRow) {
        self.looks.push(row.clone());
    }
}

fn train(config: Config, start: Start) -> Seen {
    let mut seen = Seen::default();
    Trainer::new(config, start).expect("a trainer").train(&mut seen, &AtomicBool::new(false)).expect("trains");
    seen
}

/// A checkpoint of fresh weights in `dir`.
fn initial(dir: &Path, change: impl Fn(&mut Config)) -> PathBuf {
    let mut config = config(&dir.join("initial"));
    change(&mut config);
    let mut trainer = Trainer::new(config, Start::Fresh).expect("a trainer");
    // Interrupted before the first step.
    trainer.train(&mut (), &AtomicBool::new(true)).expect("saves");
    dir.join("initial/ckpt.pt")
}

/// The numbers of a layer by name; fractions first.
fn numbers(layer: &LayerRow) -> [(&'static str, Option<f64>); 8] {
    [
        ("zero", layer.zero),
        ("plus", layer.plus),
        ("minus", layer.minus),
        ("flips", layer.flips),
        ("gamma", layer.gamma),
        ("grad_norm", Some(layer.grad_norm)),
        ("input_absmax", layer.input_absmax),
        ("input_absmax_mean", layer.input_absmax_mean),
    ]
}

/// Asserts that fractions differ by no more than `fraction`, and other numbers by no more than `factor` of themselves.
fn close(found: &InternalsRow, expected: &InternalsRow, fraction: f64, factor: f64, what: &str) {
    assert_eq!((found.step, found.layers.len()), (expected.step, expected.layers.len()), "{what}");
    for (found, expected) in found.layers.iter().zip(&expected.layers) {
        assert_eq!(found.name, expected.name, "{what}");
        for (index, ((name, a), (_, b))) in numbers(found).into_iter().zip(numbers(expected)).enumerate() {
            let what = format!("{what}: {} {name}: {a:?} {b:?}", found.name);
            assert_eq!(a.is_some(), b.is_some(), "{what}");
            let (Some(a), Some(b)) = (a, b) else { continue };
            let bound = if index < 4 { fraction } else { factor * b.abs() };
            assert!((a - b).abs() <= bound, "{what}");
        }
    }
}

#[test]
fn pytorch_finds_the_same_by_hooks() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // Rounded activations turn with last bits and make another run: then only the first step is compared, whose weights
    // are the same (`golden_training.rs` says how far a step may be off). Weights alone let all steps be.
    for act in [ActQuant::Int8, ActQuant::None] {
        let dir = dir.path().join(format!("{act:?}"));
        pytorch_finds_the_same(&dir, act);
    }
}

fn pytorch_finds_the_same(dir: &Path, act: ActQuant) {
    let accumulate = |config: &mut Config| (config.train.grad_accum, config.quant.act) = (2, act);
    let start = initial(dir, accumulate);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/internals.py");
    let (steps, two) = (STEPS.to_string(), "2");
    let printed = crate::common::python(&[
        script.as_os_str(),
        start.as_os_str(),
        text().as_os_str(),
        steps.as_ref(),
        two.as_ref(),
    ]);
    let expected: Vec<InternalsRow> = printed.lines().map(|row| serde_json::from_str(row).expect("a row")).collect();
    assert_eq!(expected.len() as u64, STEPS);
    for kernel in [QuantKernel::Reference, QuantKernel::Fused] {
        for checkpointing in [false, true] {
            let mut config = config(&dir.join(format!("{kernel:?}{checkpointing}")));
            accumulate(&mut config);
            (config.quant.kernel, config.train.checkpointing) = (kernel, checkpointing);
            let found = train(config, Start::Init(start.clone())).looks;
            assert_eq!(found.len() as u64, STEPS);
            for (found, expected) in found.iter().zip(&expected) {
                // Of the smallest layer a weight at a threshold is 5e-4.
                let factor = match act {
                    ActQuant::Int8 if found.step == 0 => 6e-2,
                    ActQuant::Int8 => continue,
                    _ => 2e-2,
                };
                close(found, expected, 2e-3, factor, &format!("{act:?} {kernel:?} {checkpointing} {}", found.step));
            }
            // That there is something to see: three values, of which some change, and no more than there are weights.
            let layer = &found[1].layers[2];
            assert_eq!(layer.name, "blocks.0.attn.q_proj");
            assert!(layer.flips.is_some_and(|flips| flips > 1e-3 && flips < 0.2), "{layer:?}");
            let [zero, plus, minus] = [layer.zero, layer.plus, layer.minus].map(|part| part.expect("a fraction"));
            assert!((zero + plus + minus - 1.0).abs() < 1e-12 && zero > 0.2 && plus > 0.2 && minus > 0.2, "{layer:?}");
            assert!(found[0].layers.iter().all(|layer| layer.flips.is_none()), "nothing to compare with yet");
        }
    }
}

#[test]
fn lower_precisions_and_recomputation_show_the_same() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let start = initial(dir.path(), |_| {});
    let look = |precision, kernel, checkpointing: bool| {
        let mut config = config(&dir.path().join(format!("{precision:?}{kernel:?}{checkpointing}")));
        (config.train.precision, config.train.checkpointing, config.quant.kernel) = (precision, checkpointing, kernel);
        train(config, Start::Init(start.clone())).looks
    };
    let expected = look(Precision::Fp32, QuantKernel::Reference, false);
    for kernel in [QuantKernel::Reference, QuantKernel::Fused] {
        for precision in [Precision::Bf16, Precision::Fp16] {
            let [plain, recomputed] = [false, true].map(|checkpointing| look(precision, kernel, checkpointing));
            assert_eq!(plain, recomputed, "{precision:?} {kernel:?}: to the last bit");
            // Gradients are those of the loss, not of the scaled one.
            close(&plain[0], &expected[0], 2e-3, 0.1, &format!("{precision:?} {kernel:?}"));
        }
    }
}

#[test]
fn full_precision_layers_have_inputs_and_gradients() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut config = config(dir.path());
    (config.quant.weight, config.quant.act) = (WeightQuant::None, ActQuant::None);
    let looks = train(config, Start::Fresh).looks;
    let layer = &looks[1].layers[2];
    assert_eq!((layer.zero, layer.flips, layer.gamma), (None, None, None));
    assert!(
        layer.grad_norm > 0.0 && layer.input_absmax > layer.input_absmax_mean && layer.input_absmax_mean > Some(0.0)
    );
}

#[test]
fn looking_changes_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let start = initial(dir.path(), |_| {});
    for (precision, kernel) in [
        (Precision::Fp32, QuantKernel::Reference),
        (Precision::Fp16, QuantKernel::Fused),
        (Precision::Bf16, QuantKernel::Auto),
    ] {
        let run = |every| {
            let out = dir.path().join(format!("{every}{precision:?}"));
            let mut config = config(&out);
            config.quant.kernel = kernel;
            (config.train.precision, config.train.internals_every) = (precision, every);
            let seen = train(config, Start::Init(start.clone()));
            let rows = metrics::read(&out.join("metrics.jsonl")).expect("a log");
            let logged: Vec<u64> = rows.iter().filter(|row| matches!(row, Row::Internals(_))).map(Row::step).collect();
            assert_eq!(seen.looks.iter().map(|look| look.step).collect::<Vec<_>>(), logged);
            (torch_file::read(&out.join("ckpt.pt")).expect("reads"), logged)
        };
        let (never, none) = run(0);
        assert!(none.is_empty());
        for (every, steps) in [(1, vec![0, 1, 2, 3]), (3, vec![0, 3])] {
            let (looked, logged) = run(every);
            assert_eq!(logged, steps);
            assert_same_checkpoint(&never, &looked, "");
        }
    }
}

#[test]
fn a_resumed_run_looks_anew() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let start = initial(dir.path(), |_| {});
    let whole = train(config(&dir.path().join("whole")), Start::Init(start.clone())).looks;
    let parts = dir.path().join("parts");
    let mut first = config(&parts);
    first.train.stop_at = Some(2);
    let mut looks = train(first, Start::Init(start)).looks;
    let resume = Start::Resume { path: parts.join("ckpt.pt"), optimizer_state: true };
    looks.extend(train(config(&parts), resume).looks);
    // All is exact, but for the flips of the first look, which the new process knows nothing to compare with.
    let mut expected = whole;
    expected[2].layers.iter_mut().for_each(|layer| layer.flips = None);
    assert_eq!(looks.len(), expected.len());
    looks.iter().zip(&expected).for_each(|(look, expected)| assert_eq!(look, expected));
}

/// A rank of two in a thread; what rank 0 sees.
fn ranks(config: &Config) -> Seen {
    let port = free_port();
    let ranks = [0, 1].map(|rank| {
        let config = config.clone();
        std::thread::spawn(move || {
            let env = RankEnv {
                rank,
                local_rank: rank,
                world_size: 2,
                local_world_size: 2,
                master_addr: "127.0.0.1".into(),
                master_port: port,
                agent_store: false,
                restart_count: 0,
            };
            let ddp = Rc::new(setup_ddp(env, Duration::from_secs(60), Arc::new(|_| {})).expect("connects"));
            let mut seen = Seen::default();
            let start = Start::Init(config.train.out.with_file_name("initial").join("ckpt.pt"));
            let mut trainer = Trainer::distributed(config, start, ddp.clone()).expect("a trainer");
            trainer.train(&mut seen, &AtomicBool::new(false)).expect("trains");
            ddp.done();
            seen
        })
    });
    let [seen, other] = ranks.map(|rank| rank.join().expect("a rank"));
    assert!(other.looks.is_empty() && other.rows.is_empty(), "rank 0 alone tells");
    seen
}

#[test]
fn gradients_are_of_all_ranks_and_inputs_of_the_first() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let start = initial(dir.path(), |_| {});
    let alone = |batch_size| {
        let mut config = config(&dir.path().join(format!("alone{batch_size}")));
        // Sums of other batches differ in last bits, which turn rounded activations.
        (config.train.batch_size, config.quant.act) = (batch_size, ActQuant::None);
        train(config, Start::Init(start.clone())).looks
    };
    let (joint, own) = (alone(4), alone(2));
    for zero_stage in [0, 1] {
        let mut config = config(&dir.path().join(format!("zero{zero_stage}")));
        (config.train.batch_size, config.ddp.zero_stage, config.quant.act) = (2, zero_stage, ActQuant::None);
        config.train.peak_tflops = Some(0.25);
        let seen = ranks(&config);
        for (look, joint) in seen.looks.iter().zip(&joint) {
            let mut expected = joint.clone();
            for (layer, look) in expected.layers.iter_mut().zip(&look.layers) {
                (layer.input_absmax, layer.input_absmax_mean) = (look.input_absmax, look.input_absmax_mean);
            }
            let (fraction, factor) = if look.step == 0 { (0.0, 1e-4) } else { (2e-3, 2e-2) };
            close(look, &expected, fraction, factor, &format!("zero {zero_stage}, step {}", look.step));
        }
        assert_eq!(seen.looks.len() as u64, STEPS);
        // Rank 0 has the first half of the joint batch.
        for (look, own) in seen.looks[0].layers.iter().zip(&own[0].layers) {
            assert_eq!((look.input_absmax, look.input_absmax_mean), (own.input_absmax, own.input_absmax_mean));
        }
        // The norm of all is that of the parts.
        for (row, look) in seen.rows.iter().zip(&seen.looks) {
            let norm = look.layers.iter().map(|layer| layer.grad_norm.powi(2)).sum::<f64>().sqrt();
            assert!((norm / row.grad_norm - 1.0).abs() < 1e-5, "zero {zero_stage}: {norm} {}", row.grad_norm);
            // Two devices.
            let flops = row.bytes_per_second * flops_per_byte(&config.model, row.seq_len);
            assert!(row.mfu.is_some_and(|mfu| (mfu * 0.5e12 / flops - 1.0).abs() < 1e-9), "{row:?}");
        }
    }
}

#[test]
fn utilisation_is_of_the_peak_that_is_set_and_null_without_one() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for peak in [None, Some(0.5)] {
        let mut config = config(dir.path());
        (config.data.seq_len, config.data.curriculum) = (None, Some(vec![(0.0, 16), (0.5, 48)]));
        config.train.peak_tflops = peak;
        let model = config.model.clone();
        let rows = train(config, Start::Fresh).rows;
        assert_eq!(rows.iter().map(|row| row.seq_len).collect::<Vec<_>>(), [16, 16, 48, 48]);
        for row in &rows {
            let expected = peak.map(|peak| row.bytes_per_second * flops_per_byte(&model, row.seq_len) / (peak * 1e12));
            assert_eq!(row.mfu.is_some(), expected.is_some());
            let (Some(mfu), Some(expected)) = (row.mfu, expected) else { continue };
            assert!((mfu / expected - 1.0).abs() < 1e-9, "{mfu} {expected}");
        }
        let log = std::fs::read_to_string(dir.path().join("metrics.jsonl")).expect("a log");
        let first: serde_json::Value = serde_json::from_str(log.lines().next().expect("a row")).expect("JSON");
        assert_eq!(first.get("mfu").map(serde_json::Value::is_null), Some(peak.is_none()), "{first}");
    }
}
