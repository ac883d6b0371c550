//! The whole model and the training loop against the numbers of the PyTorch original.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::common::{Golden, STES, relative_difference};
use bbt::checkpoint::{TrainingCheckpoint, load_model};
use bbt::config::{Config, OptimConfig, Order, Precision, Schedule, TrainConfig};
use bbt::data::{Loader, LoaderOptions, Position};
use bbt::inference::{Generator, Sampling};
use bbt::models::BitByteLM;
use bbt::training::evaluation::{EvalOptions, evaluate, inputs_and_targets};
use bbt::training::loss::cross_entropy;
use bbt::training::lr_scheduler::{lr_for_step, seq_len_for_step};
use bbt::training::metrics::{TrainObserver, TrainRow};
use bbt::training::{Start, Trainer};
use tch::{Device, Tensor, nn};

const FOLDERS: [&str; 2] = ["bitbyte_tiny", "bitbyte_tiny_no_act_quant"];

/// The golden run's configuration: its batches are the windows of text.bin in order.
fn config(golden: &Golden, ste: bbt::config::Ste, out: &Path) -> Config {
    let meta = &golden.meta;
    let number = |key: &str| meta[key].as_f64().expect(key);
    let mut config = Config {
        model: golden.model_config(),
        quant: golden.quant_config(ste),
        optim: OptimConfig {
            lr: number("lr"),
            weight_decay: number("wd"),
            warmup_frac: number("warmup_frac"),
            grad_clip: number("grad_clip"),
            ..OptimConfig::default()
        },
        train: TrainConfig {
            steps: number("steps") as u64,
            batch_size: number("batch") as i64,
            precision: Precision::Fp32,
            log_every: 1,
            out: out.into(),
            ..TrainConfig::default()
        },
        ..Config::default()
    };
    config.data.train = golden.dir.join("text.bin").to_str().expect("a UTF-8 path").into();
    config.data.order = Order::Sequential;
    config.data.seq_len = Some(number("seq_len") as i64);
    config
}

#[derive(Default)]
struct Rows(Vec<TrainRow>);

impl TrainObserver for Rows {
    fn on_step(&mut self, row: &TrainRow) {
        self.0.push(row.clone());
    }
}

fn initial_model(golden: &Golden, ste: bbt::config::Ste) -> (nn::VarStore, BitByteLM) {
    let vs = nn::VarStore::new(Device::Cpu);
    let model = BitByteLM::new(&vs.root(), &golden.model_config(), &golden.quant_config(ste));
    let checkpoint = TrainingCheckpoint::open(&golden.dir.join("init.pt")).expect("init.pt opens");
    checkpoint.load_weights(&vs).expect("its weights load strictly");
    (vs, model)
}

/// The first golden batch, `[2, 65]`.
fn first_batch(golden: &Golden) -> (Tensor, Tensor) {
    let tokens = golden.tensor("batches").get(0);
    let length = tokens.size()[1] - 1;
    (tokens.narrow(1, 0, length), tokens.narrow(1, 1, length))
}

#[test]
fn first_logits_and_every_first_gradient() {
    for folder in FOLDERS {
        let golden = Golden::open(folder);
        for (name, ste) in STES {
            for checkpointing in [false, true] {
                let (vs, mut model) = initial_model(&golden, ste);
                model.set_checkpointing(checkpointing);
                let (inputs, targets) = first_batch(&golden);
                let logits = model.forward(&inputs);
                let difference = relative_difference(&logits.detach(), golden.tensor("logits0"));
                assert!(difference < 1e-5, "{folder} {name}: logits differ by {difference}");
                cross_entropy(&logits, &targets).backward();
                let variables = vs.variables();
                let expected = golden.with_prefix(&format!("grad0.{name}."));
                assert_eq!(expected.len(), variables.len());
                for (parameter, gradient) in expected {
                    let difference = relative_difference(&variables[&parameter].grad(), &gradient);
                    assert!(difference < 1e-5, "{folder} {name}: gradient of {parameter} differs by {difference}");
                }
            }
        }
    }
}

#[test]
fn twenty_steps_reproduce_losses_learning_rates_and_gradient_norms() {
    for folder in FOLDERS {
        let golden = Golden::open(folder);
        for (name, ste) in STES {
            let out = tempfile::tempdir().expect("a temporary directory");
            let config = config(&golden, ste, out.path());
            let mut trainer = Trainer::new(config, Start::Init(golden.dir.join("init.pt"))).expect("a trainer");
            let mut rows = Rows::default();
            let summary = trainer.train(&mut rows, &AtomicBool::new(false)).expect("trains");
            assert!(summary.finished);
            let expected = golden.meta[format!("trajectory_{name}")].as_array().expect("a trajectory");
            assert_eq!(rows.0.len(), expected.len());
            for (row, expected) in rows.0.iter().zip(expected) {
                let number = |key: &str| expected[key].as_f64().expect(key);
                assert_eq!(Some(row.step), expected["step"].as_u64());
                assert!((row.lr / number("lr") - 1.0).abs() < 1e-12, "{folder} {name} {row:?}");
                assert!((row.loss - number("loss")).abs() < 2e-3, "{folder} {name}: {} {expected}", row.loss);
                let norm = row.grad_norm / number("grad_norm") - 1.0;
                assert!(norm.abs() < 1e-2, "{folder} {name}: {} {expected}", row.grad_norm);
            }
            // What was trained is what the original trained.
            let (_, model) = load_model(&summary.checkpoint, Device::Cpu).expect("loads");
            let logits = tch::no_grad(|| model.forward(&first_batch(&golden).0));
            let difference = relative_difference(&logits, golden.tensor(&format!("final_logits.{name}")));
            assert!(difference < 3e-2, "{folder} {name}: final logits differ by {difference}");
        }
    }
}

