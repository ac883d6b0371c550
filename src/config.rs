//! What a run's YAML file says: typed, validated, and written back beside the checkpoint.
//!
//! Knows no tensor. Values come in layers, later ones winning: the defaults here, a checkpoint's own
//! model (when one is resumed), a YAML file, command-line flags. [`Layers`] collects what was given
//! and [`Layers::resolve`] makes the [`Config`]. `bbt config` prints the result; every key and its
//! default is a field of the structs below.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};

pub use crate::data::Order;

/// Size of the vocabulary: the 256 bytes.
pub const VOCAB_SIZE: i64 = 256;

/// The sequence length of the original at each fraction of the run.
const ORIGINAL_CURRICULUM: [(f64, i64); 3] = [(0.0, 2048), (0.2, 4096), (0.5, 8192)];

/// Default of `data.seq_len`.
const DEFAULT_SEQ_LEN: i64 = 512;

/// A configuration that cannot be used; says where it stands and what would do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The YAML file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not the YAML that a configuration is made of.
    #[error("{}: {message}\n  `bbt config` prints every key with its default", path.display())]
    Yaml {
        /// The YAML file.
        path: PathBuf,
        /// What and where, with the line.
        message: String,
    },
    /// A flag does not fit its key.
    #[error("{flag}: {message}")]
    Flag {
        /// As the user wrote it.
        flag: String,
        /// What is wrong with it.
        message: String,
    },
    /// A key has a value outside its range, or one that contradicts another.
    #[error("{key}: {message}")]
    Invalid {
        /// The key, as `section.key`.
        key: String,
        /// What would do.
        message: String,
    },
}

fn invalid(key: &str, message: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key: key.into(), message: message.into() }
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Shape of the model.
    pub model: ModelConfig,
    /// Quantization of weights and activations.
    pub quant: QuantConfig,
    /// What is read, and in which order.
    pub data: DataConfig,
    /// Optimizer and learning-rate schedule.
    pub optim: OptimConfig,
    /// The run itself.
    pub train: TrainConfig,
    /// Many processes.
    pub ddp: DdpConfig,
}

/// Shape of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Number of blocks.
    pub n_layer: i64,
    /// Width of the residual stream.
    pub d_model: i64,
    /// Number of query heads; divides `d_model`.
    pub n_head: i64,
    /// Number of key and value heads, for grouped-query attention; null: as many as `n_head`.
    pub n_kv_head: Option<i64>,
    /// Width of the SwiGLU hidden layer.
    pub d_ff: i64,
    /// Base of the rotary position embedding.
    pub rope_base: f64,
    /// How attention is computed.
    pub attention: Attention,
}

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attention {
    /// On the CPU kernels of our own, elsewhere libtorch's `scaled_dot_product_attention`.
    Auto,
    /// libtorch's `scaled_dot_product_attention`.
    Sdpa,
    /// Explicit softmax(q kᵀ / sqrt(d)) v.
    Math,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            n_layer: 24,
            d_model: 1536,
            n_head: 12,
            n_kv_head: None,
            d_ff: 4096,
            rope_base: 10000.0,
            attention: Attention::Auto,
        }
    }
}

impl ModelConfig {
    /// Number of key and value heads.
    pub fn kv_heads(&self) -> i64 {
        self.n_kv_head.unwrap_or(self.n_head)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> i64 {
        self.d_model / self.n_head
    }

    /// Number of trained values (the tied head counted once).
    pub fn parameters(&self) -> i64 {
        let kv = self.kv_heads() * self.head_dim();
        let attention = 2 * self.d_model * self.d_model + 2 * self.d_model * kv;
        let mlp = 3 * self.d_model * self.d_ff;
        VOCAB_SIZE * self.d_model + self.n_layer * (attention + mlp + 2 * self.d_model) + self.d_model
    }

    /// Checks that there is such a model.
    ///
    /// # Errors
    /// The first key that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        at_least("model.n_layer", self.n_layer, 1)?;
        at_least("model.d_model", self.d_model, 1)?;
        at_least("model.n_head", self.n_head, 1)?;
        at_least("model.d_ff", self.d_ff, 1)?;
        if self.d_model % self.n_head != 0 {
            return Err(invalid(
                "model.n_head",
                format!("{} heads do not divide model.d_model {}", self.n_head, self.d_model),
            ));
        }
        if self.head_dim() % 2 != 0 {
            return Err(invalid(
                "model.n_head",
                format!("d_model / n_head is {}, but rotary embeddings need an even head width", self.head_dim()),
            ));
        }
        if let Some(kv) = self.n_kv_head {
            at_least("model.n_kv_head", kv, 1)?;
            if self.n_head % kv != 0 {
                return Err(invalid(
                    "model.n_kv_head",
                    format!("{kv} key/value heads do not divide model.n_head {}", self.n_head),
                ));
            }
        }
        // Past this, sizes in bytes would no longer fit 64 bits.
        for (key, value) in [("n_layer", self.n_layer), ("d_model", self.d_model), ("d_ff", self.d_ff)] {
            if value > 1 << 20 {
                return Err(invalid(&format!("model.{key}"), format!("{value} is more than {}", 1 << 20)));
            }
        }
        positive("model.rope_base", self.rope_base)
    }
}

