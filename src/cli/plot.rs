//! `bbt plot`.

use std::path::{Path, PathBuf};

use crate::plot::{Run, plot};
use crate::training::metrics;

/// Draw the loss curves of one or more runs as a PNG
///
/// Examples:
///   bbt plot runs/tiny --out loss.png
///   bbt plot runs/a runs/b/metrics.jsonl --out compare.png
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Run directories or metrics.jsonl files
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The picture
    #[arg(long, value_name = "FILE.png", default_value = "loss.png")]
    out: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let runs: Vec<Run> = args.runs.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
    plot(&runs, &args.out)?;
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