#[test]
fn the_originals_checkpoints_give_its_logits_loss_and_greedy_bytes() {
    for folder in FOLDERS {
        let golden = Golden::open(folder);
        for (name, _) in STES {
            let path = golden.dir.join(format!("final_{name}.pt"));
            let (_vs, mut model) = load_model(&path, Device::Cpu).expect("loads");
            let logits = tch::no_grad(|| model.forward(&first_batch(&golden).0));
            let difference = relative_difference(&logits, golden.tensor(&format!("final_logits.{name}")));
            assert!(difference < 1e-5, "{folder} {name}: logits differ by {difference}");

            let expected = &golden.meta[format!("eval_{name}")];
            let text = std::fs::read(golden.dir.join("text.bin")).expect("text.bin");
            let seq_len = expected["seq_len"].as_u64().expect("seq_len") as usize;
            let options = EvalOptions { seq_len, stride: seq_len, precision: Precision::Fp32 };
            let found = evaluate(&model, &[&text], options, Device::Cpu, |_| {}).expect("evaluates");
            assert_eq!(Some(found.bytes), expected["bytes"].as_u64());
            assert!((found.loss - expected["loss"].as_f64().expect("loss")).abs() < 1e-4, "{found:?} {expected}");
            let bits = expected["bits_per_byte"].as_f64().expect("bits_per_byte");
            assert!((found.bits_per_byte() - bits).abs() < 2e-4, "{found:?} {expected}");

            model.freeze();
            let expected = &golden.meta[format!("greedy_{name}")];
            let prompt = expected["prompt"].as_str().expect("prompt").as_bytes();
            let greedy = Sampling { temperature: 0.0, top_k: None, top_p: None, seed: 0 };
            let new = expected["max_new_tokens"].as_u64().expect("max_new_tokens") as usize;
            let mut bytes = prompt.to_vec();
            bytes.extend(Generator::new(&model, Device::Cpu, prompt, greedy).take(new));
            assert_eq!(serde_json::json!(bytes), expected["bytes"], "{folder} {name}");
        }
    }
}

#[test]
fn the_golden_batches_are_the_windows_of_the_text_in_order() {
    let golden = Golden::open("bitbyte_tiny");
    let dataset = bbt::data::open(golden.dir.join("text.bin").to_str().expect("a UTF-8 path")).expect("text.bin");
    let options = LoaderOptions {
        order: Order::Sequential,
        seed: 0,
        start: Position::default(),
        batch_size: 2,
        grad_accum: 1,
        rank: 0,
        world: 1,
    };
    let mut loader = Loader::new(dataset, options, [64; 20]).expect("a loader");
    let batches = golden.tensor("batches");
    for step in 0..20 {
        let found = loader.next().expect("a batch").expect("reads");
        let (inputs, targets) = inputs_and_targets(&found.bytes, found.rows, Device::Cpu);
        let batch = batches.get(step);
        assert!(inputs.equal(&batch.narrow(1, 0, 64)) && targets.equal(&batch.narrow(1, 1, 64)), "step {step}");
    }
    assert!(loader.next().is_none());
}

#[test]
fn schedules_follow_the_originals_tables() {
    let golden = Golden::open("bitbyte_tiny");
    for case in golden.meta["lr_for_step"].as_array().expect("a table") {
        let whole = |key: &str| case[key].as_u64().expect(key);
        let config = OptimConfig {
            lr: case["base_lr"].as_f64().expect("base_lr"),
            warmup_steps: Some(whole("warmup_steps")),
            ..OptimConfig::default()
        };
        let lr = lr_for_step(whole("step"), whole("total_steps"), &config);
        assert!((lr / case["lr"].as_f64().expect("lr") - 1.0).abs() < 1e-12, "{lr} {case}");
        let constant = OptimConfig { schedule: Schedule::Constant, ..config };
        assert!(lr_for_step(whole("total_steps"), whole("total_steps"), &constant) == constant.lr);
    }
    for case in golden.meta["seq_len_for_step"].as_array().expect("a table") {
        let whole = |key: &str| case[key].as_i64().expect(key);
        let cap = case["cap"].as_i64().unwrap_or(i64::MAX);
        let curriculum = [(0.0, 2048), (0.2, 4096), (0.5, 8192)].map(|(start, n)| (start, n.min(cap)));
        let seq_len = seq_len_for_step(whole("step") as u64, whole("total_steps") as u64, &curriculum);
        assert_eq!(seq_len, whole("seq_len"), "{case}");
    }
}
