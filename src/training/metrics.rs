//! A run's log: `metrics.jsonl`, one JSON object a line ([JSON Lines](https://jsonlines.org)).
//!
//! A line with a `val_loss` is a validation, one with `layers` a look inside, any other a training step. JSON has no NaN, so a number
//! that is not finite is written as `null` and read back as NaN. A run that goes on from a checkpoint
//! first drops what was logged after it, so that every step stands in the log once.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use super::loss::BITS_PER_NAT;
use crate::utils::atomic::{WriteError, remedy_for_room, write_bytes};

/// A log that cannot be written or read; names the file, and the line where there is one.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file cannot be opened, read or written.
    #[error("{}: {source}{}", path.display(), remedy_for_room(source))]
    Io {
        /// The log.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The log cannot be replaced; it is as it was.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A line is not a row of a log.
    #[error(
        "{}:{line}: not a row of a training log: {source}\n  name a run directory, or the metrics.jsonl that `bbt train` writes there",
        path.display()
    )]
    Row {
        /// The log.
        path: PathBuf,
        /// Which line, the first being 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The same in the log of a run that is to go on.
    #[error("{}:{line}: not a row of a training log: {source}\n  correct or delete this line", path.display())]
    OwnRow {
        /// The log.
        path: PathBuf,
        /// Which line, the first being 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// One logged training step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainRow {
    /// Which step, the first being 0.
    pub step: u64,
    /// Cross-entropy, in nats per byte.
    #[serde(deserialize_with = "null_as_nan")]
    pub loss: f64,
    /// The same in bits per byte.
    #[serde(deserialize_with = "null_as_nan")]
    pub bits_per_byte: f64,
    /// Learning rate of the step.
    #[serde(deserialize_with = "null_as_nan")]
    pub lr: f64,
    /// L2 norm of all gradients before clipping.
    #[serde(deserialize_with = "null_as_nan")]
    pub grad_norm: f64,
    /// Sequence length of the step, in bytes.
    pub seq_len: i64,
    /// Bytes trained on since the run began, over all ranks.
    pub bytes_seen: u64,
    /// Throughput since the last logged step, over all ranks.
    #[serde(deserialize_with = "null_as_nan")]
    pub bytes_per_second: f64,
    /// Steps left out so far because a gradient was not finite.
    pub skipped_steps: u64,
    /// Scale of the loss in float16; absent in other precisions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Model FLOPs utilisation since the last logged step, 0 to 1, over all ranks' devices
    /// ([`flops_per_byte`](super::utilisation::flops_per_byte)); null where the device's peak is not known.
    #[serde(default)]
    pub mfu: Option<f64>,
    /// Fraction of the time since the last logged step that was spent waiting for data, 0 to 1.
    #[serde(deserialize_with = "null_as_nan")]
    pub data_wait: f64,
    /// The most memory taken so far: of the device, or of the process on a CPU. In bytes.
    pub peak_memory_bytes: u64,
    /// With `train.log_byte_class_loss`: the loss of whitespace and of all other bytes.
    #[serde(flatten)]
    pub byte_classes: Option<ByteClassLoss>,
}

/// The loss of a step by the byte that was to be predicted, as the original's `--log_byte_class_loss` tells it. Whitespace
/// is tab, line feed, vertical tab, form feed, carriage return and blank. A class without a byte has none (NaN).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ByteClassLoss {
    /// Of whitespace, in nats per byte.
    #[serde(deserialize_with = "null_as_nan")]
    pub ws_loss: f64,
    /// The same in bits per byte.
    #[serde(deserialize_with = "null_as_nan")]
    pub ws_bits_per_byte: f64,
    /// Of all other bytes, in nats per byte.
    #[serde(deserialize_with = "null_as_nan")]
    pub nonws_loss: f64,
    /// The same in bits per byte.
    #[serde(deserialize_with = "null_as_nan")]
    pub nonws_bits_per_byte: f64,
}

impl ByteClassLoss {
    /// Of sums of losses in nats and numbers of bytes, `[whitespace, whitespace bytes, others, other bytes]`.
    pub fn new([ws, ws_bytes, nonws, nonws_bytes]: [f64; 4]) -> Self {
        let (ws_loss, nonws_loss) = (ws / ws_bytes, nonws / nonws_bytes);
        Self {
            ws_loss,
            ws_bits_per_byte: ws_loss * BITS_PER_NAT,
            nonws_loss,
            nonws_bits_per_byte: nonws_loss * BITS_PER_NAT,
        }
    }
}

/// One validation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValRow {
    /// The last step done before it, the first being 0.
    pub step: u64,
    /// Cross-entropy, in nats per byte.
    #[serde(deserialize_with = "null_as_nan")]
    pub val_loss: f64,
    /// The same in bits per byte.
    #[serde(deserialize_with = "null_as_nan")]
    pub val_bits_per_byte: f64,
    /// Bytes predicted.
    pub bytes: u64,
}

