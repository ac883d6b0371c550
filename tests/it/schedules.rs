//! What changes over a run: schedules and parameter groups as PyTorch has them, and quantization that comes in.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::common::{assert_same_checkpoint, text};
use bbt::checkpoint::{load_model, torch_file};
use bbt::config::{
    ActQuant, Config, Decay, ModelConfig, OptimConfig, Order, Precision, QuantKernel, Schedule, WeightQuant,
};
use bbt::libtorch::drawing_alone;
use bbt::models::BitByteLM;
use bbt::training::evaluation::{EvalOptions, evaluate};
use bbt::training::lr_scheduler::{lr_for_step, weight_decay_for_step};
use bbt::training::metrics::{self, Row, TrainRow};
use bbt::training::{Start, Trainer};
use bbt::utils::decay::DecayingTensors;
use bbt::utils::optim::Optimizer;
use tch::{Device, Kind, Tensor};

fn python(code: &str, arguments: &[&str]) -> String {
    let mut all = vec!["-c".as_ref(), code.as_ref()];
    all.extend(arguments.iter().map(|argument| std::ffi::OsStr::new(*argument)));
    crate::common::python(&all)
}

/// The learning rates of each step by PyTorch's own schedulers: a line each for cosine, constant, wsd and two_stage.
const SCHEDULERS: &str = include_str!("../python/lr_schedulers.py");

#[test]
fn learning_rates_are_those_of_pytorchs_schedulers() {
    for (total, warmup, stage) in [(200, 20, 0.5), (1000, 7, 0.3)] {
        let config = |schedule| OptimConfig {
            schedule,
            lr: 3e-3,
            warmup_steps: Some(warmup),
            min_lr_factor: 0.05,
            stage_frac: stage,
            ..OptimConfig::default()
        };
        let optim = config(Schedule::Cosine);
        let whole = [total, warmup, optim.decay_steps(total), optim.second_stage(total)].map(|n| n.to_string());
        let parts = [optim.lr, optim.min_lr_factor, optim.stage_lr_factor].map(|x| x.to_string());
        let arguments: Vec<&str> = whole.iter().chain(&parts).map(String::as_str).collect();
        let printed = python(SCHEDULERS, &arguments);
        let schedules = [Schedule::Cosine, Schedule::Constant, Schedule::Wsd, Schedule::TwoStage];
        assert_eq!(printed.lines().count(), schedules.len(), "{printed}");
        for (schedule, line) in schedules.into_iter().zip(printed.lines()) {
            let theirs: Vec<f64> = line.split(' ').map(|lr| lr.parse().expect("a rate")).collect();
            assert_eq!(theirs.len() as u64, total);
            for (step, theirs) in (0..).zip(theirs) {
                let ours = lr_for_step(step, total, &config(schedule));
                // PyTorch multiplies its way from step to step.
                assert!((ours / theirs - 1.0).abs() < 1e-10, "{schedule:?} {step}: {ours} {theirs}");
            }
        }
    }
}

/// AdamW with two parameter groups, over given gradients, learning rates and weight decays; a step with gradients that
/// are not finite is left out, as GradScaler does.
const GROUPS: &str = include_str!("../python/parameter_groups.py");

