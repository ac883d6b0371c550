//! bitsandbytes' AdamW8bit: its steps and its checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use crate::common::{assert_same_checkpoint, text};
use bbt::checkpoint::{Dtype, Storage, TensorData, TrainingCheckpoint, Value, convert, torch_file};
use bbt::config::{Config, ModelConfig, OptimConfig, OptimizerName, Precision};
use bbt::kernels::Moment8bit;
use bbt::training::{Start, Trainer};
use bbt::utils::optim::{Moments, Optimizer, OptimizerState, dynamic_map};
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adamw8bit").join(name)
}

fn golden() -> HashMap<String, Tensor> {
    Tensor::read_safetensors(fixture("steps.safetensors")).expect("steps.safetensors").into_iter().collect()
}

#[test]
fn the_code_books_are_bitsandbytes() {
    let golden = golden();
    for param in ["big", "odd"] {
        for (signed, map) in [(true, "qmap1"), (false, "qmap2")] {
            let theirs = &golden[&format!("state.{param}.{map}")];
            assert!(Tensor::from_slice(&dynamic_map(signed)).equal(theirs), "{map}");
        }
    }
}

#[test]
fn six_steps_are_bitsandbytes() {
    const PARAMS: [&str; 3] = ["big", "odd", "small"];
    let golden = golden();
    let config = OptimConfig { name: OptimizerName::AdamW8bit, ..OptimConfig::default() };
    assert_eq!((config.betas, config.eps), ((0.9, 0.95), 1e-8), "those of the golden data");
    let params = PARAMS.map(|name| golden[&format!("init.{name}")].copy().set_requires_grad(true));
    let mut optimizer = Optimizer::new(params.each_ref().map(Tensor::shallow_clone).into(), &config);
    for step in 0..6 {
        let grads = PARAMS.map(|name| golden[&format!("grad.{step}.{name}")].shallow_clone());
        // A step that is skipped must leave no trace.
        optimizer.step(&grads, 0.5, 0.5, &Tensor::ones([], CPU)).expect("steps");
        optimizer.step(&grads, 0.01, 0.1, &Tensor::zeros([], CPU)).expect("steps");
        for (name, param) in PARAMS.iter().zip(&params) {
            let theirs = &golden[&format!("param.{step}.{name}")];
            let differ = (param.detach() - theirs).abs().ge(1e-5).sum(Kind::Int64).int64_value(&[]);
            // Where a moment lies between two codes its last bit decides, and the next steps use what it stands for.
            let ties = if *name == "small" || step == 0 { 0 } else { 4 };
            assert!(differ <= ties, "{differ} of {name} after step {step}");
        }
    }
    let OptimizerState::AdamW8bit(state) = &optimizer.state else { panic!("not 8 bits") };
    for (name, state) in PARAMS.iter().zip(&state.params) {
        let theirs = |key: &str| &golden[&format!("state.{name}.{key}")];
        let close = |ours: &Tensor, key: &str| {
            let difference = (ours / theirs(key) - 1.0).abs().max().double_value(&[]);
            assert!(difference < 1e-5, "{key} of {name}: {difference}");
        };
        assert_eq!(state.step.double_value(&[]), 6.0);
        match &state.moments {
            Moments::Full([first, second]) => {
                assert_eq!(*name, "small");
                close(first, "state1");
                close(second, "state2");
            }
            Moments::Quantized([first, second]) => {
                close(&first.absmax, "absmax1");
                close(&second.absmax, "absmax2");
                let same = |moment: &Moment8bit, key: &str| {
                    let steps = (moment.codes.to_kind(Kind::Int) - theirs(key).to_kind(Kind::Int)).abs();
                    let (most, all) = (steps.max().int64_value(&[]), steps.sum(Kind::Int64).int64_value(&[]));
                    assert!(most <= 1 && all <= 4, "{key} of {name}: {all} differ, by up to {most}");
                };
                same(first, "state1");
                same(second, "state2");
            }
        }
    }
}

/// That of the golden checkpoint.
fn config(name: OptimizerName, precision: Precision, out: &Path) -> Config {
    let mut config = Config {
        model: ModelConfig { n_layer: 2, d_model: 64, n_head: 4, d_ff: 160, ..ModelConfig::default() },
        ..Config::default()
    };
    config.data.train = text().to_str().expect("a UTF-8 path").into();
    config.data.seq_len = Some(24);
    config.optim.name = name;
    config.train.steps = 8;
    config.train.batch_size = 2;
    config.train.precision = precision;
    config.train.out = out.into();
    config
}

fn train(config: Config, start: Start) {
    let mut trainer = Trainer::new(config, start).expect("a trainer");
    trainer.train(&mut (), &AtomicBool::new(false)).expect("trains");
}

fn resume(path: PathBuf) -> Start {
    Start::Resume { path, optimizer_state: true }
}

