//! Mixed precision is PyTorch's: the gradient scaler rule by rule, autocast to the last bit.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use bbt::checkpoint::TrainingCheckpoint;
use bbt::config::{Config, ModelConfig, OptimConfig, Precision, TrainConfig};
use bbt::libtorch::{autocast_kind, drawing_alone};
use bbt::training::{Start, Trainer};
use bbt::utils::device::autocast;
use bbt::utils::optim::{GradScaler, Optimizer, OptimizerState, ScalerState};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// `amp.py`, asked for `what`.
fn pytorch(what: &str, arguments: &[&Path]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/amp.py");
    let mut all = vec![script.as_os_str(), what.as_ref()];
    all.extend(arguments.iter().map(|argument| argument.as_os_str()));
    crate::common::python(&all)
}

/// As `GradScaler.state_dict()` has it.
fn state_dict(state: &ScalerState) -> Value {
    json!({
        "scale": state.scale,
        "growth_factor": state.growth_factor,
        "backoff_factor": state.backoff_factor,
        "growth_interval": state.growth_interval,
        "_growth_tracker": state.growth_tracker,
    })
}

/// Gradients of which some are not finite, or are not any more once they are scaled.
fn gradients(random: &mut StdRng, steps: usize, finite: f64) -> Vec<[f32; 3]> {
    let mut gradient = || {
        let mut values = [(); 3].map(|()| random.random_range(-2.0..2.0));
        if !random.random_bool(finite) {
            let bad = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e37, f32::MAX];
            values[random.random_range(0..3)] = bad[random.random_range(0..bad.len())];
        }
        values
    };
    (0..steps).map(|_| gradient()).collect()
}

/// A list of numbers as text: JSON has none for those that are not finite.
fn floats(list: &Value) -> Vec<f32> {
    let list = list.as_array().expect("a list").iter();
    list.map(|number| number.as_str().expect("text").parse().expect("a number")).collect()
}

/// A number that was fp32: reading JSON may miss its last bit as fp64.
fn as_fp32(number: &Value) -> Option<f64> {
    number.as_f64().map(|number| f64::from(number as f32))
}

/// Steps that the optimizer of one parameter has counted.
fn taken(optimizer: &Optimizer) -> f64 {
    let OptimizerState::AdamW(state) = &optimizer.state else { panic!("AdamW is the default") };
    state[0].step.double_value(&[])
}

