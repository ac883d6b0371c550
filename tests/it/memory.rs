//! Activation checkpointing frees memory: the peak of a training step with and without it, measured on
//! processes of their own.

use std::path::Path;
use std::process::Command;

use bbt::training::metrics::{self, Row};

/// The most memory that a step of a model with `n_layer` layers take, in MiB.
fn peak(n_layer: u32, checkpointing: bool) -> f64 {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bitbyte_tiny/text.bin");
    let output = Command::new(env!("CARGO_BIN_EXE_bbt"))
        // What is freed goes back to the system at once, so that the peak is what was live.
        .env("MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0")
        .args(["train", "--device", "cpu", "--d_model", "128", "--n_head", "2", "--d_ff", "384", "--steps", "1"])
        .args(["--batch_size", "4", "--seq_len", "1024", "--log_every", "1", "--set", "train.precision=fp32"])
        .args(["--n_layer", &n_layer.to_string(), "--set", &format!("train.checkpointing={checkpointing}")])
        .arg("--data")
        .arg(text)
        .arg("--out")
        .arg(dir.path().join("run"))
        .output()
        .expect("bbt runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows = metrics::read(&dir.path().join("run/metrics.jsonl")).expect("a log");
    let step = rows.iter().rev().find_map(|row| if let Row::Train(row) = row { Some(row) } else { None });
    let row = step.unwrap_or_else(|| panic!("no step in {rows:?}"));
    row.peak_memory_bytes as f64 / (1 << 20) as f64
}

#[test]
fn checkpointing_frees_the_activations_of_all_layers_but_one_half() {
    // What a layer adds: the base of the process and the model's own size cancel out.
    let [with, without] = [true, false].map(|on| (peak(12, on) - peak(4, on)) / 8.0);
    // Its two inputs of 4 × 1024 × 128 fp32 values are 4 MiB with checkpointing; all that backward needs of it is, with
    // what the fused kernels keep in int8, some seven times that.
    assert!(with < 10.0, "a layer takes {with:.1} MiB with checkpointing");
    assert!(without > 3.5 * with, "a layer takes {without:.1} MiB without checkpointing, {with:.1} MiB with it");
}