#[test]
fn matrices_decay_as_a_parameter_group_of_pytorchs() {
    const STEPS: u64 = 12;
    let cpu = (Kind::Float, Device::Cpu);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let optim = OptimConfig {
        schedule: Schedule::TwoStage,
        lr: 2e-2,
        weight_decay: 0.7,
        warmup_steps: Some(2),
        stage_frac: 0.6,
        decay: Decay::Matrices,
        ..OptimConfig::default()
    };
    let shapes: [&[i64]; 5] = [&[16, 33], &[33], &[7, 5], &[3, 4, 2], &[1]];
    let params = shapes.map(|shape| drawing_alone(|| Tensor::randn(shape, cpu)).set_requires_grad(true));
    let grads = |step: u64| {
        let grads = shapes.map(|shape| drawing_alone(|| Tensor::randn(shape, cpu)));
        if step == 4 {
            let _ = grads[2].view(-1).narrow(0, 3, 1).fill_(f64::NAN);
        }
        grads
    };
    let grads: Vec<[Tensor; 5]> = (0..STEPS).map(grads).collect();
    let mut given: Vec<(String, Tensor)> =
        params.iter().enumerate().map(|(i, p)| (format!("p{i}"), p.detach().copy())).collect();
    for (step, grads) in grads.iter().enumerate() {
        given.extend(grads.iter().enumerate().map(|(i, g)| (format!("g{step}p{i}"), g.shallow_clone())));
    }
    let [from, to] = ["given.safetensors", "theirs.safetensors"].map(|name| dir.path().join(name));
    Tensor::write_safetensors(&given, &from).expect("writes");
    let rates: Vec<f64> = (0..STEPS).map(|step| lr_for_step(step, STEPS, &optim)).collect();
    let decays: Vec<f64> = (0..STEPS).map(|step| weight_decay_for_step(step, STEPS, &optim)).collect();
    assert!(decays.contains(&0.7) && decays.contains(&0.0));
    let json = |numbers: &[f64]| serde_json::to_string(numbers).expect("JSON");
    let paths = [&from, &to].map(|path| path.to_str().expect("a UTF-8 path"));
    python(GROUPS, &[paths[0], &json(&rates), &json(&decays), paths[1]]);

    let decaying = DecayingTensors::matrices(&params);
    let mut optimizer = Optimizer::new(params.each_ref().map(Tensor::shallow_clone).into(), &optim);
    for ((grads, &lr), &weight_decay) in grads.iter().zip(&rates).zip(&decays) {
        let is_finite = grads.iter().all(|g| g.isfinite().all().int64_value(&[]) == 1);
        let found_inf = Tensor::full([], if is_finite { 0.0 } else { 1.0 }, cpu);
        decaying.decay(lr, weight_decay, &found_inf).expect("decays");
        optimizer.step(grads, lr, 0.0, &found_inf).expect("steps");
    }
    let theirs: HashMap<String, Tensor> = Tensor::read_safetensors(&to).expect("reads").into_iter().collect();
    for (i, param) in params.iter().enumerate() {
        let difference = (param.detach() - &theirs[&format!("p{i}")]).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "p{i}: {difference}");
    }
}

/// A run in which everything changes.
fn config(precision: Precision, kernel: QuantKernel, out: &Path) -> Config {
    let mut config = Config {
        model: ModelConfig { n_layer: 2, d_model: 32, n_head: 2, d_ff: 64, ..ModelConfig::default() },
        ..Config::default()
    };
    config.data.train = text().to_str().expect("a UTF-8 path").into();
    config.data.val = Some(config.data.train.clone());
    config.data.order = Order::Shuffled;
    config.data.seq_len = Some(24);
    (config.quant.start_frac, config.quant.kernel) = (0.6, kernel);
    (config.optim.schedule, config.optim.decay) = (Schedule::TwoStage, Decay::Matrices);
    config.train.steps = 10;
    config.train.batch_size = 2;
    config.train.grad_accum = 2;
    config.train.precision = precision;
    config.train.log_every = 1;
    config.train.eval_every = 1;
    config.train.eval_bytes = Some(500);
    config.train.save_every = 1;
    config.train.keep = 20;
    config.train.out = out.into();
    config
}

fn train(config: Config, start: Start) -> Trainer {
    let mut trainer = Trainer::new(config, start).expect("a trainer");
    trainer.train(&mut (), &AtomicBool::new(false)).expect("trains");
    trainer
}

/// The log without what depends on the clock and the machine.
fn log(dir: &Path) -> Vec<Row> {
    let timeless = |row| match row {
        Row::Train(row) => Row::Train(TrainRow { bytes_per_second: 0.0, data_wait: 0.0, peak_memory_bytes: 0, ..row }),
        val => val,
    };
    metrics::read(&dir.join("metrics.jsonl")).expect("a log").into_iter().map(timeless).collect()
}

fn resume(from: &Path) -> Start {
    Start::Resume { path: from.into(), optimizer_state: true }
}

#[test]
fn a_run_in_which_everything_changes_resumes_bit_for_bit() {
    for (precision, kernel, checkpointing) in [
        (Precision::Fp32, QuantKernel::Fused, true),
        (Precision::Bf16, QuantKernel::Reference, false),
        (Precision::Bf16, QuantKernel::Fused, true),
        (Precision::Fp16, QuantKernel::Fused, false),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let whole = dir.path().join("whole");
        let config = |out: &Path| {
            let mut config = config(precision, kernel, out);
            (config.train.checkpointing, config.train.save_every) = (checkpointing, 0);
            config
        };
        train(config(&whole), Start::Fresh);
        // While quantization comes in, when it has just come, and after the second stage's beginning.
        for stop in [2, 6, 8] {
            let parts = dir.path().join(format!("parts{stop}"));
            let mut first = config(&parts);
            first.train.stop_at = Some(stop);
            train(first, Start::Fresh);
            train(config(&parts), resume(&parts.join("ckpt.pt")));
            let read = |dir: &Path| torch_file::read(&dir.join("ckpt.pt")).expect("reads");
            assert_same_checkpoint(&read(&whole), &read(&parts), "");
            assert_eq!(log(&whole), log(&parts), "{precision:?} {kernel:?} {stop}");
        }
    }
}