#[test]
fn the_scaler_is_pytorchs_rule_by_rule() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let usual = ScalerState::default();
    let states = [
        usual,
        ScalerState { growth_interval: 3, ..usual },
        ScalerState { growth_interval: 1, growth_factor: 1.7, backoff_factor: 0.3, ..usual },
        // About to grow.
        ScalerState { growth_interval: 5, growth_tracker: 4, ..usual },
        // It grows as far as numbers go, and not past them.
        ScalerState { scale: f64::from(1e37f32), growth_interval: 1, growth_factor: 4.0, ..usual },
        // It shrinks as far as they go.
        ScalerState { scale: f64::from(1e-35f32), growth_interval: 50, backoff_factor: 0.125, ..usual },
    ];
    let cases: Vec<(ScalerState, Vec<[f32; 3]>)> = states
        .into_iter()
        .flat_map(|state| [0.95, 0.6].map(|finite| (state, finite)))
        .map(|(state, finite)| (state, gradients(&mut random, 80, finite)))
        .collect();

    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("cases.json");
    let text = |gradient: &[f32; 3]| gradient.map(|g| g.to_string());
    let asked: Vec<Value> = cases
        .iter()
        .map(|(state, gradients)| json!({"state": state_dict(state), "gradients": gradients.iter().map(text).collect::<Vec<_>>()}))
        .collect();
    std::fs::write(&file, Value::from(asked).to_string()).expect("writes");
    let printed = pytorch("scale", &[&file]);
    assert_eq!(printed.lines().count(), cases.len());

    let (mut skipped, mut grown) = (0, 0);
    for ((start, gradients), theirs) in cases.iter().zip(printed.lines()) {
        let theirs: Value = serde_json::from_str(theirs).expect("JSON");
        let mut scaler = GradScaler::new(*start, Device::Cpu);
        let p = Tensor::zeros([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let config = OptimConfig { weight_decay: 0.1, ..OptimConfig::default() };
        let mut optimizer = Optimizer::new(vec![p.shallow_clone()], &config);
        for (step, gradient) in gradients.iter().enumerate() {
            let what = format!("{start:?}, step {step}, gradient {gradient:?}");
            let before = scaler.state();
            optimizer.drop_grad().expect("drops");
            scaler.scale(&(&p * Tensor::from_slice(gradient)).sum(Kind::Float)).backward();
            let grads = optimizer.gradients();
            let found_inf = Tensor::zeros([], (Kind::Float, Device::Cpu));
            scaler.unscale(&grads, &found_inf).expect("unscales");
            optimizer.step(&grads, 0.1, config.weight_decay, &found_inf).expect("steps");
            scaler.update(&found_inf);

            let (ours, theirs) = (scaler.state(), &theirs["steps"][step]);
            // Not a number equals nothing.
            let unscaled: Vec<f32> = Vec::try_from(&grads[0]).expect("three numbers");
            assert_eq!(format!("{unscaled:?}"), format!("{:?}", floats(&theirs["unscaled"])), "{what}");
            assert_eq!(Some(ours.scale), as_fp32(&theirs["scale"]), "{what}");
            assert_eq!(Some(ours.growth_tracker), theirs["tracker"].as_i64(), "{what}");
            assert_eq!(Some(taken(&optimizer)), theirs["taken"].as_f64(), "{what}");
            for (i, theirs) in (0..).zip(floats(&theirs["parameter"])) {
                let ours = p.double_value(&[i]);
                let same = (ours - f64::from(theirs)).abs() < 1e-5 || (ours.is_nan() && theirs.is_nan());
                assert!(same, "{what}: {ours} {theirs}");
            }
            skipped += u32::from(found_inf.double_value(&[]) > 0.0);
            grown += u32::from(ours.scale > before.scale);
        }
        let mut expected = theirs["state"].clone();
        expected["scale"] = as_fp32(&expected["scale"]).into();
        assert_eq!(state_dict(&scaler.state()), expected);
    }
    assert!(skipped > 50 && grown > 50, "{skipped} steps skipped, {grown} times grown");
}

#[test]
fn the_scaler_of_a_checkpoint_is_pytorchs() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut config = Config::default();
    config.model = ModelConfig { n_layer: 1, d_model: 16, n_head: 2, d_ff: 24, ..config.model };
    config.data.seq_len = Some(8);
    config.data.train = dir.path().join("bytes").display().to_string();
    config.train = TrainConfig { steps: 3, precision: Precision::Fp16, ..config.train };
    config.train.out = dir.path().join("run");
    std::fs::write(dir.path().join("bytes"), (0..=255).cycle().take(500).collect::<Vec<u8>>()).expect("writes");
    let mut trainer = Trainer::new(config, Start::Fresh).expect("a trainer");
    trainer.train(&mut (), &AtomicBool::new(false)).expect("trains");
    let path = dir.path().join("run/ckpt.pt");
    let state = TrainingCheckpoint::open(&path).expect("opens").scaler().expect("a scaler");
    let theirs: Value = serde_json::from_str(&pytorch("state", &[&path])).expect("JSON");
    assert_eq!(state_dict(&state), theirs);
    assert_eq!(state.growth_tracker, 3);
}