#[test]
fn a_resumed_run_is_bit_identical() {
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let config = |out: &str| config(OptimizerName::AdamW8bit, precision, &dir.path().join(out));
        train(config("whole"), Start::Fresh);
        for stop in [1, 5] {
            let out = format!("parts{stop}");
            let mut first = config(&out);
            first.train.stop_at = Some(stop);
            train(first, Start::Fresh);
            let path = dir.path().join(&out).join("ckpt.pt");
            train(config(&out), resume(path.clone()));
            let whole = torch_file::read(&dir.path().join("whole/ckpt.pt")).expect("reads");
            assert_same_checkpoint(&whole, &torch_file::read(&path).expect("reads"), "");
        }
    }
}

/// Keys, types, dtypes and shapes of a value, without its numbers; equal where tensors share a storage.
fn structure(value: &Value) -> String {
    fn describe(value: &Value, storages: &mut Vec<*const bbt::checkpoint::Storage>) -> String {
        match value {
            Value::Tensor(tensor) => {
                let storage = std::sync::Arc::as_ptr(&tensor.storage);
                let known = storages.iter().position(|&other| other == storage).unwrap_or_else(|| {
                    storages.push(storage);
                    storages.len() - 1
                });
                format!("{:?} {:?} of storage {known}", tensor.dtype(), tensor.shape)
            }
            Value::Dict(entries) => {
                let entries: Vec<_> =
                    entries.iter().map(|(k, v)| format!("{k:?}: {}", describe(v, storages))).collect();
                format!("{{{}}}", entries.join("\n"))
            }
            Value::List(all) => {
                format!("[{}]", all.iter().map(|x| describe(x, storages)).collect::<Vec<_>>().join(","))
            }
            Value::Tuple(all) => format!("({})", all.iter().map(|_| "x").collect::<Vec<_>>().join(",")),
            Value::Float(_) => "float".into(),
            Value::Int(_) => "int".into(),
            other => format!("{other:?}"),
        }
    }
    describe(value, &mut vec![])
}

#[test]
fn the_golden_checkpoint_resumes_and_ours_has_its_structure() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut config = config(OptimizerName::AdamW8bit, Precision::Fp32, dir.path());
    // The checkpoint has done three.
    config.train.stop_at = Some(3);
    train(config.clone(), resume(fixture("ckpt.pt")));
    let opt = |path: &Path| torch_file::read(path).expect("reads").get("opt").expect("opt").clone();
    let (theirs, ours) = (opt(&fixture("ckpt.pt")), opt(&dir.path().join("ckpt.pt")));
    // No step was done in between: the state has the same bits, too.
    assert!(theirs.get("state").is_some() && ours.get("state") == theirs.get("state"));
    assert_eq!(structure(&ours), structure(&theirs));
    config.train.stop_at = None;
    train(config, resume(dir.path().join("ckpt.pt")));
    let after = opt(&dir.path().join("ckpt.pt"));
    assert_eq!(structure(&after), structure(&theirs));
    assert!(after.get("state") != theirs.get("state"));
}

#[test]
fn a_code_book_of_a_cpu_without_fused_multiply_add_is_bitsandbytes_too() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut value = torch_file::read(&fixture("ckpt.pt")).expect("reads");
    let Some(Value::Dict(state)) = value.get_mut("opt").and_then(|o| o.get_mut("state")) else { panic!("state") };
    let moments = state[0].1.get_mut("__bnb_optimizer_quant_state__").expect("8 bits");
    let Some(Value::Tensor(map)) = moments.get_mut("qmap1") else { panic!("qmap1") };
    let mut bytes = map.contiguous_bytes().to_vec();
    // The last bit of every number but zero, which lies at 127 of 256.
    (0..256).filter(|&i| i != 127).for_each(|i| bytes[4 * i] ^= 1);
    *map = TensorData::contiguous(Storage::new(Dtype::F32, bytes), vec![256]);
    torch_file::write(&dir.path().join("other.pt"), &value).expect("writes");
    let mut config = config(OptimizerName::AdamW8bit, Precision::Fp32, &dir.path().join("run"));
    config.train.stop_at = Some(4);
    train(config, resume(dir.path().join("other.pt")));
}

