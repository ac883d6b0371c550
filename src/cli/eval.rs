//! `bbt eval`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;

use crate::checkpoint::build_for_inference;
use crate::config::{DeviceSpec, Precision};
use crate::data;
use crate::training::evaluation::{EvalOptions, evaluate, sample};
use crate::utils::device::device;

/// Held-out loss of a checkpoint: every byte after a shard's first, predicted once
///
/// Examples:
///   bbt eval --ckpt runs/tiny/ckpt.pt --data corpus/val --seq-len 512
///   bbt eval --ckpt runs/tiny/ckpt.pt --data book.txt --seq-len 512 --stride 128 --json
///
/// Bytes are predicted in chunks of --seq-len (the last shorter), each starting without context. With
/// --stride S the windows overlap: only the first sees less than seq_len - S bytes of context.
/// Shard boundaries are document boundaries.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Checkpoint, or a run directory: its newest
    #[arg(long, value_name = "CKPT")]
    ckpt: PathBuf,
    #[command(flatten)]
    model: super::ModelArgs,
    /// Directory of shard_*.bin, glob, or one file
    #[arg(long, value_name = "PATH")]
    data: String,
    /// Most bytes that a prediction sees
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    seq_len: u64,
    /// Distance of windows, up to --seq-len (default: --seq-len, no overlap)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    stride: Option<u64>,
    /// Only about so many bytes of the data, in pieces spread evenly over it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..))]
    max_bytes: Option<u64>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t = DeviceSpec::Auto)]
    device: DeviceSpec,
    /// Precision of the matrix products
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    precision: Precision,
    /// Number of CPU threads to compute with
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object: loss (nats per byte), bits_per_byte, bytes, seq_len, stride
    #[arg(long)]
    json: bool,
}

impl ValueEnum for Precision {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Fp32, Self::Bf16, Self::Fp16]
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
        }))
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    super::set_threads(args.threads);
    let stride = args.stride.unwrap_or(args.seq_len);
    if stride > args.seq_len {
        let message = format!("--stride {stride} is more than --seq-len {}: bytes would be left out", args.seq_len);
        return Err(super::UsageError(message).into());
    }
    let device = device(args.device)?;
    let set = data::open(&args.data).context("--data")?;
    let (ckpt, checkpoint) = args.model.open_newest(&args.ckpt)?;
    let model = build_for_inference(&checkpoint, device)?;
    let documents = sample(set.as_ref(), args.max_bytes);
    let total: u64 = documents.iter().map(|d| d.len() as u64 - 1).sum();
    if total == 0 {
        anyhow::bail!("--data {}: nothing to predict, every shard has a single byte", args.data);
    }
    let options = EvalOptions { seq_len: args.seq_len as usize, stride: stride as usize, precision: args.precision };
    let mut bar = super::progress::BytesProgress::new("evaluating", total);
    let found = evaluate(&model, &documents, options, device, |bytes| bar.update(bytes))?;
    bar.finish();
    if !found.loss.is_finite() {
        anyhow::bail!(
            "{}: the loss is {}, though all weights are finite: they overflow in --precision {}",
            ckpt.display(),
            found.loss,
            format!("{:?}", args.precision).to_lowercase()
        );
    }
    let mut out = super::stdout();
    if args.json {
        let object = serde_json::json!({
            "loss": found.loss,
            "bits_per_byte": found.bits_per_byte(),
            "bytes": found.bytes,
            "seq_len": args.seq_len,
            "stride": stride,
        });
        writeln!(out, "{object}")?;
    } else {
        let (bits, loss, bytes) = (found.bits_per_byte(), found.loss, found.bytes);
        writeln!(out, "{bits:.4} bits per byte ({loss:.4} nats) over {bytes} bytes")?;
    }
    Ok(())
}
