//! `bbt generate`.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;

use super::UsageError;
use crate::checkpoint::build_for_inference;
use crate::config::{DeviceSpec, VOCAB_SIZE};
use crate::inference::{Generator, Sampling};
use crate::libtorch::cuda_memory;
use crate::utils::atomic::write_bytes;
use crate::utils::device::device;

/// Continue a prompt, byte by byte
///
/// Examples:
///   bbt generate --ckpt runs/tiny/ckpt.pt --prompt 'fn main() {'
///   bbt generate --ckpt runs/tiny/ckpt.pt --prompt 'The ' --temperature 0
///   head -c 200 notes.txt | bbt generate --ckpt runs/tiny/ckpt.pt --prompt-file - --top-p 0.9
///
/// Prompt and continuation go to stdout as raw bytes, as they come.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Checkpoint, or a run directory: its newest
    #[arg(long, value_name = "CKPT")]
    ckpt: PathBuf,
    #[command(flatten)]
    model: super::ModelArgs,
    /// Bytes to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<OsString>,
    /// File whose bytes to continue; `-` for standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// Number of bytes to add
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Divides the logits; 0: always the most likely byte
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f64,
    /// Choose among the K most likely bytes; 0: among all
    #[arg(long, value_name = "K")]
    top_k: Option<u64>,
    /// Choose among the most likely bytes that make up this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Seed of the choices
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value_t = DeviceSpec::Auto)]
    device: DeviceSpec,
    /// Number of CPU threads to compute with
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object at the end: bytes (prompt and continuation), bytes_per_second
    #[arg(long)]
    json: bool,
    /// Say on stderr what it took: model, times, bytes per second
    #[arg(long)]
    metrics: bool,
    /// Write the same to a file, as one JSON object
    #[arg(long, value_name = "FILE")]
    metrics_json: Option<PathBuf>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    super::set_threads(args.threads);
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(UsageError(format!("--temperature {} is not 0 or more", args.temperature)).into());
    }
    if args.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
        return Err(UsageError("--top-p must be above 0 and at most 1".into()).into());
    }
    let mut bytes = prompt(&args)?;
    if bytes.is_empty() {
        return Err(UsageError("the prompt is empty: give at least one byte to continue".into()).into());
    }
    let device = device(args.device)?;
    let loading = Instant::now();
    let (ckpt, checkpoint) = args.model.open_newest(&args.ckpt)?;
    let model = build_for_inference(&checkpoint, device)?;
    let load_seconds = loading.elapsed().as_secs_f64();
    let sampling = Sampling {
        temperature: args.temperature,
        // As many as there are, or 0 in the original's words: no choice among them.
        top_k: args.top_k.filter(|k| (1..VOCAB_SIZE as u64).contains(k)).map(|k| k as usize),
        top_p: args.top_p,
        seed: args.seed,
    };
    let mut out = super::stdout();
    if !args.json {
        out.write_all(&bytes)?;
        out.flush()?;
    }
    let began = Instant::now();
    let prompt = bytes.clone();
    for byte in Generator::new(&model, device, &prompt, sampling).take(args.max_new_tokens) {
        bytes.push(byte);
        if !args.json {
            out.write_all(&[byte])?;
            out.flush()?;
        }
    }
    if bytes.len() - prompt.len() < args.max_new_tokens {
        anyhow::bail!("{}: the logits are not finite, though all weights are", ckpt.display());
    }
    let seconds = began.elapsed().as_secs_f64();
    let bytes_per_second = args.max_new_tokens as f64 / seconds.max(1e-9);
    if args.json {
        writeln!(out, "{}", serde_json::json!({ "bytes": bytes, "bytes_per_second": bytes_per_second }))?;
    } else {
        writeln!(out)?;
        super::note(&format!("{bytes_per_second:.0} bytes per second"));
    }
    if args.metrics || args.metrics_json.is_some() {
        let parameters = checkpoint.model_config().parameters();
        let new = args.max_new_tokens;
        // The original's names; a token is a byte.
        let mut metrics = serde_json::json!({
            "checkpoint": args.ckpt.display().to_string(),
            "device": format!("{device:?}").to_lowercase(),
            "parameter_count": parameters,
            "model_load_time_s": load_seconds,
            "generation_time_s": seconds,
            "prompt_tokens": prompt.len(),
            "generated_tokens": new,
            "total_tokens": prompt.len() + new,
            "tokens_per_sec": bytes_per_second,
            "ms_per_token": if new == 0 { 0.0 } else { 1000.0 * seconds / new as f64 },
            "temperature": args.temperature,
            "top_k": args.top_k.unwrap_or(0),
        });
        if let tch::Device::Cuda(index) = device {
            metrics["peak_gpu_memory_mb"] = (cuda_memory(index)?.peak as f64 / (1 << 20) as f64).into();
        }
        if args.metrics {
            for (name, value) in metrics.as_object().into_iter().flatten() {
                super::note(&format!("{name}: {value}"));
            }
        }
        if let Some(path) = &args.metrics_json {
            write_bytes(path, format!("{metrics:#}\n").as_bytes()).context("--metrics-json")?;
        }
    }
    Ok(())
}

fn prompt(args: &Args) -> anyhow::Result<Vec<u8>> {
    match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => Ok(text.clone().into_vec()),
        (None, Some(path)) if path.as_os_str() == "-" => {
            let mut bytes = vec![];
            std::io::stdin().read_to_end(&mut bytes).context("--prompt-file -")?;
            Ok(bytes)
        }
        (None, Some(path)) => std::fs::read(path).with_context(|| format!("--prompt-file {}", path.display())),
        (None, None) => Err(UsageError("give --prompt or --prompt-file".into()).into()),
    }
}