/// The same, by the same names, as in amp.py.
fn operations(x: &Tensor, y: &Tensor, w: &Tensor, b: &Tensor) -> Vec<(&'static str, Tensor)> {
    let product = x.matmul(w);
    let two = |t: &Tensor| t.expand([2, -1, -1], false);
    let head = |t: &Tensor| t.unsqueeze(0).unsqueeze(0);
    let sdpa = |q: Tensor, k: Tensor, v: Tensor| {
        Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false)
    };
    // In one order, in which gradients are added up in the lower precision.
    vec![
        ("matmul", product.shallow_clone()),
        ("chained", product.matmul(w)),
        ("linear", x.linear(w, Some(b))),
        ("bmm", two(x).bmm(&two(y).transpose(1, 2))),
        ("sdpa", sdpa(head(x), head(y), head(x))),
        ("promoted", &product + x),
        ("cat", Tensor::cat(&[&product, x], -1)),
        ("softmax", product.softmax(-1, None)),
        ("softmax of fp32", x.softmax(-1, None)),
        ("norm", product.norm()),
        ("sum", product.sum(None)),
        ("mse", product.mse_loss(y, tch::Reduction::Mean)),
        ("rms norm", x.rms_norm(x.size()[1], Some(b), None)),
        ("unlisted", x * y),
    ]
}

#[test]
fn autocast_on_the_cpu_gives_pytorchs_bits() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (inputs, outputs) = (dir.path().join("inputs.safetensors"), dir.path().join("outputs.safetensors"));
    for (precision, dtype) in [(Precision::Bf16, "bfloat16"), (Precision::Fp16, "float16")] {
        let randn = |size: &[i64]| drawing_alone(|| Tensor::randn(size, (Kind::Float, Device::Cpu)));
        let [x, y, w, b] = [randn(&[40, 32]), randn(&[40, 32]), randn(&[32, 32]), randn(&[32])];
        Tensor::write_safetensors(&[("x", &x), ("y", &y), ("w", &w), ("b", &b)], &inputs).expect("writes");
        pytorch("autocast", &[&inputs, Path::new(dtype), &outputs]);
        let expected: HashMap<String, Tensor> =
            Tensor::read_safetensors(&outputs).expect("PyTorch's").into_iter().collect();

        let [x, y, w, b] = [x, y, w, b].map(|t| t.set_requires_grad(true));
        let operations = autocast(Device::Cpu, precision, || operations(&x, &y, &w, &b)).expect("autocast");
        let mut found: HashMap<String, Tensor> = HashMap::new();
        for (name, output) in operations {
            if ["chained", "linear", "mse"].contains(&name) {
                let loss = output.to_kind(Kind::Float).sum(None);
                let grads = Tensor::run_backward(&[loss], &[&x, &w], true, false);
                found.extend(
                    ["x", "w"].into_iter().zip(grads).map(|(of, grad)| (format!("{name}, gradient of {of}"), grad)),
                );
            }
            found.insert(name.into(), output);
        }
        found.insert("after".into(), x.matmul(&w));

        assert_eq!(found.len(), expected.len());
        for (name, ours) in &found {
            let theirs = &expected[name];
            assert_eq!((ours.kind(), ours.size()), (theirs.kind(), theirs.size()), "{dtype} {name}");
            assert!(ours.equal(theirs), "{dtype} {name}: off by {}", (ours - theirs).abs().max());
        }
        let lower = if precision == Precision::Bf16 { Kind::BFloat16 } else { Kind::Half };
        let kinds: HashMap<&str, Kind> = found.iter().map(|(name, t)| (name.as_str(), t.kind())).collect();
        assert_eq!([kinds["matmul"], kinds["linear"], kinds["sdpa"], kinds["mse"]], [lower, lower, lower, Kind::Float]);
        assert_eq!([kinds["promoted"], kinds["unlisted"], kinds["after"]], [Kind::Float; 3]);
    }
}

#[test]
fn each_device_has_its_own_autocast_in_either_dtype() {
    let all = || [autocast_kind(Device::Cpu), autocast_kind(Device::Cuda(0))];
    for (precision, kind) in
        [(Precision::Bf16, Some(Kind::BFloat16)), (Precision::Fp16, Some(Kind::Half)), (Precision::Fp32, None)]
    {
        assert_eq!(all(), [None, None]);
        assert_eq!(autocast(Device::Cpu, precision, all).expect("on the CPU"), [kind, None]);
        assert_eq!(autocast(Device::Cuda(0), precision, all).expect("on CUDA"), [None, kind]);
    }
    assert_eq!(all(), [None, None]);
}