/// Quantization of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantConfig {
    /// Weights of the linear layers.
    pub weight: WeightQuant,
    /// The weights' straight-through estimator.
    pub ste: Ste,
    /// Inputs of the linear layers.
    pub act: ActQuant,
    /// The inputs' straight-through estimator.
    pub act_ste: ActSte,
    /// What computes it.
    pub kernel: QuantKernel,
    /// Fraction of the run over which quantization comes in, from full precision; 0: it is there from the start.
    pub start_frac: f64,
}

/// Quantization of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightQuant {
    /// {-1, 0, 1} times the mean absolute value of the tensor.
    Ternary,
    /// Full precision.
    None,
}

/// The straight-through estimator of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ste {
    /// The gradient passes unchanged.
    Identity,
    /// No gradient where |w / gamma| > 1, as the original.
    Clipped,
}

/// Quantization of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActQuant {
    /// Symmetric absmax int8, one scale per token.
    Int8,
    /// Full precision.
    None,
}

/// The straight-through estimator of the activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActSte {
    /// The gradient passes unchanged.
    Identity,
    /// None, as the original: the gradient flows through the scale alone, to the largest element of each token. The
    /// reference computes it.
    None,
}

/// What computes quantized layers and what stands around them. The same functions, rounded elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantKernel {
    /// The fused kernels for each layer that they compute: ternary weights, int8 activations with the identity as
    /// estimator, fully quantized. Else the reference. Nothing is timed, so every process of a run chooses alike.
    Auto,
    /// Kernels of our own: integer products, and what comes before them in one pass.
    Fused,
    /// libtorch's operators: detach arithmetic and floating-point products.
    Reference,
}

impl Default for QuantConfig {
    fn default() -> Self {
        Self {
            weight: WeightQuant::Ternary,
            ste: Ste::Identity,
            act: ActQuant::Int8,
            act_ste: ActSte::Identity,
            kernel: QuantKernel::Auto,
            start_frac: 0.0,
        }
    }
}

impl QuantConfig {
    /// Whether there are fused kernels for it, and `kernel` does not rule them out.
    pub fn may_fuse(&self) -> bool {
        let quantized = self.weight == WeightQuant::Ternary && self.act == ActQuant::Int8;
        quantized && self.act_ste == ActSte::Identity && self.kernel != QuantKernel::Reference
    }

    /// λ, how far quantization has come in at `step` (from 0) in a run of `steps`: from 0, full precision, in a line to
    /// 1 at `start_frac` of the run. Each quantized x is x + λ (q(x) - x).
    pub fn lambda(&self, step: u64, steps: u64) -> f64 {
        let start = self.start_frac * steps as f64;
        if start > 0.0 { (step as f64 / start).min(1.0) } else { 1.0 }
    }
}

/// What is read, and in which order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Training bytes: a directory of `shard_*.bin`, a glob, or one file.
    pub train: String,
    /// Held-out bytes, likewise; null: no evaluation during training.
    pub val: Option<String>,
    /// Order of the training windows.
    pub order: Order,
    /// Bytes predicted per window (512 where no curriculum is given).
    pub seq_len: Option<i64>,
    /// Instead of `seq_len`: pairs of (fraction of the run, sequence length from there on).
    pub curriculum: Option<Vec<(f64, i64)>>,
    /// Seed of the order.
    pub seed: u64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: "corpus/train".into(),
            val: None,
            order: Order::Shuffled,
            seq_len: None,
            curriculum: None,
            seed: 1234,
        }
    }
}

impl DataConfig {
    /// The sequence length at each fraction of the run: one entry where it is fixed.
    pub fn curriculum(&self) -> Vec<(f64, i64)> {
        match &self.curriculum {
            Some(stages) => stages.clone(),
            None => vec![(0.0, self.seq_len.unwrap_or(DEFAULT_SEQ_LEN))],
        }
    }

    /// The longest sequence of the run: what evaluation uses, unless `train.eval_seq_len` says otherwise.
    pub fn max_seq_len(&self) -> i64 {
        self.curriculum().iter().map(|&(_, length)| length).max().unwrap_or(DEFAULT_SEQ_LEN)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if let Some(length) = self.seq_len {
            at_least("data.seq_len", length, 1)?;
        }
        if let Some(stages) = &self.curriculum {
            let key = "data.curriculum";
            match stages.first() {
                Some((start, _)) if *start == 0.0 => {}
                _ => {
                    return Err(invalid(
                        key,
                        "the first stage must start at fraction 0.0, as in [[0.0, 2048], [0.5, 4096]]",
                    ));
                }
            }
            if stages.windows(2).any(|pair| pair[0].0 >= pair[1].0) || stages.iter().any(|s| !(0.0..1.0).contains(&s.0))
            {
                return Err(invalid(key, "fractions of the run must rise from 0.0 and stay below 1.0"));
            }
            for &(_, length) in stages {
                at_least(key, length, 1)?;
            }
        }
        Ok(())
    }
}

