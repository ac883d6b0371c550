//! Scalars for TensorBoard, as PyTorch's `SummaryWriter` writes them.
//!
//! An event file is a sequence of records in TFRecord framing (length, its checksum, data, its
//! checksum; <https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details>), each
//! record a protobuf `Event` (`event.proto`, `summary.proto` of
//! <https://github.com/tensorflow/tensorboard/tree/master/tensorboard/compat/proto>). The first event
//! names the version of the format. A process that goes on from a checkpoint then writes a
//! `SessionLog` with status `START` and the step at which it does, upon which TensorBoard drops what earlier files
//! of the directory say from that step on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message;

use super::metrics::{InternalsRow, LayerRow, TrainRow, ValRow};
use crate::utils::atomic::remedy_for_room;

/// An event file that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot write the TensorBoard log: {source}{}", path.display(), remedy_for_room(source))]
pub struct TensorBoardError {
    /// The file, or its directory.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Ends the names of event files, as PyTorch's `filename_suffix`: so bbt's are told from those that others write into
/// the same directory.
pub const SUFFIX: &str = ".bbt";

/// CRC-32C (Castagnoli), the checksum of TFRecord.
const CRC32C: crc::Crc<u32, crc::Table<16>> = crc::Crc::<u32, crc::Table<16>>::new(&crc::CRC_32_ISCSI);

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(enumeration = "SessionStatus", tag = "1")]
    status: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum SessionStatus {
    Unspecified = 0,
    Start = 1,
}

/// Writes one event file. Each event reaches the operating system before the call returns.
#[derive(Debug)]
pub struct TensorBoardWriter {
    path: PathBuf,
    file: File,
}

impl TensorBoardWriter {
    /// Begins a new event file in `directory`, which is made if it is absent. A run that goes on from
    /// a checkpoint gives the first step to come (PyTorch's `purge_step`), a new run `None`.
    ///
    /// # Errors
    /// The directory or the file cannot be written.
    pub fn create(directory: &Path, purge_step: Option<u64>) -> Result<Self, TensorBoardError> {
        // As PyTorch's: the counter tells apart the files that one process begins in one second.
        static FILES: AtomicU32 = AtomicU32::new(0);
        let host = hostname::get().map_or_else(|_| "localhost".into(), |name| name.to_string_lossy().into_owned());
        let name = format!(
            "events.out.tfevents.{:010}.{host}.{}.{}{SUFFIX}",
            now().as_secs(),
            std::process::id(),
            FILES.fetch_add(1, Ordering::Relaxed)
        );
        let path = directory.join(name);
        let file = fs::create_dir_all(directory)
            .and_then(|()| OpenOptions::new().write(true).create_new(true).open(&path))
            .map_err(|source| TensorBoardError { path: path.clone(), source })?;
        let mut writer = Self { path, file };
        writer.event(0, What::FileVersion("brain.Event:2".into()))?;
        if let Some(step) = purge_step {
            writer.event(step, What::SessionLog(SessionLog { status: SessionStatus::Start.into() }))?;
        }
        Ok(writer)
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a training step: `train/loss`, `train/bits_per_byte` and so on, and `train/loss_scale`
    /// and `train/mfu` where there is one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn train(&mut self, row: &TrainRow) -> Result<(), TensorBoardError> {
        let mut scalars = vec![
            ("train/loss", row.loss),
            ("train/bits_per_byte", row.bits_per_byte),
            ("train/lr", row.lr),
            ("train/grad_norm", row.grad_norm),
            ("train/seq_len", row.seq_len as f64),
            ("train/bytes_per_second", row.bytes_per_second),
            ("train/skipped_steps", row.skipped_steps as f64),
            ("train/data_wait", row.data_wait),
            ("train/peak_memory_bytes", row.peak_memory_bytes as f64),
        ];
        scalars.extend(row.loss_scale.map(|scale| ("train/loss_scale", scale)));
        scalars.extend(row.mfu.map(|mfu| ("train/mfu", mfu)));
        if let Some(classes) = &row.byte_classes {
            scalars.push(("train/ws_loss", classes.ws_loss));
            scalars.push(("train/nonws_loss", classes.nonws_loss));
        }
        self.scalars(row.step, &scalars)
    }

    /// Writes a validation: `val/loss` and `val/bits_per_byte`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn validation(&mut self, row: &ValRow) -> Result<(), TensorBoardError> {
        self.scalars(row.step, &[("val/loss", row.val_loss), ("val/bits_per_byte", row.val_bits_per_byte)])
    }

    /// Writes a look inside. TensorBoard makes a group of what stands before the slash, and sorts groups by name: behind
    /// `train` and `val` comes one for each number, with a chart for each layer, such as
    /// `weight_zero/blocks.0.attn.q_proj`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn internals(&mut self, row: &InternalsRow) -> Result<(), TensorBoardError> {
        let of_layer = |layer: &LayerRow| {
            let numbers = [
                ("weight_grad_norm", Some(layer.grad_norm)),
                ("weight_zero", layer.zero),
                ("weight_plus", layer.plus),
                ("weight_minus", layer.minus),
                ("weight_flips", layer.flips),
                ("weight_gamma", layer.gamma),
                ("x_absmax", layer.input_absmax),
                ("x_absmax_mean", layer.input_absmax_mean),
            ];
            numbers.map(|(group, number)| number.map(|number| (format!("{group}/{}", layer.name), number)))
        };
        let scalars: Vec<(String, f64)> = row.layers.iter().flat_map(of_layer).flatten().collect();
        let scalars: Vec<(&str, f64)> = scalars.iter().map(|(tag, number)| (tag.as_str(), *number)).collect();
        self.scalars(row.step, &scalars)
    }

    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<(), TensorBoardError> {
        let scalar = |&(tag, value): &(&str, f64)| Scalar { tag: tag.into(), simple_value: Some(value as f32) };
        self.event(step, What::Summary(Summary { value: scalars.iter().map(scalar).collect() }))
    }

    fn event(&mut self, step: u64, what: What) -> Result<(), TensorBoardError> {
        let event = Event { wall_time: now().as_secs_f64(), step: step as i64, what: Some(what) };
        self.file
            .write_all(&record(&event.encode_to_vec()))
            .map_err(|source| TensorBoardError { path: self.path.clone(), source })
    }
}

/// `data` in TFRecord framing.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// The checksum of `data`, little-endian, masked so that data which holds checksums is no weakness.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    CRC32C.checksum(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(CRC32C.checksum(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn the_encoding_is_that_of_the_protocol() {
        let version = Event { wall_time: 0.0, step: 0, what: Some(What::FileVersion("brain.Event:2".into())) };
        assert_eq!(version.encode_to_vec(), b"\x1a\x0dbrain.Event:2");
        let start = What::SessionLog(SessionLog { status: SessionStatus::Start.into() });
        let start = Event { wall_time: 0.0, step: 21, what: Some(start) };
        assert_eq!(start.encode_to_vec(), b"\x10\x15\x3a\x02\x08\x01");
        let summary = Summary { value: vec![Scalar { tag: "a".into(), simple_value: Some(0.0) }] };
        let scalar = Event { wall_time: 0.0, step: 1, what: Some(What::Summary(summary)) };
        assert_eq!(scalar.encode_to_vec(), b"\x10\x01\x2a\x0a\x0a\x08\x0a\x01a\x15\0\0\0\0");
    }

    #[test]
    fn an_error_names_the_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let message = TensorBoardWriter::create(file.path(), None).unwrap_err().to_string();
        assert!(message.starts_with(&*file.path().to_string_lossy()), "{message}");
    }
}