/// A look inside the model, at one step: with the weights before its update, on the inputs of all its micro-batches on
/// rank 0, at its gradient before clipping, averaged over ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InternalsRow {
    /// Which step, the first being 0.
    pub step: u64,
    /// The layers in the order of PyTorch's `parameters()`, of which each has one, its `weight`.
    pub layers: Vec<LayerRow>,
}

/// A layer in an [`InternalsRow`]. Only quantized layers have more than a gradient; what is not known, or not a finite
/// number, is left out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LayerRow {
    /// PyTorch's name of the module, such as `blocks.0.attn.q_proj`.
    pub name: String,
    /// L2 norm of the gradient of its weight.
    #[serde(deserialize_with = "null_as_nan")]
    pub grad_norm: f64,
    /// Fraction of its weights that are quantized to 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero: Option<f64>,
    /// Fraction at +1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plus: Option<f64>,
    /// Fraction at -1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minus: Option<f64>,
    /// Fraction that is another of the three than at the last look; absent in a process's first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flips: Option<f64>,
    /// Mean absolute value of its weights, to which they are scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// Largest absolute value in its input, which is what it quantizes: after norm or gate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_absmax: Option<f64>,
    /// Mean over tokens of each token's largest absolute value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_absmax_mean: Option<f64>,
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// A training step.
    Train(TrainRow),
    /// A validation.
    Val(ValRow),
    /// A look inside.
    Internals(InternalsRow),
}

impl Row {
    /// Which step, the first being 0.
    pub fn step(&self) -> u64 {
        match self {
            Row::Train(row) => row.step,
            Row::Val(row) => row.step,
            Row::Internals(row) => row.step,
        }
    }

    fn parse(line: &str) -> Result<Self, serde_json::Error> {
        let object: serde_json::Value = serde_json::from_str(line)?;
        if object.get("val_loss").is_some() {
            serde_json::from_value(object).map(Row::Val)
        } else if object.get("layers").is_some() {
            serde_json::from_value(object).map(Row::Internals)
        } else {
            serde_json::from_value(object).map(Row::Train)
        }
    }
}

fn null_as_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// What watches a run as it goes, such as a progress bar. The trainer calls it on rank 0 only.
pub trait TrainObserver {
    /// A step that was logged.
    fn on_step(&mut self, _row: &TrainRow) {}
    /// A look inside.
    fn on_internals(&mut self, _row: &InternalsRow) {}
    /// A validation.
    fn on_validation(&mut self, _row: &ValRow) {}
    /// Something a person should read, such as that a checkpoint was written.
    fn on_message(&mut self, _message: &str) {}
}

/// Watches nothing.
impl TrainObserver for () {}

/// Appends to a log. Each row reaches the operating system before the call returns.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Begins a new log at `path`, in place of one that is there.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn create(path: &Path) -> Result<Self, MetricsError> {
        let file = File::create(path).map_err(io_error(path))?;
        Ok(Self { path: path.into(), file })
    }

    /// Goes on with the log at `path` after step `last_step`, the last that is in the checkpoint from
    /// which the run goes on. Later rows are dropped, and a last line that was only half written; the file is
    /// replaced in one go. Where there is no log, one is begun.
    ///
    /// # Errors
    /// [`MetricsError::Io`], or [`MetricsError::OwnRow`] for a line that cannot be read; the log is then
    /// as it was.
    pub fn resume(path: &Path, last_step: u64) -> Result<Self, MetricsError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::create(path),
            Err(source) => return Err(MetricsError::Io { path: path.into(), source }),
        };
        let mut kept = String::new();
        let rows = rows(path, &text).map_err(|error| match error {
            MetricsError::Row { path, line, source } => MetricsError::OwnRow { path, line, source },
            other => other,
        })?;
        for (line, row) in rows {
            if row.step() <= last_step {
                kept.push_str(line);
                kept.push('\n');
            }
        }
        if kept != text {
            write_bytes(path, kept.as_bytes())?;
        }
        let file = OpenOptions::new().append(true).open(path).map_err(io_error(path))?;
        Ok(Self { path: path.into(), file })
    }

    /// Logs a training step.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn train(&mut self, row: &TrainRow) -> Result<(), MetricsError> {
        self.append(row)
    }

    /// Logs a validation.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn validation(&mut self, row: &ValRow) -> Result<(), MetricsError> {
        self.append(row)
    }

    /// Logs a look inside.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn internals(&mut self, row: &InternalsRow) -> Result<(), MetricsError> {
        self.append(row)
    }

    fn append(&mut self, row: &impl Serialize) -> Result<(), MetricsError> {
        let line = serde_json::to_string(row).map_err(io::Error::from);
        // One write a row: a run that dies leaves at most its last line unfinished.
        line.and_then(|line| self.file.write_all(format!("{line}\n").as_bytes())).map_err(io_error(&self.path))
    }
}