/// Optimizer and learning-rate schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// The optimizer.
    pub name: OptimizerName,
    /// Peak learning rate.
    pub lr: f64,
    /// Decay rates of AdamW's first and second moment.
    pub betas: (f64, f64),
    /// AdamW's epsilon.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest L2 norm of the gradient; 0: no clipping.
    pub grad_clip: f64,
    /// Shape of the learning rate after warmup; of the weight decay, too, where it is `two_stage`.
    pub schedule: Schedule,
    /// Fraction of the run over which the learning rate rises linearly.
    pub warmup_frac: f64,
    /// The same in steps; null: from `warmup_frac`.
    pub warmup_steps: Option<u64>,
    /// The learning rate ends at this fraction of `lr`.
    pub min_lr_factor: f64,
    /// `wsd`: fraction of the run, its last, over which the learning rate falls.
    pub decay_frac: f64,
    /// `two_stage`: fraction of the run after which the second stage begins.
    pub stage_frac: f64,
    /// `two_stage`: the second stage's peak learning rate, as a fraction of `lr`.
    pub stage_lr_factor: f64,
    /// Which parameters decay.
    pub decay: Decay,
}

/// The optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// torch.optim.AdamW.
    AdamW,
    /// bitsandbytes' AdamW8bit: moments of 8 bits (Dettmers et al. 2022, arXiv 2110.02861).
    AdamW8bit,
}

/// Shape of the learning rate after warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine down to `min_lr_factor`.
    Cosine,
    /// Stays at `lr`.
    Constant,
    /// Warmup, stable, decay (MiniCPM, Hu et al. 2024, arXiv 2404.06395): stays at `lr`, then falls to `min_lr_factor`.
    Wsd,
    /// BitNet b1.58's (Ma et al. 2024, arXiv 2402.17764): a line down to `min_lr_factor`, from a lower peak and without
    /// weight decay in the second stage.
    TwoStage,
}

/// Which parameters decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Every parameter, as the original.
    All,
    /// Those of two or more dimensions: the embedding and the linear layers, but not the norms.
    Matrices,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            name: OptimizerName::AdamW,
            lr: 1e-3,
            betas: (0.9, 0.95),
            eps: 1e-8,
            weight_decay: 0.1,
            grad_clip: 1.0,
            schedule: Schedule::Cosine,
            warmup_frac: 0.03,
            warmup_steps: None,
            min_lr_factor: 0.1,
            decay_frac: 0.2,
            stage_frac: 0.5,
            // From 1.2e-3 to 8e-4, as the 1.3B and larger models of the "Training Tips".
            stage_lr_factor: 2.0 / 3.0,
            decay: Decay::All,
        }
    }
}

impl OptimConfig {
    /// Number of warmup steps in a run of `steps`.
    pub fn warmup(&self, steps: u64) -> u64 {
        // Rounded down, as Python's int().
        self.warmup_steps.unwrap_or((self.warmup_frac * steps as f64) as u64)
    }

    /// Number of steps over which `wsd` decays, the last of a run of `steps`.
    pub fn decay_steps(&self, steps: u64) -> u64 {
        (self.decay_frac * steps as f64) as u64
    }

    /// The step with which the second stage of `two_stage` begins.
    pub fn second_stage(&self, steps: u64) -> u64 {
        (self.stage_frac * steps as f64) as u64
    }

    fn validate(&self) -> Result<(), ConfigError> {
        positive("optim.lr", self.lr)?;
        within("optim.betas", self.betas.0, 0.0..1.0)?;
        within("optim.betas", self.betas.1, 0.0..1.0)?;
        positive("optim.eps", self.eps)?;
        within("optim.weight_decay", self.weight_decay, 0.0..f64::MAX)?;
        within("optim.grad_clip", self.grad_clip, 0.0..f64::MAX)?;
        within("optim.warmup_frac", self.warmup_frac, 0.0..1.0)?;
        up_to_one("optim.min_lr_factor", self.min_lr_factor)?;
        up_to_one("optim.decay_frac", self.decay_frac)?;
        up_to_one("optim.stage_frac", self.stage_frac)?;
        up_to_one("optim.stage_lr_factor", self.stage_lr_factor)?;
        if self.schedule == Schedule::TwoStage && self.stage_lr_factor < self.min_lr_factor {
            return Err(invalid(
                "optim.stage_lr_factor",
                format!(
                    "{} is less than optim.min_lr_factor {}, with which the run ends: lower that one",
                    self.stage_lr_factor, self.min_lr_factor
                ),
            ));
        }
        Ok(())
    }
}

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
pub enum OnUsr1 {
    /// Save and go on.
    Save,
    /// Save and end.
    Stop,
}

/// Precision of the matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
    fn validate(&self) -> Result<(), ConfigError> {
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

/// Training by many processes, one per rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DdpConfig {
    /// What carries tensors between ranks.
    pub backend: Backend,
    /// Seconds after which a rank that others wait for counts as lost.
    pub timeout: u64,
    /// Gradients are averaged in buckets of so many MiB.
    pub bucket_cap_mb: i64,
    /// 1: each rank keeps and steps its part of the optimizer's state (ZeRO stage 1, Rajbhandari et al. 2020,
    /// arXiv 1910.02054); 0: all of it.
    pub zero_stage: u8,
}

/// What carries tensors between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// NCCL on GPUs, Gloo on CPUs.
    Auto,
    /// NVIDIA's collectives, between GPUs.
    Nccl,
    /// TCP.
    Gloo,
}

impl Default for DdpConfig {
    fn default() -> Self {
        Self { backend: Backend::Auto, timeout: 600, bucket_cap_mb: 25, zero_stage: 0 }
    }
}

