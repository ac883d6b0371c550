//! TensorBoard itself reads what `bbt::training::tensorboard` writes.

use std::path::Path;

use bbt::training::metrics::{InternalsRow, LayerRow, TrainRow, ValRow};
use bbt::training::tensorboard::TensorBoardWriter;
use serde_json::{Value, json};

/// Every scalar of a directory of event files: tag to list of [step, value], NaN as null.
const READ_SCALARS: &str = include_str!("../python/read_scalars.py");

fn read_scalars(directory: &Path) -> Value {
    let printed = crate::common::python(&["-c".as_ref(), READ_SCALARS.as_ref(), directory.as_os_str()]);
    serde_json::from_str(&printed).unwrap()
}

fn train_row(step: u64, loss: f64) -> TrainRow {
    TrainRow {
        step,
        loss,
        bits_per_byte: loss * 2.0,
        lr: 0.125,
        grad_norm: 0.5,
        seq_len: 512,
        bytes_seen: 4096,
        bytes_per_second: 2048.0,
        skipped_steps: 1,
        loss_scale: Some(65536.0),
        mfu: Some(0.375),
        data_wait: 0.25,
        peak_memory_bytes: 1 << 20,
        byte_classes: None,
    }
}

#[test]
fn tensorboard_reads_the_scalars() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = TensorBoardWriter::create(directory.path(), None).unwrap();
    writer.train(&train_row(0, 2.5)).unwrap();
    writer.train(&train_row(10, f64::NAN)).unwrap();
    writer.validation(&ValRow { step: 10, val_loss: 2.25, val_bits_per_byte: 4.5, bytes: 100 }).unwrap();

    // The writer is still open: every event is in the file already.
    let expected = json!({
        "train/loss": [[0, 2.5], [10, null]],
        "train/bits_per_byte": [[0, 5.0], [10, null]],
        "train/lr": [[0, 0.125], [10, 0.125]],
        "train/grad_norm": [[0, 0.5], [10, 0.5]],
        "train/seq_len": [[0, 512.0], [10, 512.0]],
        "train/bytes_per_second": [[0, 2048.0], [10, 2048.0]],
        "train/skipped_steps": [[0, 1.0], [10, 1.0]],
        "train/loss_scale": [[0, 65536.0], [10, 65536.0]],
        "train/mfu": [[0, 0.375], [10, 0.375]],
        "train/data_wait": [[0, 0.25], [10, 0.25]],
        "train/peak_memory_bytes": [[0, 1048576.0], [10, 1048576.0]],
        "val/loss": [[10, 2.25]],
        "val/bits_per_byte": [[10, 4.5]],
    });
    assert_eq!(read_scalars(directory.path()), expected);
}

#[test]
fn a_look_inside_is_a_group_for_each_number() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = TensorBoardWriter::create(directory.path(), None).unwrap();
    let norm = LayerRow { name: "norm_f".into(), grad_norm: 0.5, ..LayerRow::default() };
    let down = LayerRow {
        name: "blocks.10.mlp.down".into(),
        grad_norm: f64::NAN,
        zero: Some(0.25),
        plus: Some(0.5),
        minus: Some(0.125),
        flips: None,
        gamma: Some(0.0625),
        input_absmax: Some(3.0),
        input_absmax_mean: Some(2.0),
    };
    let later = LayerRow { grad_norm: 1.0, flips: Some(0.75), ..down.clone() };
    for (step, down) in [(0, down), (100, later)] {
        writer.internals(&InternalsRow { step, layers: vec![down, norm.clone()] }).unwrap();
    }
    let expected = json!({
        "weight_grad_norm/blocks.10.mlp.down": [[0, null], [100, 1.0]],
        "weight_grad_norm/norm_f": [[0, 0.5], [100, 0.5]],
        "weight_zero/blocks.10.mlp.down": [[0, 0.25], [100, 0.25]],
        "weight_plus/blocks.10.mlp.down": [[0, 0.5], [100, 0.5]],
        "weight_minus/blocks.10.mlp.down": [[0, 0.125], [100, 0.125]],
        "weight_flips/blocks.10.mlp.down": [[100, 0.75]],
        "weight_gamma/blocks.10.mlp.down": [[0, 0.0625], [100, 0.0625]],
        "x_absmax/blocks.10.mlp.down": [[0, 3.0], [100, 3.0]],
        "x_absmax_mean/blocks.10.mlp.down": [[0, 2.0], [100, 2.0]],
    });
    assert_eq!(read_scalars(directory.path()), expected);
}

#[test]
fn a_resumed_run_replaces_the_steps_after_its_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = TensorBoardWriter::create(directory.path(), None).unwrap();
    for (step, loss) in [(0, 3.0), (10, 2.5), (20, 2.0), (30, 1.5)] {
        first.train(&train_row(step, loss)).unwrap();
    }
    // The checkpoint held steps 0 to 19.
    let mut second = TensorBoardWriter::create(directory.path(), Some(20)).unwrap();
    second.train(&train_row(20, 2.125)).unwrap();
    assert_ne!(first.path(), second.path());

    let scalars = read_scalars(directory.path());
    assert_eq!(scalars["train/loss"], json!([[0, 3.0], [10, 2.5], [20, 2.125]]));
}

#[test]
fn a_checkpoint_before_the_next_logged_step_drops_the_rows_it_will_not_repeat() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = TensorBoardWriter::create(directory.path(), None).unwrap();
    for (step, loss) in [(0, 3.0), (10, 2.5), (20, 2.0)] {
        first.train(&train_row(step, loss)).unwrap();
    }
    TensorBoardWriter::create(directory.path(), Some(15)).unwrap();

    let scalars = read_scalars(directory.path());
    assert_eq!(scalars["train/loss"], json!([[0, 3.0], [10, 2.5]]));
}
