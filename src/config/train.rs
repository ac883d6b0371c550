//! Section `train`: the run itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::DeviceSpec;
use super::check::{at_least, positive};
use super::error::{ConfigError, invalid};

/// The run itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps that every schedule spans.
    pub steps: u64,
    /// Windows per micro-batch.
    pub batch_size: i64,
    /// Micro-batches per optimizer step.
    pub grad_accum: i64,
    /// Precision of the matrix products; weights and optimizer stay fp32.
    pub precision: Precision,
    /// Recompute each half of a block in backward instead of keeping its activations.
    pub checkpointing: bool,
    /// On one GPU, record forward and backward once as a CUDA graph and repeat that: the host then launches a step at
    /// once. Takes more memory: the activations are the graph's own.
    pub cuda_graph: bool,
    /// Where to run.
    pub device: DeviceSpec,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Log every so many steps.
    pub log_every: u64,
    /// Log every so many steps what each layer is like inside: weights, flips, inputs, gradient; 0: never.
    pub internals_every: u64,
    /// Peak of one device in `precision`, TFLOP/s, for the model FLOPs utilisation; null: by the GPU's name, if known.
    pub peak_tflops: Option<f64>,
    /// Evaluate every so many steps, and at the end; 0: never.
    pub eval_every: u64,
    /// Evaluate on about so many bytes of `data.val`, in pieces spread evenly over it; null: on all of it.
    pub eval_bytes: Option<u64>,
    /// Sequence length of evaluations, in bytes; null: the longest that is trained on.
    pub eval_seq_len: Option<i64>,
    /// Log the loss of whitespace and of all other bytes apart, too.
    pub log_byte_class_loss: bool,
    /// Save every so many steps, and at the end; 0: at the end only.
    pub save_every: u64,
    /// Numbered checkpoints kept, besides the best by validation.
    pub keep: usize,
    /// End after this step, saved, as an interruption would; schedules still span `steps`.
    pub stop_at: Option<u64>,
    /// What SIGUSR1 and SIGUSR2 do, by which clusters warn of the end of a job's time.
    pub on_usr1: OnUsr1,
    /// Give up after so many steps in a row with a loss or gradient that is not finite.
    pub max_nonfinite: u64,
    /// Run directory, or a `.pt` file in it.
    pub out: PathBuf,
}

/// What a run does at SIGUSR1 or SIGUSR2, after the step at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnUsr1 {
    /// Save and go on.
    Save,
    /// Save and end.
    Stop,
}

/// Precision of the matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Precision {
    /// float32 throughout.
    Fp32,
    /// bfloat16 autocast.
    Bf16,
    /// float16 autocast with a gradient scaler.
    Fp16,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 2000,
            batch_size: 4,
            grad_accum: 1,
            precision: Precision::Bf16,
            checkpointing: true,
            cuda_graph: false,
            device: DeviceSpec::Auto,
            seed: 0,
            log_every: 10,
            internals_every: 100,
            peak_tflops: None,
            eval_every: 200,
            eval_bytes: None,
            eval_seq_len: None,
            log_byte_class_loss: false,
            save_every: 500,
            keep: 3,
            stop_at: None,
            on_usr1: OnUsr1::Save,
            max_nonfinite: 20,
            out: "runs/bbt".into(),
        }
    }
}

impl TrainConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        at_least("train.steps", self.steps as i64, 1)?;
        at_least("train.batch_size", self.batch_size, 1)?;
        at_least("train.grad_accum", self.grad_accum, 1)?;
        at_least("train.log_every", self.log_every as i64, 1)?;
        at_least("train.keep", self.keep as i64, 1)?;
        at_least("train.max_nonfinite", self.max_nonfinite as i64, 1)?;
        if let Some(stop) = self.stop_at {
            at_least("train.stop_at", stop as i64, 1)?;
        }
        if let Some(peak) = self.peak_tflops {
            positive("train.peak_tflops", peak)?;
        }
        if let Some(bytes) = self.eval_bytes {
            at_least("train.eval_bytes", bytes as i64, 2)?;
        }
        if let Some(length) = self.eval_seq_len {
            at_least("train.eval_seq_len", length, 1)?;
        }
        if self.out.as_os_str().is_empty() {
            return Err(invalid("train.out", "must name a directory or a .pt file"));
        }
        Ok(())
    }
}