impl DdpConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        at_least("ddp.timeout", self.timeout as i64, 1)?;
        at_least("ddp.bucket_cap_mb", self.bucket_cap_mb, 1)?;
        if self.zero_stage > 1 {
            return Err(invalid("ddp.zero_stage", format!("{} is not 0 or 1", self.zero_stage)));
        }
        Ok(())
    }
}

/// Where to run: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub enum DeviceSpec {
    /// The first CUDA device where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by number.
    Cuda(usize),
}

impl FromStr for DeviceSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("unknown device `{text}`: use auto, cpu, cuda or cuda:N")),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl<'de> Deserialize<'de> for DeviceSpec {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = DeviceSpec;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "auto, cpu, cuda or cuda:N")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<DeviceSpec, E> {
                text.parse().map_err(E::custom)
            }
        }
        // A visitor, and not serde's try_from, since only its errors carry the key and the line.
        deserializer.deserialize_str(Text)
    }
}

impl From<DeviceSpec> for String {
    fn from(device: DeviceSpec) -> String {
        device.to_string()
    }
}

fn at_least(key: &str, value: i64, least: i64) -> Result<(), ConfigError> {
    if value < least {
        return Err(invalid(key, format!("{value} is less than {least}")));
    }
    Ok(())
}

fn positive(key: &str, value: f64) -> Result<(), ConfigError> {
    if !(value > 0.0 && value.is_finite()) {
        return Err(invalid(key, format!("{value} is not a number above 0")));
    }
    Ok(())
}

fn within(key: &str, value: f64, range: std::ops::Range<f64>) -> Result<(), ConfigError> {
    if !range.contains(&value) {
        let upper = if range.end == f64::MAX { "up".into() } else { format!("below {}", range.end) };
        return Err(invalid(key, format!("{value} is not within {} and {upper}", range.start)));
    }
    Ok(())
}

fn up_to_one(key: &str, value: f64) -> Result<(), ConfigError> {
    if !(0.0..=1.0).contains(&value) {
        return Err(invalid(key, format!("{value} is not within 0 and 1")));
    }
    Ok(())
}

impl Config {
    /// Checks every value's range.
    ///
    /// # Errors
    /// The first key that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.model.validate()?;
        within("quant.start_frac", self.quant.start_frac, 0.0..1.0)?;
        self.data.validate()?;
        self.optim.validate()?;
        self.train.validate()?;
        self.ddp.validate()?;
        let (steps, warmup) = (self.train.steps, self.optim.warmup(self.train.steps));
        let decay = self.optim.decay_steps(steps);
        if self.optim.schedule == Schedule::Wsd && decay > steps.saturating_sub(warmup) {
            return Err(invalid(
                "optim.decay_frac",
                format!(
                    "{decay} of {steps} steps of decay and {warmup} of warmup do not fit into the run: \
                     lower it or the warmup"
                ),
            ));
        }
        Ok(())
    }

    /// The configuration as YAML, every key present.
    pub fn to_yaml(&self) -> String {
        serde_yaml::to_string(self).unwrap_or_else(|error| format!("# {error}\n"))
    }

    /// Reads back what [`Config::to_yaml`] wrote, as a checkpoint holds it.
    ///
    /// # Errors
    /// Text that is no configuration.
    pub fn from_yaml(text: &str) -> Result<Self, serde_yaml::Error> {
        serde_yaml::from_str(text)
    }
}

/// The parser's message in a user's words, with the line. serde_yaml leaves that out for an unknown section, so it is
/// looked up in the text.
fn with_line(error: &serde_yaml::Error, text: &str) -> String {
    let message = in_plain_words(&error.to_string());
    if message.contains(" at line ") {
        return message;
    }
    let Some(key) = message.split('`').nth(1) else { return message };
    let mut lines = (1..).zip(text.lines()).filter(|(_, line)| names(line, key)).map(|(number, _)| number);
    // Of a key that stands twice, the second is the mistake.
    let line: Option<usize> = if message.starts_with("duplicate") { lines.nth(1) } else { lines.next() };
    match line {
        Some(number) => format!("{message} at line {number}"),
        None => message,
    }
}

/// Whether `line` begins with the section `key`.
fn names(line: &str, key: &str) -> bool {
    let line = line.trim_start_matches(['"', '\'', '{', ' ']);
    line.strip_prefix(key).is_some_and(|rest| rest.trim_start_matches(['"', '\'', ' ']).starts_with(':'))
}

/// The line, from 1, at which `text` sets `section.key`.
fn line_of(text: &str, section: &str, key: &str) -> Option<usize> {
    let lines = (1..).zip(text.lines()).skip_while(|(_, line)| !names(line, section));
    let sets = |line: &str| line.split(['{', ',']).any(|part| names(part, key));
    let mut lines = lines.map(|(number, line)| (number, line.split_once('#').map_or(line, |(code, _)| code)));
    lines.find(|(_, line)| sets(line.trim_start_matches(section).trim_start_matches(':'))).map(|(number, _)| number)
}

