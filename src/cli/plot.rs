//! `bbt plot`.

use std::path::{Path, PathBuf};

use super::UsageError;
use crate::plot::{Run, plot, plot_internals};
use crate::training::metrics;

/// Draw the loss curves of one or more runs as a PNG, or what the layers of one are like inside
///
/// Examples:
///   bbt plot runs/tiny --out loss.png
///   bbt plot runs/a runs/b/metrics.jsonl --out compare.png
///   bbt plot runs/tiny --internals --out inside.png
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Run directories or metrics.jsonl files
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Draw the layers of one run: weights at zero, weights changed, gamma, gradient norms, inputs
    #[arg(long)]
    internals: bool,
    /// The picture
    #[arg(
        long,
        value_name = "FILE.png",
        default_value = "loss.png",
        default_value_if("internals", "true", "internals.png")
    )]
    out: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let runs: Vec<Run> = args.runs.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
    match &runs[..] {
        _ if !args.internals => plot(&runs, &args.out)?,
        [run] => plot_internals(run, &args.out)?,
        _ => return Err(UsageError("--internals draws the layers of one run: name that alone".into()).into()),
    }
    eprintln!("wrote {}", args.out.display());
    Ok(())
}

fn read(path: &Path) -> Result<Run, metrics::MetricsError> {
    let (dir, file) = match path.is_dir() {
        true => (path, path.join("metrics.jsonl")),
        false => (path.parent().unwrap_or(path), path.to_path_buf()),
    };
    let name = std::path::absolute(dir).ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    Ok(Run { name: name.unwrap_or_else(|| path.display().to_string()), rows: metrics::read(&file)? })
}
