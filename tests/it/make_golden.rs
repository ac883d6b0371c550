//! The script that makes golden data computes what the original program wrote into tests/fixtures.

use std::path::Path;

use crate::common::{Golden, relative_difference};
use bbt::checkpoint::{Value, torch_file};
use serde_json::Value as Json;
use tch::Tensor;

/// Asserts that two checkpoints have the same keys in the same order, the same other values, and tensors of the same
/// shapes that differ by no more than `bound` of the largest value of each; without a bound their numbers are not
/// compared.
fn assert_close(found: &Value, expected: &Value, bound: Option<f32>, key: &str) {
    if let (Value::Tensor(a), Value::Tensor(b)) = (found, expected) {
        assert_eq!((a.dtype(), &a.shape), (b.dtype(), &b.shape), "{key}");
        let numbers = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let (a, b) = (numbers(&a.contiguous_bytes()), numbers(&b.contiguous_bytes()));
        let largest = b.iter().fold(1e-30f32, |largest, x| largest.max(x.abs()));
        let difference = a.iter().zip(&b).fold(0f32, |worst, (x, y)| worst.max((x - y).abs())) / largest;
        assert!(bound.is_none_or(|bound| difference <= bound), "{key} differs by {difference}");
        return;
    }
    let (x, y) = (found.entries(), expected.entries());
    assert_eq!((x.len(), found.elements().len()), (y.len(), expected.elements().len()), "{key}");
    for ((k, x), (l, y)) in x.iter().zip(y) {
        assert_eq!(k, l, "{key}");
        assert_close(x, y, bound, &format!("{key}.{}", k.as_str().unwrap_or("?")));
    }
    for (x, y) in found.elements().iter().zip(expected.elements()) {
        assert_close(x, y, bound, key);
    }
    if x.is_empty() && found.elements().is_empty() {
        assert_eq!(found, expected, "{key}");
    }
}

#[test]
fn the_script_makes_the_golden_data_of_the_original() {
    let out = tempfile::tempdir().expect("a temporary directory");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let [script, fixtures] = ["tests/python/make_golden.py", "tests/fixtures"].map(|path| root.join(path));
    let text = fixtures.join("bitbyte_tiny/text.bin");
    // The initial weights are given, because their last bits depend on the CPU; the script compares them with what it
    // draws itself.
    crate::common::python(&[script.as_os_str(), out.path().as_os_str(), text.as_os_str(), fixtures.as_os_str()]);
    for folder in ["bitbyte_tiny", "bitbyte_tiny_no_act_quant"] {
        let golden = Golden::open(folder);
        let quantized = golden.meta["config"]["act_quant"] == true;
        let dir = out.path().join(folder);
        let tensors = Tensor::read_safetensors(dir.join("golden.safetensors")).expect("golden.safetensors");
        assert_eq!(tensors.len(), golden.with_prefix("").len());
        for (name, found) in tensors {
            let expected = golden.tensor(&name);
            if !quantized || name.starts_with("op.") || name == "batches" {
                let difference = relative_difference(&found, expected);
                assert!(difference < 1e-5, "{folder} {name} differs by {difference}");
            } else if !name.starts_with("final_logits.") {
                // Where a last bit turns a rounding to int8, some of the numbers differ by more.
                let largest = expected.abs().max().double_value(&[]);
                let mean = (found - expected).abs().mean(tch::Kind::Float).double_value(&[]) / largest;
                assert!(mean < 1e-4, "{folder} {name} differs by {mean} on average");
            }
        }

        let meta: Json = serde_json::from_slice(&std::fs::read(dir.join("meta.json")).expect("reads")).expect("JSON");
        let (meta, expected) = (meta.as_object().expect("an object"), golden.meta.as_object().expect("an object"));
        assert!(meta.keys().eq(expected.keys()), "{:?} {:?}", meta.keys(), expected.keys());
        for (key, expected) in expected {
            let (found, what) = (&meta[key], format!("{folder} {key}"));
            let close = |found: &Json, expected: &Json, bound: f64| {
                let [found, expected] = [found, expected].map(|x| x.as_f64().expect("a number"));
                assert!((found / expected - 1.0).abs() < bound, "{what}: {found} for {expected}");
            };
            if key.starts_with("trajectory_") {
                let (found, expected) = (found.as_array().expect("steps"), expected.as_array().expect("steps"));
                assert_eq!(found.len(), expected.len(), "{what}");
                for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
                    assert_eq!((&found["step"], &found["lr"]), (&expected["step"], &expected["lr"]), "{what}");
                    // With int8 activations two CPUs part after the first step.
                    if !quantized || step == 0 {
                        close(&found["loss"], &expected["loss"], if quantized { 1e-4 } else { 1e-5 });
                        close(&found["grad_norm"], &expected["grad_norm"], if quantized { 1e-3 } else { 1e-5 });
                    }
                }
            } else if key.starts_with("eval_") {
                assert_eq!((&found["bytes"], &found["seq_len"]), (&expected["bytes"], &expected["seq_len"]), "{what}");
                if !quantized {
                    close(&found["loss"], &expected["loss"], 1e-5);
                    close(&found["bits_per_byte"], &expected["bits_per_byte"], 1e-5);
                }
            } else if key == "loss0" {
                close(found, expected, 1e-4);
            } else if key.starts_with("greedy_") && quantized {
                assert_eq!(
                    (&found["prompt"], &found["max_new_tokens"]),
                    (&expected["prompt"], &expected["max_new_tokens"])
                );
            } else if key != "torch" {
                assert_eq!(found, expected, "{what}");
            }
        }

        let read = |dir: &Path, name: &str| torch_file::read(&dir.join(name)).expect(name);
        assert_close(&read(&dir, "init.pt"), &read(&golden.dir, "init.pt"), Some(0.0), "init.pt");
        for name in ["final_identity.pt", "final_clipped.pt"] {
            assert_close(&read(&dir, name), &read(&golden.dir, name), (!quantized).then_some(1e-4), name);
        }
    }
}