/// serde's words for Rust's types, and what they are called in a configuration.
const TYPES: [(&str, &str); 13] = [
    ("expected struct Config", "expected sections of keys, as in `train: {steps: 100}`"),
    ("expected struct ModelConfig", SECTION),
    ("expected struct QuantConfig", SECTION),
    ("expected struct DataConfig", SECTION),
    ("expected struct OptimConfig", SECTION),
    ("expected struct TrainConfig", SECTION),
    ("expected struct DdpConfig", SECTION),
    ("expected a YAML tag starting with '!'", "expected one of its names"),
    ("expected f64", "expected a number"),
    ("expected i64", "expected a whole number"),
    ("expected u64", "expected a whole number, not below 0"),
    ("expected usize", "expected a whole number, not below 0"),
    ("expected a tuple of size 2", "expected two values, as in [0.9, 0.95]"),
];

const SECTION: &str = "expected keys with values, or else no such section";

fn in_plain_words(message: &str) -> String {
    let mut text = message.replace("invalid type: unit value", "invalid type: nothing");
    for (rust, plain) in TYPES {
        text = text.replace(rust, plain);
    }
    text
}

/// What was given, by file and flags, before defaults: a partial configuration.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    /// Each value as its own type is written, so that it reads back as that type.
    given: Mapping,
    /// Where each key (`section.key`) was given, in words.
    origins: BTreeMap<String, String>,
}

impl Layers {
    /// Adds a YAML file over what is there.
    ///
    /// # Errors
    /// An unreadable file, unknown or mistyped keys (with their line), `seq_len` beside `curriculum`.
    pub fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        self.add_yaml(&text, path)
    }

    fn add_yaml(&mut self, text: &str, path: &Path) -> Result<(), ConfigError> {
        if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(());
        }
        let typed: Config = serde_yaml::from_str(text)
            .map_err(|e| ConfigError::Yaml { path: path.into(), message: with_line(&e, text) })?;
        if typed.data.seq_len.is_some() && typed.data.curriculum.is_some() {
            return Err(ConfigError::Flag {
                flag: path.display().to_string(),
                message: "data.seq_len and data.curriculum exclude each other: keep one".into(),
            });
        }
        self.take(text, &typed, |section, key| {
            let line = line_of(text, section, key).map(|line| format!(" line {line}")).unwrap_or_default();
            format!("{}{line}", path.display())
        });
        Ok(())
    }

    /// Takes of `typed`, read from `text`, what `text` names.
    fn take(&mut self, text: &str, typed: &Config, origin: impl Fn(&str, &str) -> String) {
        // Once more, for which keys there are. What they are was read above, with their types.
        let sections: Mapping = serde_yaml::from_str(text).unwrap_or_default();
        let values = serde_yaml::to_value(typed).unwrap_or_default();
        for (section, keys) in &sections {
            let (Some(section), Some(keys)) = (section.as_str(), keys.as_mapping()) else { continue };
            for key in keys.keys().filter_map(Value::as_str) {
                if let Some(value) = values.get(section).and_then(|keys| keys.get(key)) {
                    self.put(section, key, value.clone(), origin(section, key));
                }
            }
        }
    }

    /// Sets `key` (`section.key`) to a value; `flag` is what an error names.
    ///
    /// # Errors
    /// An unknown key or a value of another type.
    pub fn set(&mut self, flag: &str, key: &str, value: impl Into<Value>) -> Result<(), ConfigError> {
        let error = |message: String| ConfigError::Flag { flag: flag.into(), message };
        let (section, name) =
            key.split_once('.').ok_or_else(|| error(format!("`{key}` is not of the form section.key")))?;
        let mut keys = Mapping::new();
        keys.insert(name.into(), value.into());
        let mut sections = Mapping::new();
        sections.insert(section.into(), keys.into());
        // As text, so that a value is read by the same rules as in a file.
        let text = serde_yaml::to_string(&sections).map_err(|e| error(e.to_string()))?;
        let typed: Config = serde_yaml::from_str(&text).map_err(|e| error(without_line(&e)))?;
        self.take(&text, &typed, |_, _| flag.into());
        Ok(())
    }

    /// Sets a key from `section.key=value`, the value being YAML.
    ///
    /// # Errors
    /// As [`Layers::set`], or text of another form.
    pub fn set_text(&mut self, assignment: &str) -> Result<(), ConfigError> {
        let flag = format!("--set {assignment}");
        let Some((key, value)) = assignment.split_once('=') else {
            return Err(ConfigError::Flag { flag, message: "expected section.key=value".into() });
        };
        let value: Value = serde_yaml::from_str(value)
            .map_err(|e| ConfigError::Flag { flag: flag.clone(), message: e.to_string() })?;
        self.set(&flag, key.trim(), value)
    }

    /// Caps every sequence length (`--seq_len_cap`): the fixed length, the curriculum given, or the
    /// original's curriculum (2048, 4096 from 20 % on, 8192 from 50 % on) where neither is.
    ///
    /// # Errors
    /// A cap below 1.
    pub fn cap_seq_len(&mut self, flag: &str, cap: i64) -> Result<(), ConfigError> {
        if cap < 1 {
            return Err(ConfigError::Flag { flag: flag.into(), message: format!("{cap} is less than 1") });
        }
        let data: DataConfig = match self.given.get("data") {
            Some(section) => serde_yaml::from_value(section.clone())
                .map_err(|e| ConfigError::Flag { flag: flag.into(), message: e.to_string() })?,
            None => DataConfig::default(),
        };
        match (data.seq_len, data.curriculum) {
            (Some(length), _) => self.set(flag, "data.seq_len", length.min(cap)),
            (None, curriculum) => {
                let stages = curriculum.unwrap_or_else(|| ORIGINAL_CURRICULUM.to_vec());
                let capped: Vec<Value> = stages
                    .into_iter()
                    .map(|(start, length)| Value::Sequence(vec![start.into(), length.min(cap).into()]))
                    .collect();
                self.set(flag, "data.curriculum", capped)
            }
        }
    }

    fn put(&mut self, section: &str, key: &str, value: Value, origin: String) {
        self.origins.insert(format!("{section}.{key}"), origin);
        let keys = self.given.entry(section.into()).or_insert_with(|| Mapping::new().into());
        let Value::Mapping(keys) = keys else { return };
        // The later of the two says how long sequences are.
        match (section, key) {
            ("data", "seq_len") if !value.is_null() => drop(keys.remove("curriculum")),
            ("data", "curriculum") if !value.is_null() => drop(keys.remove("seq_len")),
            _ => {}
        }
        keys.insert(key.into(), value);
    }

    /// Whether `section.key` was given.
    pub fn has(&self, section: &str, key: &str) -> bool {
        self.given.get(section).and_then(|keys| keys.get(key)).is_some()
    }

    /// What was given over the defaults, not validated yet.
    ///
    /// # Errors
    /// None that adding a layer would not have found.
    pub fn given(&self) -> Result<Config, ConfigError> {
        serde_yaml::from_value(Value::Mapping(self.given.clone())).map_err(|e| invalid("configuration", e.to_string()))
    }

    /// The whole configuration, validated. `checkpoint` is the model and quantization of a checkpoint
    /// that is continued: what was not given comes from there, and a shape that was given and differs
    /// is an error.
    ///
    /// # Errors
    /// A value out of range, or a contradiction with the checkpoint; both name the key.
    pub fn resolve(&self, checkpoint: Option<(&ModelConfig, &QuantConfig)>) -> Result<Config, ConfigError> {
        let given = self.given()?;
        let mut config = given.clone();
        if let Some((model, quant)) = checkpoint {
            let shapes = [
                ("n_layer", given.model.n_layer, model.n_layer),
                ("d_model", given.model.d_model, model.d_model),
                ("n_head", given.model.n_head, model.n_head),
                // Null means as many as n_head, so the number of heads is what must agree.
                ("n_kv_head", given.model.n_kv_head.unwrap_or(model.n_head), model.kv_heads()),
                ("d_ff", given.model.d_ff, model.d_ff),
            ];
            for (key, asked, has) in shapes {
                if self.has("model", key) && asked != has {
                    return Err(invalid(
                        &format!("model.{key}"),
                        format!(
                            "{asked} was asked for, but the checkpoint has {has}: leave it out, or start without the checkpoint"
                        ),
                    ));
                }
            }
            config.model = ModelConfig { attention: given.model.attention, ..model.clone() };
            if self.has("model", "rope_base") {
                config.model.rope_base = given.model.rope_base;
            }
            if !self.has("quant", "weight") {
                config.quant.weight = quant.weight;
            }
            if !self.has("quant", "ste") {
                config.quant.ste = quant.ste;
            }
            if !self.has("quant", "act_ste") {
                config.quant.act_ste = quant.act_ste;
            }
            if !self.has("quant", "act") {
                config.quant.act = quant.act;
            }
        }
        if config.data.curriculum.is_none() {
            config.data.seq_len.get_or_insert(DEFAULT_SEQ_LEN);
        }
        config.validate().map_err(|error| self.with_origin(error))?;
        Ok(config)
    }

    /// A value out of range, with where it was given.
    fn with_origin(&self, error: ConfigError) -> ConfigError {
        match error {
            ConfigError::Invalid { key, message } => match self.origins.get(&key) {
                Some(origin) => ConfigError::Invalid { message: format!("{message} ({origin})"), key },
                None => ConfigError::Invalid { key, message },
            },
            other => other,
        }
    }
}