/// Validation in the run, the checkpoint saved then, and the model of a trainer that goes on from it: one model.
#[test]
fn a_checkpoint_is_quantized_as_far_as_its_run_was() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let configuration = config(Precision::Fp32, QuantKernel::Fused, dir.path());
    let text = std::fs::read(&configuration.data.train).expect("text.bin");
    let mut whole = configuration.clone();
    whole.train.eval_bytes = None;
    let trained = train(whole.clone(), Start::Fresh);
    let options = EvalOptions { seq_len: 24, stride: 24, precision: Precision::Fp32 };
    let loss = |model: &BitByteLM| evaluate(model, &[&text], options, Device::Cpu, |_| {}).expect("evaluates").loss;
    let mut seen = 0;
    for row in log(dir.path()) {
        let Row::Val(row) = row else { continue };
        let path = dir.path().join(format!("ckpt-{:08}.pt", row.step + 1));
        let (_vs, mut model) = load_model(&path, Device::Cpu).expect("loads");
        assert!((loss(&model) - row.val_loss).abs() < 1e-6, "step {}", row.step);
        assert!(
            (loss(Trainer::new(whole.clone(), resume(&path)).expect("a trainer").model()) - row.val_loss).abs() < 1e-6
        );
        // And quantized altogether it is another one, but from 0.6 of the run on.
        model.set_quantization(1.0);
        assert_eq!((loss(&model) - row.val_loss).abs() < 1e-6, row.step + 1 >= 6, "step {}", row.step);
        seen += 1;
    }
    assert_eq!(seen, 10);
    // The finished model is what it is without any of this: as in another run that starts from it.
    let (_vs, model) = load_model(&dir.path().join("ckpt.pt"), Device::Cpu).expect("loads");
    assert_eq!(loss(&model), loss(trained.model()));
}

/// From full precision a run begins as one without quantization does, and ends as one with.
#[test]
fn the_first_step_is_in_full_precision() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let first_loss = |name: &str, change: &dyn Fn(&mut Config), start: Start| {
        let mut config = config(Precision::Fp32, QuantKernel::Auto, &dir.path().join(name));
        change(&mut config);
        train(config, start);
        let Row::Train(first) = log(&dir.path().join(name)).remove(0) else { panic!("a step comes first") };
        first.loss
    };
    first_loss("begun", &|config| config.train.steps = 1, Start::Fresh);
    let start = Start::Init(dir.path().join("begun/ckpt.pt"));
    let gradual = first_loss("gradual", &|_| {}, start.clone());
    let full = |config: &mut Config| {
        (config.quant.weight, config.quant.act) = (WeightQuant::None, ActQuant::None);
    };
    assert_eq!(gradual, first_loss("full", &full, start.clone()));
    assert_ne!(gradual, first_loss("at once", &|config| config.quant.start_frac = 0.0, start));
}

#[test]
fn matrices_alone_decay_in_a_run() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let weights = |name: &str, decay: Decay, weight_decay: f64, start: Start| {
        let mut config = config(Precision::Fp32, QuantKernel::Auto, &dir.path().join(name));
        (config.optim.decay, config.optim.weight_decay) = (decay, weight_decay);
        config.train.stop_at = Some(1);
        train(config, start).var_store().variables()
    };
    weights("begun", Decay::All, 0.0, Start::Fresh);
    let start = || Start::Init(dir.path().join("begun/ckpt.pt"));
    let [none, all] = [("none", 0.0), ("all", 2.0)].map(|(name, decay)| weights(name, Decay::All, decay, start()));
    for (name, param) in weights("matrices", Decay::Matrices, 2.0, start()) {
        let difference = |other: &HashMap<String, Tensor>| (&param - &other[&name]).abs().max().double_value(&[]);
        let (same, other) = if param.dim() >= 2 { (&all, &none) } else { (&none, &all) };
        assert!(difference(same) < 1e-7 && difference(other) > 1e-4, "{name}");
    }
}

#[test]
fn the_saved_optimizer_is_pytorchs_with_the_rates_of_the_last_step() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // The last step of the first stage, the first of the second, the last of all.
    for (steps, weight_decay) in [(5, 0.1), (6, 0.0), (10, 0.0)] {
        let mut config = config(Precision::Fp32, QuantKernel::Auto, &dir.path().join(steps.to_string()));
        config.train.stop_at = Some(steps);
        let lr = lr_for_step(steps - 1, 10, &config.optim);
        let checkpoint = config.train.out.join("ckpt.pt");
        train(config, Start::Fresh);
        python(
            include_str!("../python/saved_optimizer.py"),
            &[checkpoint.to_str().expect("a UTF-8 path"), &lr.to_string(), &weight_decay.to_string()],
        );
    }
}
