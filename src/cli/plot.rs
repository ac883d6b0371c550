//! `bbt plot`.

use std::path::{Path, PathBuf};

use super::UsageError;
use super::config::ConfigArgs;
use crate::plot::{Run, plot, plot_internals, plot_schedule};
use crate::training::metrics;

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
    /// Run directories or metrics.jsonl files
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
    eprintln!("wrote {}", out.display());
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
