//! `bbt plot`.

use std::path::{Path, PathBuf};

use super::UsageError;
use super::config::ConfigArgs;
use crate::plot::{Run, plot, plot_internals, plot_schedule};
use crate::training::{RunDir, metrics};
use crate::utils::atomic::parent;

/// Draw the loss curves of one or more runs as a PNG, what the layers of one are like inside, or what a configuration
/// plans for one
///
/// Examples:
///   bbt plot runs/tiny --out loss.png
///   bbt plot runs/a runs/b/metrics.jsonl --out compare.png
///   bbt plot runs/tiny --internals --out inside.png
///   bbt plot --schedule configs/base.yaml --set optim.schedule=wsd --out schedule.png
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Runs as --out named them, directories or .pt files, or their metrics.jsonl
    #[arg(required_unless_present = "schedule", value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Draw one run from inside: its layers (weights at each value and changed, gamma, gradient norms, inputs), steps
    /// skipped, loss scale, utilisation, memory
    #[arg(long, conflicts_with = "schedule")]
    internals: bool,
    /// The picture [default: loss.png, internals.png or schedule.png]
    #[arg(long, value_name = "FILE.png")]
    out: Option<PathBuf>,
    /// Draw learning rate, weight decay and sequence length of a configuration over its steps instead
    #[arg(long, value_name = "FILE.yaml", conflicts_with = "runs")]
    schedule: Option<PathBuf>,
    /// With --schedule: set any key, as in `bbt config` (repeatable)
    #[arg(long, value_name = "SECTION.KEY=VALUE", requires = "schedule", conflicts_with = "runs")]
    set: Vec<String>,
    /// With --schedule: optimizer steps [train.steps]
    #[arg(long, value_name = "N", requires = "schedule", conflicts_with = "runs")]
    steps: Option<u64>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let out = |name: &str| args.out.clone().unwrap_or_else(|| name.into());
    let out = match args.schedule {
        None => {
            let runs: Vec<Run> = args.runs.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
            let out = out(if args.internals { "internals.png" } else { "loss.png" });
            match &runs[..] {
                runs if !args.internals => plot(runs, &out)?,
                [run] => plot_internals(run, &out)?,
                _ => return Err(UsageError("--internals draws the layers of one run: name that alone".into()).into()),
            }
            out
        }
        Some(path) => {
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
            let given = ConfigArgs { config: Some(path), set: args.set, steps: args.steps, ..ConfigArgs::default() };
            let out = out("schedule.png");
            plot_schedule(&given.layers()?.resolve(None)?, &name, &out)?;
            out
        }
    };
    super::note(&format!("wrote {}", out.display()));
    Ok(())
}

fn read(path: &Path) -> Result<Run, metrics::MetricsError> {
    let is_log = !path.is_dir() && path.extension().is_none_or(|extension| extension != "pt");
    let file = if is_log { path.to_path_buf() } else { RunDir::new(path).metrics() };
    // `a` for a.metrics.jsonl, else the directory's name.
    let stem = file.file_name().and_then(|name| name.to_str()?.strip_suffix(".metrics.jsonl").map(str::to_string));
    let dir = || Some(std::path::absolute(parent(&file)).ok()?.file_name()?.to_string_lossy().into_owned());
    let name = stem.or_else(dir).unwrap_or_else(|| path.display().to_string());
    Ok(Run { name, rows: metrics::read(&file)? })
}