/// The rows of the log at `path`, as they stand there. A last line that is still being written, or
/// was when its run died, does not count.
///
/// # Errors
/// [`MetricsError::Io`], or [`MetricsError::Row`] for any other line that cannot be read.
pub fn read(path: &Path) -> Result<Vec<Row>, MetricsError> {
    let text = fs::read_to_string(path).map_err(io_error(path))?;
    Ok(rows(path, &text)?.into_iter().map(|(_, row)| row).collect())
}

/// The rows in `text`, each with its line.
fn rows<'a>(path: &Path, text: &'a str) -> Result<Vec<(&'a str, Row)>, MetricsError> {
    let mut rows = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let finished = line.ends_with('\n');
        let line = line.trim_end();
        if line.is_empty() {
            continue;
        }
        match Row::parse(line) {
            Ok(row) => rows.push((line, row)),
            Err(_) if !finished => {}
            Err(source) => return Err(MetricsError::Row { path: path.into(), line: index + 1, source }),
        }
    }
    Ok(rows)
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> MetricsError {
    move |source| MetricsError::Io { path: path.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train_row(step: u64) -> TrainRow {
        TrainRow {
            step,
            loss: 2.0,
            bits_per_byte: 2.0 / std::f64::consts::LN_2,
            lr: 1e-3,
            grad_norm: 0.5,
            seq_len: 512,
            bytes_seen: step * 4096,
            bytes_per_second: 3400.0,
            skipped_steps: 0,
            loss_scale: None,
            mfu: None,
            data_wait: 0.01,
            peak_memory_bytes: 1 << 30,
            byte_classes: None,
        }
    }

    fn val_row(step: u64) -> ValRow {
        ValRow { step, val_loss: 2.1, val_bits_per_byte: 3.03, bytes: 65536 }
    }

    fn steps(path: &Path) -> Vec<u64> {
        read(path).unwrap().iter().map(Row::step).collect()
    }

    /// A log of training steps 10, 20, 30 and a validation at 20.
    fn log(directory: &Path) -> PathBuf {
        let path = directory.join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.train(&train_row(10)).unwrap();
        writer.train(&train_row(20)).unwrap();
        writer.validation(&val_row(20)).unwrap();
        writer.train(&train_row(30)).unwrap();
        path
    }

    #[test]
    fn rows_come_back_as_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let scaled = TrainRow { loss_scale: Some(65536.0), ..train_row(2) };
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.train(&train_row(1)).unwrap();
        writer.train(&scaled).unwrap();
        writer.validation(&val_row(2)).unwrap();
        // Read while the writer is open: nothing waits in a buffer.
        assert_eq!(read(&path).unwrap(), [Row::Train(train_row(1)), Row::Train(scaled), Row::Val(val_row(2))]);
    }

    #[test]
    fn a_look_inside_comes_back_as_written_and_ends_with_its_step() {
        let directory = tempfile::tempdir().unwrap();
        let path = log(directory.path());
        let norm = LayerRow { name: "norm_f".into(), grad_norm: 0.5, ..LayerRow::default() };
        let layer = LayerRow {
            name: "blocks.0.mlp.down".into(),
            zero: Some(0.25),
            flips: None,
            gamma: Some(0.5),
            ..norm.clone()
        };
        let look = |step| InternalsRow { step, layers: vec![layer.clone(), norm.clone()] };
        let mut writer = MetricsWriter::resume(&path, 30).unwrap();
        writer.internals(&look(30)).unwrap();
        assert_eq!(read(&path).unwrap().last(), Some(&Row::Internals(look(30))));
        // What is not known is not there, and a gradient that is no number is null.
        let text = fs::read_to_string(&path).unwrap();
        let row = text.lines().last().unwrap();
        assert_eq!(
            row,
            r#"{"step":30,"layers":[{"name":"blocks.0.mlp.down","grad_norm":0.5,"zero":0.25,"gamma":0.5},{"name":"norm_f","grad_norm":0.5}]}"#
        );
        writer
            .internals(&InternalsRow { step: 31, layers: vec![LayerRow { grad_norm: f64::NAN, ..norm.clone() }] })
            .unwrap();
        match read(&path).unwrap().last() {
            Some(Row::Internals(row)) => assert!(row.layers[0].grad_norm.is_nan()),
            row => panic!("{row:?}"),
        }
        MetricsWriter::resume(&path, 29).unwrap();
        assert_eq!(steps(&path), [10, 20, 20]);
    }

    #[test]
    fn losses_by_class_of_byte_are_there_where_they_were_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let rows = [[4.0, 2.0, 9.0, 3.0], [0.0, 0.0, 1.0, 2.0]]
            .map(|sums| TrainRow { byte_classes: Some(ByteClassLoss::new(sums)), ..train_row(1) });
        let mut writer = MetricsWriter::create(&path).unwrap();
        for row in &rows {
            writer.train(row).unwrap();
        }
        writer.train(&train_row(2)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&lines[0]["ws_loss"], &lines[0]["nonws_loss"]), (&2.0.into(), &3.0.into()));
        let bits = lines[0]["nonws_bits_per_byte"].as_f64().unwrap();
        assert!((bits - 3.0 / std::f64::consts::LN_2).abs() < 1e-12, "{text}");
        assert!(lines[1]["ws_loss"].is_null() && lines[1]["ws_bits_per_byte"].is_null(), "{text}");
        assert!(lines[2].get("ws_loss").is_none(), "{text}");
        let read = read(&path).unwrap();
        assert_eq!(read[2], Row::Train(train_row(2)));
        match &read[..2] {
            [
                Row::Train(TrainRow { byte_classes: Some(first), .. }),
                Row::Train(TrainRow { byte_classes: Some(second), .. }),
            ] => {
                assert_eq!((first.ws_loss, first.nonws_loss), (2.0, 3.0));
                assert!(second.ws_loss.is_nan() && second.nonws_loss == 0.5);
            }
            rows => panic!("{rows:?}"),
        }
    }

    /// A log of a version that knew no utilisation.
    #[test]
    fn an_older_log_reads() {
        let directory = tempfile::tempdir().unwrap();
        let path = log(directory.path());
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"mfu\":null"));
        fs::write(&path, text.replace("\"mfu\":null,", "")).unwrap();
        assert_eq!(steps(&path), [10, 20, 20, 30]);
    }

    #[test]
    fn numbers_that_are_not_finite_stay_json() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.train(&TrainRow { loss: f64::NAN, grad_norm: f64::INFINITY, ..train_row(1) }).unwrap();
        writer.validation(&ValRow { val_loss: f64::NAN, ..val_row(1) }).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert!(first["loss"].is_null() && first["grad_norm"].is_null());
        match &read(&path).unwrap()[..] {
            [Row::Train(train), Row::Val(val)] => {
                assert!(train.loss.is_nan() && train.grad_norm.is_nan() && val.val_loss.is_nan());
            }
            rows => panic!("{rows:?}"),
        }
    }

    #[test]
    fn resuming_drops_rows_after_the_checkpoint_and_appends() {
        let directory = tempfile::tempdir().unwrap();
        let path = log(directory.path());
        let before = fs::read_to_string(&path).unwrap();
        let mut writer = MetricsWriter::resume(&path, 20).unwrap();
        let kept = fs::read_to_string(&path).unwrap();
        assert!(before.starts_with(&kept));
        writer.train(&train_row(25)).unwrap();
        assert_eq!(steps(&path), [10, 20, 20, 25]);
        // No temporary file stays behind.
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn resuming_drops_a_half_written_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = log(directory.path());
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 20]).unwrap();
        assert_eq!(steps(&path), [10, 20, 20]);
        let mut writer = MetricsWriter::resume(&path, 30).unwrap();
        writer.train(&train_row(31)).unwrap();
        assert_eq!(steps(&path), [10, 20, 20, 31]);
    }

    #[test]
    fn resuming_ends_a_whole_line_that_lacks_its_newline() {
        let directory = tempfile::tempdir().unwrap();
        let path = log(directory.path());
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.trim_end()).unwrap();
        let mut writer = MetricsWriter::resume(&path, 30).unwrap();
        writer.train(&train_row(31)).unwrap();
        assert_eq!(steps(&path), [10, 20, 20, 30, 31]);
    }

    #[test]
    fn resuming_without_a_log_begins_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        MetricsWriter::resume(&path, 100).unwrap().train(&train_row(101)).unwrap();
        assert_eq!(steps(&path), [101]);
    }

    #[test]
    fn a_bad_line_is_named_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = log(directory.path());
        let text = fs::read_to_string(&path).unwrap().replacen("\"seq_len\":512", "\"seq_len\":\"x\"", 2);
        fs::write(&path, &text).unwrap();
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl:1:") && message.contains("i64"), "{message}");
        // It may be anybody's file.
        assert!(!message.contains("delete"), "{message}");
        let message = MetricsWriter::resume(&path, 10).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl:1:") && message.contains("delete this line"), "{message}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn a_missing_file_is_named() {
        let message = read(Path::new("no/such/metrics.jsonl")).unwrap_err().to_string();
        assert!(message.starts_with("no/such/metrics.jsonl: "), "{message}");
    }
}
