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
    /// Optimizer steps of the whole run. Every schedule spans them.
    pub steps: u64,
    /// Windows (sequences) per micro-batch on each rank.
    pub batch_size: i64,
    /// Gradient accumulation: micro-batches per optimizer step.
    pub grad_accum: i64,
    /// Precision of the matrix products. Weights and optimizer state stay fp32.
    pub precision: Precision,
    /// Activation checkpointing: backward recomputes each half of a block, whose activations are not kept.
    pub checkpointing: bool,
    /// On one GPU, record forward and backward once as a CUDA graph and replay it at every step, which saves the cost of
    /// launching each kernel. It takes more memory, since the graph keeps its activations.
    pub cuda_graph: bool,
    /// Device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is the first GPU, or the CPU where there is none.
    pub device: DeviceSpec,
    /// Random seed of the initial weights.
    pub seed: u64,
    /// Steps between two lines of the log.
    pub log_every: u64,
    /// Steps between two logs of layer statistics: weights, flips, inputs and gradient of each layer. 0 means never.
    pub internals_every: u64,
    /// Peak throughput of one device in `precision`, in TFLOP/s, for the model FLOPs utilization (MFU). null means that
    /// the GPU's name gives it, where it is known.
    pub peak_tflops: Option<f64>,
    /// Steps between two evaluations on `data.val`; there is one at the end, too. 0 means never.
    pub eval_every: u64,
    /// About how many bytes of `data.val` an evaluation reads, in pieces spread evenly over it. null means all of it.
    pub eval_bytes: Option<u64>,
    /// Sequence length of evaluations, in bytes. null means the longest of training.
    pub eval_seq_len: Option<i64>,
    /// Also log the loss of whitespace bytes and that of all other bytes.
    pub log_byte_class_loss: bool,
    /// Steps between two checkpoints; there is one at the end, too. 0 means at the end only.
    pub save_every: u64,
    /// How many numbered checkpoints are kept, besides the best one by validation loss.
    pub keep: usize,
    /// Save and stop after this step, as if interrupted. The schedules still span `steps`.
    pub stop_at: Option<u64>,
    /// What SIGUSR1 and SIGUSR2 do. Cluster schedulers send them before a job's time limit.
    pub on_usr1: OnUsr1,
    /// Stop with an error after this many steps in a row with a loss or gradient that is not finite.
    pub max_nonfinite: u64,
    /// Run directory, or the name of the checkpoint (`.pt`) in it.
    pub out: PathBuf,
}

/// What a run does on SIGUSR1 or SIGUSR2, once the current step is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnUsr1 {
    /// Save and continue.
    Save,
    /// Save and stop.
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
