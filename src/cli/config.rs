//! `bbt config`: the resolved configuration, and the flags that `train` shares with it.

use std::io::Write;
use std::path::PathBuf;

use clap::builder::TypedValueParser;

use crate::config::{ConfigError, DeviceSpec, Layers};

/// Print the resolved configuration as YAML: defaults, then the file, then flags
///
/// Examples:
///   bbt config                                   every key with its default
///   bbt config --config configs/tiny.yaml --lr 5e-4
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

/// The flags that set keys of the configuration. They override the file, which overrides the defaults.
#[derive(clap::Args, Default)]
pub struct ConfigArgs {
    /// Configuration file
    #[arg(long, value_name = "FILE.yaml")]
    pub config: Option<PathBuf>,
    /// Set any key, the value being YAML: --set optim.betas=[0.9,0.99] (repeatable)
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,

    /// Training bytes: directory of shard_*.bin, glob, or one file [data.train]
    #[arg(long, value_name = "PATH", help_heading = "Data", value_parser = Utf8)]
    pub data: Option<String>,
    /// Held-out bytes, likewise [data.val]
    #[arg(long, value_name = "PATH", help_heading = "Data", value_parser = Utf8)]
    pub val_data: Option<String>,
    /// Bytes predicted per window, fixed [data.seq_len]
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub seq_len: Option<i64>,
    /// Upper bound on the sequence length [data.seq_len, data.curriculum]
    #[arg(long, value_name = "N", help_heading = "Data")]
    pub seq_len_cap: Option<i64>,

    /// Number of blocks [model.n_layer]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub n_layer: Option<i64>,
    /// Width of the residual stream [model.d_model]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub d_model: Option<i64>,
    /// Number of heads [model.n_head]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub n_head: Option<i64>,
    /// Number of key/value heads [model.n_kv_head]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub n_kv_head: Option<i64>,
    /// Width of the SwiGLU hidden layer [model.d_ff]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub d_ff: Option<i64>,
    /// Attention by libtorch's scaled_dot_product_attention [model.attention: sdpa]
    #[arg(long, overrides_with = "no_sdpa", help_heading = "Model")]
    pub use_sdpa: bool,
    /// Attention by explicit softmax [model.attention: math]
    #[arg(long, overrides_with = "use_sdpa", help_heading = "Model")]
    pub no_sdpa: bool,
    /// Activations in full precision [quant.act: none]
    #[arg(long, help_heading = "Model")]
    pub no_act_quant: bool,

    /// Moments in fp32, not 8 bits: what is the default [optim.name: adamw]
    #[arg(long, help_heading = "Optimizer")]
    pub no_bnb: bool,
    /// Peak learning rate [optim.lr]
    #[arg(long, value_name = "LR", help_heading = "Optimizer")]
    pub lr: Option<f64>,
    /// Weight decay [optim.weight_decay]
    #[arg(long, value_name = "WD", help_heading = "Optimizer")]
    pub wd: Option<f64>,
    /// Largest gradient norm; 0: no clipping [optim.grad_clip]
    #[arg(long, value_name = "NORM", help_heading = "Optimizer")]
    pub grad_clip: Option<f64>,
    /// Fraction of the run spent in warmup [optim.warmup_frac]
    #[arg(long, value_name = "FRACTION", help_heading = "Optimizer")]
    pub warmup_frac: Option<f64>,
    /// Warmup in steps, instead of --warmup-frac [optim.warmup_steps]
    #[arg(long, value_name = "N", help_heading = "Optimizer")]
    pub warmup_steps: Option<u64>,
    /// cosine, constant, wsd or two_stage [optim.schedule]
    #[arg(long, value_name = "SHAPE", help_heading = "Optimizer")]
    pub lr_schedule: Option<String>,
    /// The learning rate ends at this fraction of --lr [optim.min_lr_factor]
    #[arg(long, value_name = "FACTOR", help_heading = "Optimizer")]
    pub lr_min_factor: Option<f64>,

    /// Optimizer steps [train.steps]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub steps: Option<u64>,
    /// Windows per micro-batch [train.batch_size]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub batch_size: Option<i64>,
    /// Micro-batches per step [train.grad_accum]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub grad_accum: Option<i64>,
    /// Keep activations instead of recomputing them [train.checkpointing: false]
    #[arg(long, help_heading = "Run")]
    pub no_ckpt: bool,
    /// Everything in fp32 [train.precision: fp32]
    #[arg(long, help_heading = "Run")]
    pub no_amp: bool,
    /// Evaluate every N steps on --val-data; 0: never [train.eval_every]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub val_every: Option<u64>,
    /// Evaluate on about N micro-batches of --batch-size windows, all ranks together [train.eval_bytes]
    #[arg(long, value_name = "N", help_heading = "Run", value_parser = clap::value_parser!(u64).range(1..))]
    pub val_batches: Option<u64>,
    /// Sequence length of evaluations; else the longest of training [train.eval_seq_len]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub val_seq_len: Option<i64>,
    /// Log the loss of whitespace and of all other bytes apart, too [train.log_byte_class_loss]
    #[arg(long, help_heading = "Run")]
    pub log_byte_class_loss: bool,
    /// auto, cpu, cuda or cuda:N [train.device]
    #[arg(long, value_name = "DEVICE", help_heading = "Run")]
    pub device: Option<DeviceSpec>,
    /// Seed of the initial weights and of the data's order [train.seed, data.seed]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub seed: Option<u64>,
    /// Log every N steps [train.log_every]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub log_every: Option<u64>,
    /// Save every N steps [train.save_every]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub save_every: Option<u64>,
    /// Run directory, or a .pt file in it [train.out]
    #[arg(long, value_name = "PATH", help_heading = "Run", value_parser = Utf8)]
    pub out: Option<String>,
}