/// The parser's message about a value that stands alone, which has no line worth naming.
fn without_line(error: &serde_yaml::Error) -> String {
    let message = in_plain_words(&error.to_string());
    message.split(" at line ").next().unwrap_or(&message).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(text: &str) -> Result<Layers, ConfigError> {
        let mut layers = Layers::default();
        layers.add_yaml(text, Path::new("run.yaml"))?;
        Ok(layers)
    }

    fn message(text: &str) -> String {
        match layers(text).and_then(|l| l.resolve(None)) {
            Ok(config) => panic!("accepted: {config:?}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn flags_override_yaml_and_yaml_overrides_defaults() {
        let mut l = layers("optim: {lr: 1e-4, weight_decay: 0.2}\ntrain: {steps: 7}\n").unwrap();
        l.set("--lr", "optim.lr", 5e-4).unwrap();
        l.set_text("optim.betas=[0.8, 0.9]").unwrap();
        let config = l.resolve(None).unwrap();
        assert_eq!((config.optim.lr, config.optim.weight_decay), (5e-4, 0.2));
        assert_eq!((config.optim.betas, config.train.steps), ((0.8, 0.9), 7));
        assert_eq!(config.optim.eps, 1e-8);
        assert_eq!(config.data.seq_len, Some(512));
    }

    /// It calls itself the reference of all keys, and the guide does so, too.
    #[test]
    fn tiny_yaml_shows_every_key() {
        let keys = |text: &str| -> Vec<String> {
            let sections: serde_yaml::Mapping = serde_yaml::from_str(text).unwrap();
            let keys = |(section, keys): (&serde_yaml::Value, &serde_yaml::Value)| {
                let name = |key: &serde_yaml::Value| format!("{}.{}", section.as_str().unwrap(), key.as_str().unwrap());
                keys.as_mapping().unwrap().keys().map(name).collect::<Vec<_>>()
            };
            sections.iter().flat_map(keys).collect()
        };
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/tiny.yaml")).unwrap();
        let mut shown = keys(&text);
        // Which excludes data.seq_len: shown in its comment.
        assert!(text.contains("or curriculum: ["));
        shown.push("data.curriculum".into());
        let mut all = keys(&Config::default().to_yaml());
        shown.sort();
        all.sort();
        assert_eq!(shown, all);
    }

    #[test]
    fn a_resolved_configuration_reads_back_equal() {
        for text in ["", "data: {curriculum: [[0.0, 64], [0.5, 128]]}\ntrain: {device: cuda:3, stop_at: 4}\n"] {
            let config = layers(text).unwrap().resolve(None).unwrap();
            assert_eq!(layers(&config.to_yaml()).unwrap().resolve(None).unwrap(), config);
            assert_eq!(Config::from_yaml(&config.to_yaml()).unwrap(), config);
        }
    }

    #[test]
    fn unknown_and_mistyped_keys_are_named_with_their_line() {
        let text = message("model:\n  n_layer: 2\n  n_layr: 3\n");
        assert!(text.contains("run.yaml") && text.contains("n_layr") && text.contains("line 3"), "{text}");
        let text = message("optim:\n  lr: fast\n");
        assert!(text.contains("optim.lr") && text.contains("line 2"), "{text}");
        let text = message("modle: {}\n");
        assert!(text.contains("modle") && text.contains("line 1"), "{text}");
        let text = message("train: {device: tpu}\n");
        assert!(text.contains("train.device") && text.contains("`tpu`") && text.contains("line 1"), "{text}");
        let mut l = Layers::default();
        let text = l.set_text("optim.lrr=1").unwrap_err().to_string();
        assert!(text.contains("--set optim.lrr=1") && text.contains("unknown field"), "{text}");
    }

    #[test]
    fn a_value_is_read_by_one_rule_wherever_it_stands() {
        // A number or a truth value where a path or a name belongs.
        for (text, key, expected) in [
            ("train: {out: 7}", "train.out=7", "7"),
            ("data:\n  train: 2024\n", "data.train=2024", "2024"),
            ("data: {val: false}", "data.val=false", "false"),
        ] {
            let mut set = Layers::default();
            set.set_text(key).unwrap();
            let [file, flag] = [layers(text).unwrap(), set].map(|layers| layers.resolve(None).unwrap());
            assert_eq!(file, flag, "{text}");
            assert_eq!(layers(&file.to_yaml()).unwrap().resolve(None).unwrap(), file, "{text}");
            let found = [file.train.out.to_str(), Some(file.data.train.as_str()), file.data.val.as_deref()];
            assert!(found.contains(&Some(expected)), "{found:?}");
        }
        for (key, value, part) in [
            ("train.precision", "16", "`fp32`"),
            ("train.precision", "[1]", "one of its names"),
            ("optim.lr", "fast", "a number"),
            ("optim.lr", "[1]", "a number"),
            ("optim.betas", "0.9", "two values"),
            ("optim.betas", "[0.9]", "two values"),
            ("train.steps", "-1", "not below 0"),
            ("train.steps", "1.5", "not below 0"),
            ("train.checkpointing", "maybe", "a boolean"),
            ("model.n_layer", "two", "a whole number"),
            ("train.device", "3", "unknown device `3`"),
            ("model", "1", "section.key"),
        ] {
            let mut l = Layers::default();
            let flag = l.set_text(&format!("{key}={value}")).unwrap_err().to_string();
            assert!(flag.starts_with(&format!("--set {key}={value}: ")) && flag.contains(part), "{flag}");
            assert!(!flag.contains(" line "), "a flag has no lines: {flag}");
            let mut messages = vec![flag];
            if let Some((section, name)) = key.split_once('.') {
                let file = message(&format!("# a comment\n{section}:\n  {name}: {value}\n"));
                let named = ["run.yaml", key, "line 3", part].into_iter().all(|part| file.contains(part));
                assert!(named, "{file}");
                messages.push(file);
            }
            for text in messages {
                for rust in ["struct", "enum", "Tagged", "i64", "u64", "f64", "tuple", "unit value"] {
                    assert!(!text.contains(rust), "{rust} in {text}");
                }
            }
        }
        for (text, part) in
            [("- 1\n", "sections of keys"), ("model:\n", "no such section"), ("hello\n", "sections of keys")]
        {
            let text = message(text);
            assert!(text.contains("run.yaml") && text.contains(part) && !text.contains("struct"), "{text}");
        }
    }

    #[test]
    fn a_value_out_of_range_says_where_it_was_given() {
        for (text, origin) in [
            ("train: {steps: 0}\n", "run.yaml line 1"),
            ("model:\n  n_layer: 2\ntrain:\n  # steps: 3\n  'steps': 0   # none\n", "run.yaml line 5"),
            ("optim: {lr: 1}\ntrain: {log_every: 2, steps: 0}\n", "run.yaml line 2"),
        ] {
            assert_eq!(message(text), format!("train.steps: 0 is less than 1 ({origin})"));
        }
        let mut l = layers("train: {steps: 5}").unwrap();
        l.set("--steps", "train.steps", 0).unwrap();
        assert_eq!(l.resolve(None).unwrap_err().to_string(), "train.steps: 0 is less than 1 (--steps)");
    }

    #[test]
    fn values_out_of_range_name_their_key() {
        for (text, key) in [
            ("model: {n_layer: 0}", "model.n_layer"),
            ("model: {d_model: 64, n_head: 5}", "model.n_head"),
            ("model: {d_model: 12, n_head: 4}", "model.n_head"),
            ("model: {n_head: 12, n_kv_head: 5}", "model.n_kv_head"),
            ("optim: {lr: -1}", "optim.lr"),
            ("optim: {lr: .nan}", "optim.lr"),
            ("optim: {betas: [0.9, 1.0]}", "optim.betas"),
            ("optim: {warmup_frac: 1.5}", "optim.warmup_frac"),
            ("optim: {schedule: wsd, decay_frac: 1.1}", "optim.decay_frac"),
            ("optim: {schedule: wsd, decay_frac: 0.9, warmup_frac: 0.2}", "optim.decay_frac"),
            ("optim: {schedule: wsd, warmup_steps: 9}\ntrain: {steps: 10}", "optim.decay_frac"),
            ("optim: {schedule: two_stage, stage_frac: -0.1}", "optim.stage_frac"),
            ("optim: {schedule: two_stage, stage_lr_factor: .nan}", "optim.stage_lr_factor"),
            ("optim: {schedule: two_stage, stage_lr_factor: 0.05}", "optim.stage_lr_factor"),
            ("quant: {start_frac: 1.0}", "quant.start_frac"),
            ("quant: {start_frac: -0.5}", "quant.start_frac"),
            ("train: {steps: 0}", "train.steps"),
            ("train: {batch_size: 0}", "train.batch_size"),
            ("train: {keep: 0}", "train.keep"),
            ("train: {peak_tflops: 0}", "train.peak_tflops"),
            ("data: {seq_len: 0}", "data.seq_len"),
            ("data: {curriculum: [[0.1, 64]]}", "data.curriculum"),
            ("data: {curriculum: [[0.0, 64], [0.0, 32]]}", "data.curriculum"),
        ] {
            let text = message(text);
            assert!(text.starts_with(&format!("{key}: ")), "{text}");
        }
    }

    #[test]
    fn the_later_of_seq_len_and_curriculum_counts() {
        let mut l = layers("data: {curriculum: [[0.0, 64], [0.5, 128]]}").unwrap();
        assert_eq!(l.resolve(None).unwrap().data.max_seq_len(), 128);
        l.set("--seq_len", "data.seq_len", 32).unwrap();
        assert_eq!(l.resolve(None).unwrap().data.curriculum(), [(0.0, 32)]);
        assert!(message("data: {seq_len: 1, curriculum: [[0.0, 2]]}").contains("exclude"));
    }

    #[test]
    fn a_cap_applies_to_whatever_says_the_length() {
        let capped = |mut l: Layers| {
            l.cap_seq_len("--seq_len_cap", 3000).unwrap();
            l.resolve(None).unwrap().data.curriculum()
        };
        assert_eq!(capped(Layers::default()), [(0.0, 2048), (0.2, 3000), (0.5, 3000)]);
        assert_eq!(capped(layers("data: {seq_len: 4096}").unwrap()), [(0.0, 3000)]);
        assert_eq!(capped(layers("data: {curriculum: [[0.0, 8000]]}").unwrap()), [(0.0, 3000)]);
    }

    #[test]
    fn a_checkpoint_gives_the_shape_and_a_contradiction_names_the_key() {
        let model = ModelConfig { n_layer: 2, d_model: 64, n_head: 4, d_ff: 160, ..ModelConfig::default() };
        let quant = QuantConfig { act: ActQuant::None, ..QuantConfig::default() };
        let config = layers("model: {n_layer: 2}").unwrap().resolve(Some((&model, &quant))).unwrap();
        assert_eq!((config.model, config.quant), (model.clone(), quant));
        let error = layers("model: {d_ff: 128}").unwrap().resolve(Some((&model, &quant))).unwrap_err().to_string();
        assert!(error.starts_with("model.d_ff: 128") && error.contains("160"), "{error}");
    }

    #[test]
    fn quantization_comes_in_in_a_line() {
        let quant = |start_frac| QuantConfig { start_frac, ..QuantConfig::default() };
        assert!((0..10).all(|step| quant(0.0).lambda(step, 10) == 1.0));
        let line: Vec<f64> = (0..=10).map(|step| quant(0.4).lambda(step, 10)).collect();
        assert_eq!(line, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        // However late: a finished run is quantized.
        assert_eq!(quant(0.999).lambda(10, 10), 1.0);
    }

    #[test]
    fn the_parameter_count_is_the_originals() {
        // 256·d + L(4d² + 3·d·f + 2d) + d for the 24-layer default.
        let d = 1536;
        assert_eq!(ModelConfig::default().parameters(), 256 * d + 24 * (4 * d * d + 3 * d * 4096 + 2 * d) + d);
    }
}