#[test]
fn converting_changes_the_moments_alone_and_what_it_writes_resumes() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| dir.path().join(name);
    let mut first = config(OptimizerName::AdamW, Precision::Fp32, &path("run"));
    first.train.stop_at = Some(5);
    train(first, Start::Fresh);
    let convert = |from: &Path, to: &str, name| {
        let from = TrainingCheckpoint::open(from).expect("opens");
        convert(&from, &path(to), None, Some(name)).expect("converts")
    };
    convert(&path("run/ckpt.pt"), "rounded.pt", OptimizerName::AdamW8bit);
    convert(&path("rounded.pt"), "full.pt", OptimizerName::AdamW);
    convert(&path("full.pt"), "again.pt", OptimizerName::AdamW8bit);
    let read = |name: &str| torch_file::read(&path(name)).expect("reads");
    let [run, rounded, full, again] = ["run/ckpt.pt", "rounded.pt", "full.pt", "again.pt"].map(read);
    assert_eq!(structure(rounded.get("opt").expect("opt")), {
        structure(torch_file::read(&fixture("ckpt.pt")).expect("reads").get("opt").expect("opt"))
    });
    // The largest moment of a block may have no value of its own in the book (-1), so that rounding twice rounds more.
    assert_eq!(structure(rounded.get("opt").expect("opt")), structure(again.get("opt").expect("opt")));
    for key in ["step", "model", "scaler", "args"] {
        assert!(run.get(key) == full.get(key) && run.get(key) == rounded.get(key), "{key}");
    }
    let bbt = |value: &Value, key: &str| value.get("bbt").and_then(|b| b.get(key)).cloned().expect("bbt");
    assert_eq!(bbt(&run, "config"), bbt(&full, "config"));
    assert_eq!(bbt(&run, "progress"), bbt(&rounded, "progress"));
    let Value::Str(yaml) = bbt(&rounded, "config") else { panic!("no YAML") };
    assert_eq!(Config::from_yaml(&yaml).expect("a configuration").optim.name, OptimizerName::AdamW8bit);
    // Of each block's largest moment the codes err by half a step at most, the largest being 1 / 64 of it.
    let entries = |value: &Value| value.get("opt").and_then(|o| o.get("state")).expect("state").entries().to_vec();
    let floats = |value: &Value, key: &str| {
        let Some(Value::Tensor(data)) = value.get(key) else { panic!("no {key}") };
        assert_eq!(data.dtype(), Dtype::F32);
        let numbers = data.contiguous_bytes();
        Tensor::from_slice(
            &numbers.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<_>>(),
        )
    };
    for ((_, before), (_, after)) in entries(&run).iter().zip(&entries(&full)) {
        assert!(before.get("step") == after.get("step"));
        for key in ["exp_avg", "exp_avg_sq"] {
            let (before, after) = (floats(before, key), floats(after, key));
            let error = (&before - &after).abs().max().double_value(&[]);
            let largest = before.abs().max().double_value(&[]);
            assert!(largest > 0.0);
            match before.numel() {
                small if small < 4096 => assert_eq!(error, 0.0),
                _ => assert!(error > 0.0 && error < largest / 128.0, "{key}: {error} of {largest}"),
            }
        }
    }
    train(config(OptimizerName::AdamW8bit, Precision::Fp32, &path("run8")), resume(path("rounded.pt")));
    train(config(OptimizerName::AdamW, Precision::Fp32, &path("run32")), resume(path("full.pt")));
}

#[test]
fn what_cannot_go_on_names_the_way_out() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| dir.path().join(name);
    let mut first = config(OptimizerName::AdamW, Precision::Fp32, &path("run"));
    first.train.stop_at = Some(1);
    train(first, Start::Fresh);
    let error = |config: Config, start: Start| Trainer::new(config, start).err().expect("an error").to_string();
    for (name, checkpoint, way) in [
        (OptimizerName::AdamW8bit, path("run/ckpt.pt"), ["optim.name=adamw,", "--optim adamw8bit`"]),
        (OptimizerName::AdamW, fixture("ckpt.pt"), ["optim.name=adamw8bit,", "--optim adamw`"]),
    ] {
        let message = error(config(name, Precision::Fp32, &path("other")), resume(checkpoint));

        assert!(way.iter().all(|way| message.contains(way)) && message.contains("--no-opt-state"), "{message}");
    }
    let checkpoint = TrainingCheckpoint::open(&path("run/ckpt.pt")).expect("opens");
    let message = convert(&checkpoint, &path("x.safetensors"), None, Some(OptimizerName::AdamW8bit));
    assert!(message.expect_err("no moments").to_string().contains("--optim"));

    // Another code book, or fp32 moments where bitsandbytes has 8 bits.
    type Damage = fn(&mut Value);
    let damages: [(Damage, &str); 2] = [
        (|state| *state.get_mut("qmap1").expect("qmap1") = state.get("qmap2").expect("qmap2").clone(), "dynamic map"),
        (|state| *state.get_mut("state2").expect("state2") = state.get("qmap2").expect("qmap2").clone(), "uint8"),
    ];
    for (damage, word) in damages {
        let mut value = torch_file::read(&fixture("ckpt.pt")).expect("reads");
        let Some(Value::Dict(state)) = value.get_mut("opt").and_then(|o| o.get_mut("state")) else { panic!("state") };
        damage(state[0].1.get_mut("__bnb_optimizer_quant_state__").expect("8 bits"));
        torch_file::write(&path("damaged.pt"), &value).expect("writes");
        let eight = config(OptimizerName::AdamW8bit, Precision::Fp32, &path("other"));
        let message = error(eight, resume(path("damaged.pt")));
        assert!(message.contains(word) && message.contains("tok_emb.weight"), "{message}");
    }
}