/// Takes a path as text. config.yaml and the checkpoint hold it, and both are UTF-8: what is not is refused by name.
#[derive(Clone)]
pub struct Utf8;

impl TypedValueParser for Utf8 {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        value.to_str().map(String::from).ok_or_else(|| {
            let flag = arg.and_then(clap::Arg::get_long).map(|name| format!("--{name} ")).unwrap_or_default();
            let message = format!(
                "{flag}{value:?}: this name is not UTF-8, in which the configuration and checkpoints are written: rename \
                 it, or make a link of another name to it\n"
            );
            clap::Error::raw(clap::error::ErrorKind::InvalidUtf8, message).with_cmd(command)
        })
    }
}

impl ConfigArgs {
    /// What the file and the flags give.
    ///
    /// # Errors
    /// Naming the file's key or the flag.
    pub fn layers(&self) -> Result<Layers, ConfigError> {
        let mut layers = Layers::default();
        if let Some(path) = &self.config {
            layers.add_file(path)?;
        }
        for assignment in &self.set {
            layers.set_text(assignment)?;
        }
        macro_rules! set {
            ($($flag:literal $key:literal $value:expr;)*) => {
                $(if let Some(value) = $value { layers.set($flag, $key, value)?; })*
            };
        }
        set! {
            "--data" "data.train" self.data.clone();
            "--seq-len" "data.seq_len" self.seq_len;
            "--n-layer" "model.n_layer" self.n_layer;
            "--d-model" "model.d_model" self.d_model;
            "--n-head" "model.n_head" self.n_head;
            "--n-kv-head" "model.n_kv_head" self.n_kv_head;
            "--d-ff" "model.d_ff" self.d_ff;
            "--val-data" "data.val" self.val_data.clone();
            "--no-sdpa" "model.attention" self.no_sdpa.then_some("math");
            "--no-bnb" "optim.name" self.no_bnb.then_some("adamw");
            "--no-amp" "train.precision" self.no_amp.then_some("fp32");
            "--val-every" "train.eval_every" self.val_every;
            "--val-seq-len" "train.eval_seq_len" self.val_seq_len;
            "--log-byte-class-loss" "train.log_byte_class_loss" self.log_byte_class_loss.then_some(true);
            "--use-sdpa" "model.attention" self.use_sdpa.then_some("sdpa");
            "--no-act-quant" "quant.act" self.no_act_quant.then_some("none");
            "--lr" "optim.lr" self.lr;
            "--wd" "optim.weight_decay" self.wd;
            "--grad-clip" "optim.grad_clip" self.grad_clip;
            "--warmup-frac" "optim.warmup_frac" self.warmup_frac;
            "--warmup-steps" "optim.warmup_steps" self.warmup_steps;
            "--lr-schedule" "optim.schedule" self.lr_schedule.clone();
            "--lr-min-factor" "optim.min_lr_factor" self.lr_min_factor;
            "--steps" "train.steps" self.steps;
            "--batch-size" "train.batch_size" self.batch_size;
            "--grad-accum" "train.grad_accum" self.grad_accum;
            "--no-ckpt" "train.checkpointing" self.no_ckpt.then_some(false);
            "--device" "train.device" self.device.map(|d| d.to_string());
            "--seed" "train.seed" self.seed;
            "--seed" "data.seed" self.seed;
            "--log-every" "train.log_every" self.log_every;
            "--save-every" "train.save_every" self.save_every;
            "--out" "train.out" self.out.clone();
        }
        if let Some(cap) = self.seq_len_cap {
            layers.cap_seq_len("--seq-len-cap", cap)?;
        }
        if let Some(batches) = self.val_batches {
            let given = layers.given()?;
            let length = given.train.eval_seq_len.unwrap_or(given.data.max_seq_len());
            let bytes = batches.saturating_mul(given.train.batch_size.saturating_mul(length).max(1) as u64);
            layers.set("--val-batches", "train.eval_bytes", bytes.min(i64::MAX as u64))?;
        }
        if self.val_every.is_some_and(|steps| steps > 0) && layers.given()?.data.val.is_none() {
            return Err(ConfigError::Flag {
                flag: "--val-every".into(),
                message: "there is nothing to evaluate on: give --val-data, or data.val in the configuration".into(),
            });
        }
        Ok(layers)
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let config = args.config.layers()?.resolve(None)?;
    Ok(super::stdout().write_all(config.to_yaml().as_bytes())?)
}
