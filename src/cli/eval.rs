//! `bbt eval`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ValueEnum;

use crate::checkpoint::build_for_inference;
use crate::config::{DeviceSpec, Precision};
use crate::data::{self, stream};
use crate::training::evaluation::{EvalOptions, Evaluation, evaluate_part, sample};
use crate::utils::device::device;

/// Held-out loss of a checkpoint: every byte after a shard's first, predicted once
///
/// Examples:
///   bbt eval --ckpt runs/tiny/ckpt.pt --data corpus/val --seq-len 512
///   bbt eval --ckpt runs/tiny/ckpt.pt --data book.txt --seq-len 512 --stride 128 --json
///   bbt eval --ckpt runs/tiny/ckpt.pt --data corpus/val --seq-len 512 --bootstrap 1000
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
    /// Directory of shard_*.bin, glob, or one file; `-`: standard input
    #[arg(long, value_name = "PATH", value_parser = super::config::Utf8)]
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
    /// The same as a number of windows
    #[arg(long, value_name = "N", conflicts_with = "max_bytes", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    batches: Option<u64>,
    /// Tell a 95 % interval, too, from the windows drawn anew N times
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    bootstrap: Option<u64>,
    /// Seed of --bootstrap; nothing else is random
    #[arg(long, value_name = "N", default_value_t = 1234)]
    seed: u64,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t = DeviceSpec::Auto)]
    device: DeviceSpec,
    /// Precision of the matrix products
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    precision: Precision,
    /// Number of CPU threads to compute with
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object: loss (nats per byte), bits_per_byte, perplexity (per byte), bytes, seq_len, stride; with
    /// --bootstrap N also bootstrap: {resamples, seed, loss: [low, high], bits_per_byte: …, perplexity: …}
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

/// What a stream has to say, as a file that is deleted when dropped; none where `data` is no stream.
fn streamed(data: &str) -> anyhow::Result<Option<tempfile::NamedTempFile>> {
    let from = Path::new(data);
    if !stream::is_stream(from) {
        return Ok(None);
    }
    let mut file = tempfile::NamedTempFile::new().context("--data: cannot make a temporary file (TMPDIR)")?;
    let path = file.path().to_path_buf();
    let bytes = stream::copy(from, file.as_file_mut(), &path, || Ok(())).context("--data")?;
    anyhow::ensure!(bytes > 0, "--data {data}: nothing came from it");
    Ok(Some(file))
}

pub fn run(args: Args) -> anyhow::Result<()> {
    super::set_threads(args.threads);
    let stride = args.stride.unwrap_or(args.seq_len);
    if stride > args.seq_len {
        let message = format!("--stride {stride} is more than --seq-len {}: bytes would be left out", args.seq_len);
        return Err(super::UsageError(message).into());
    }
    let device = device(args.device)?;
    let streamed = streamed(&args.data)?;
    let data = streamed.as_ref().map_or(args.data.as_str(), |file| file.path().to_str().unwrap_or_default());
    let set = data::open(data).context("--data")?;
    let (ckpt, checkpoint) = args.model.open_newest(&args.ckpt)?;
    let model = build_for_inference(&checkpoint, device)?;
    let windows = args.batches.map(|windows| windows.saturating_mul(args.seq_len).max(2));
    let documents = sample(set.as_ref(), args.max_bytes.or(windows));
    let total: u64 = documents.iter().map(|d| d.len() as u64 - 1).sum();
    if total == 0 {
        anyhow::bail!("--data {}: nothing to predict, every shard has a single byte", args.data);
    }
    let options = EvalOptions { seq_len: args.seq_len as usize, stride: stride as usize, precision: args.precision };
    let mut bar = super::progress::BytesProgress::new("evaluating", total);
    let of_windows = evaluate_part(&model, &documents, options, device, (0, 1), |bytes| bar.update(bytes))?;
    bar.finish();
    let found = of_windows.total();
    if !found.loss.is_finite() {
        anyhow::bail!(
            "{}: the loss is {}, though all weights are finite: they overflow in --precision {}",
            ckpt.display(),
            found.loss,
            format!("{:?}", args.precision).to_lowercase()
        );
    }
    let interval = args.bootstrap.map(|resamples| of_windows.bootstrap(resamples as usize, args.seed));
    let ends = |(low, high): (f64, f64)| [low, high].map(|loss| Evaluation { loss, ..found });
    let mut out = super::stdout();
    if args.json {
        let mut object = serde_json::json!({
            "loss": found.loss,
            "bits_per_byte": found.bits_per_byte(),
            "perplexity": found.perplexity(),
            "bytes": found.bytes,
            "seq_len": args.seq_len,
            "stride": stride,
        });
        if let Some(ends) = interval.map(ends) {
            object["bootstrap"] = serde_json::json!({
                "resamples": args.bootstrap,
                "seed": args.seed,
                "loss": ends.map(|end| end.loss),
                "bits_per_byte": ends.map(|end| end.bits_per_byte()),
                "perplexity": ends.map(|end| end.perplexity()),
            });
        }
        writeln!(out, "{object}")?;
    } else {
        let (bits, loss, bytes) = (found.bits_per_byte(), found.loss, found.bytes);
        let perplexity = found.perplexity();
        writeln!(out, "{bits:.4} bits per byte ({loss:.4} nats, perplexity {perplexity:.4}) over {bytes} bytes")?;
        if let Some(ends) = interval.map(ends) {
            let [bits_low, bits_high] = ends.map(|end| end.bits_per_byte());
            let [low, high] = ends.map(|end| end.perplexity());
            writeln!(
                out,
                "95 % interval: {bits_low:.4} to {bits_high:.4} bits per byte, perplexity {low:.4} to {high:.4} \
                 ({} windows drawn {} times, seed {})",
                of_windows.sums.len(),
                args.bootstrap.unwrap_or_default(),
                args.seed
            )?;
        }
    }
    Ok(())
}
