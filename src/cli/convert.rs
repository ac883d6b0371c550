//! `bbt convert`.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::checkpoint::{WeightDtype, convert};
use crate::config::OptimizerName;

/// Convert a checkpoint between PyTorch's .pt and .safetensors, or to another dtype or optimizer
///
/// Examples:
///   bbt convert runs/tiny/ckpt.pt model.safetensors
///   bbt convert runs/tiny/ckpt.pt half.safetensors --dtype bf16
///   bbt convert model.safetensors model.pt
///   bbt convert runs/tiny/ckpt.pt runs/small/ckpt.pt --optim adamw8bit
///
/// .safetensors holds the weights and, as metadata, the model's configuration; so does a .pt made
/// from it: start from it with --init. A .pt made from a .pt keeps everything. Weights alone (a state_dict,
/// or .safetensors by others) become a checkpoint that says its model's shape.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Checkpoint to read
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// File to write, .pt or .safetensors
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Change the weights' dtype
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Make the optimizer's moments those of another [optim.name]: rounded to 8 bits, or fp32
    #[arg(long, value_enum)]
    optim: Option<Optim>,
    #[command(flatten)]
    model: super::ModelArgs,
    /// Replace OUT where it exists
    #[arg(long)]
    allow_overwrite: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    Fp32,
    Bf16,
    Fp16,
}

#[derive(Clone, Copy, ValueEnum)]
enum Optim {
    Adamw,
    Adamw8bit,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    if args.output.exists() && !args.allow_overwrite {
        anyhow::bail!("{} exists: give --allow-overwrite, or another name", args.output.display());
    }
    let dtype = args.dtype.map(|dtype| match dtype {
        Dtype::Fp32 => WeightDtype::Fp32,
        Dtype::Bf16 => WeightDtype::Bf16,
        Dtype::Fp16 => WeightDtype::Fp16,
    });
    let optim = args.optim.map(|optim| match optim {
        Optim::Adamw => OptimizerName::AdamW,
        Optim::Adamw8bit => OptimizerName::AdamW8bit,
    });
    let checkpoint = args.model.open(&args.input)?;
    for name in convert(&checkpoint, &args.output, dtype, optim)? {
        eprintln!("left out {name}: bbt cannot write it");
    }
    eprintln!("wrote {}", args.output.display());
    Ok(())
}
