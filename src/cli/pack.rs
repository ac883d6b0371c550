//! `bbt pack`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::ArgAction;

use super::progress::BytesProgress;
use crate::data::{PackOptions, PackReport, pack};
use crate::launch::SignalListener;

/// Make shards of training data from files and directories
///
/// Examples:
///   bbt pack --out corpus ~/notes
///   bbt pack --out corpus --ext rs,md --val-frac 0.05 src docs
///   zcat dump.gz | bbt pack --out corpus -
///   bbt pack --inputs notes --out_dir shards --exts txt md       the original's command line
///
/// Writes OUT/train/shard_*.bin, OUT/val/shard_*.bin and OUT/manifest.json, all or nothing. The same
/// files give the same bytes. Documents go whole to one side; hidden files are passed over.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Files and directories; `-` (standard input) and <(command) are read to their end
    #[arg(required_unless_present = "more_inputs", value_name = "PATH")]
    inputs: Vec<PathBuf>,
    /// Directory to make, or an empty one to fill
    #[arg(long, value_name = "DIR", required_unless_present = "out_dir")]
    out: Option<PathBuf>,
    /// Bytes per shard, about: a number, or one with K, M or G (powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size)]
    shard_size: u64,
    /// Byte between two documents: 0 to 255, `newline`, or `none`
    #[arg(long, value_name = "BYTE", default_value = "0", value_parser = separator)]
    separator: Separator,
    /// Take only files with these extensions: rs,md
    #[arg(long, value_name = "EXT,...", value_delimiter = ',', action = ArgAction::Set)]
    ext: Vec<String>,
    /// Fraction of the bytes held out for validation, up to 0.5
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0)]
    val_frac: f64,
    /// Replace an earlier output
    #[arg(long)]
    allow_overwrite: bool,

    /// Files and directories, as PATH
    #[arg(long = "inputs", value_name = "PATH", num_args = 1.., action = ArgAction::Set, help_heading = ORIGINAL)]
    more_inputs: Vec<PathBuf>,
    /// As --out, but the shards lie in DIR itself, and nothing is held out
    #[arg(long, value_name = "DIR", conflicts_with = "out", help_heading = ORIGINAL)]
    out_dir: Option<PathBuf>,
    /// As --shard-size, in GiB
    #[arg(long, value_name = "GB", value_parser = gibibytes, conflicts_with = "shard_size", help_heading = ORIGINAL)]
    shard_size_gb: Option<u64>,
    /// As --separator: 0 to 255; -1: none
    #[arg(long, value_name = "BYTE", allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(..=255),
        conflicts_with = "separator", help_heading = ORIGINAL)]
    sep_byte: Option<i64>,
    /// As --ext, with blanks between: txt md
    #[arg(long, value_name = "EXT", num_args = 0.., action = ArgAction::Set, conflicts_with = "ext", help_heading = ORIGINAL)]
    exts: Vec<String>,
    /// Size of the original's read buffer, on which nothing depends here
    #[arg(long, value_name = "MB", hide = true)]
    buf_mb: Option<u64>,
}

/// Above the flags of the PyTorch original's scripts that have other names here.
const ORIGINAL: &str = "The PyTorch original's flags";

#[derive(Clone, Copy)]
struct Separator(Option<u8>);

fn separator(text: &str) -> Result<Separator, String> {
    match text {
        "none" => Ok(Separator(None)),
        "newline" => Ok(Separator(Some(b'\n'))),
        number => match number.parse() {
            Ok(byte) => Ok(Separator(Some(byte))),
            Err(_) => Err("expected 0 to 255, `newline` or `none`".into()),
        },
    }
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.trim_end_matches(['B', 'b']).char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1u64 << 10),
        Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    number.ok_or_else(|| "expected a number of bytes such as 65536, 64K, 16M or 1G".into())
}

fn gibibytes(text: &str) -> Result<u64, String> {
    let number = text.parse::<f64>().ok().filter(|number| *number > 0.0 && number.is_finite());
    number.map(|number| (number * (1u64 << 30) as f64) as u64).ok_or_else(|| "expected a number above 0".into())
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let flat = args.out_dir.is_some();
    let options = PackOptions {
        inputs: [args.inputs, args.more_inputs].concat(),
        // clap sees that one of them is there.
        out: args.out_dir.or(args.out).unwrap_or_default(),
        flat,
        shard_size: args.shard_size_gb.unwrap_or(args.shard_size),
        separator: args.sep_byte.map_or(args.separator.0, |byte| u8::try_from(byte).ok()),
        extensions: [args.ext, args.exts].concat(),
        val_frac: args.val_frac,
        allow_overwrite: args.allow_overwrite,
    };
    let interrupt = Arc::new(AtomicBool::new(false));
    let flag = interrupt.clone();
    let _listener = SignalListener::start(&SignalListener::ENDING, move |_| flag.store(true, Ordering::SeqCst))
        .context("cannot listen for Ctrl-C")?;
    let mut bar: Option<BytesProgress> = None;
    let report = pack(&options, |done, total| {
        // A stream that is being read has no total yet.
        if total > 0 {
            bar.get_or_insert_with(|| BytesProgress::new("packing", total)).update(done);
        }
        if interrupt.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if let Some(bar) = bar {
        bar.finish();
    }
    print(&report?, &options);
    Ok(())
}

/// So many warnings are shown.
const WARNINGS: usize = 10;

fn print(report: &PackReport, options: &PackOptions) {
    for warning in report.warnings.iter().take(WARNINGS) {
        super::note(&format!("warning: {warning}"));
    }
    if report.warnings.len() > WARNINGS {
        super::note(&format!("warning: and {} more of the kind", report.warnings.len() - WARNINGS));
    }
    for (name, split) in [("train", Some(&report.train)), ("val", report.val.as_ref())] {
        if let Some(split) = split {
            super::note(&format!(
                "{}: {} documents, {} bytes, {} shards",
                if options.flat { options.out.clone() } else { options.out.join(name) }.display(),
                split.documents,
                split.bytes,
                split.shards
            ));
        }
    }
    if let Some(document) = &report.divided {
        super::note(&format!("the end of {document} was held out: no document was small enough to be held out whole"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gigabytes_are_the_originals() {
        // int(shard_size_gb * 1024**3)
        for (text, bytes) in [("2.0", 2 << 30), ("0.5", 1 << 29), ("1e-6", 1073), ("3", 3 << 30)] {
            assert_eq!(gibibytes(text), Ok(bytes), "{text}");
        }
        for text in ["0", "-1", "x", "", "inf", "NaN"] {
            assert!(gibibytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("7", 7), ("64K", 65536), ("64KB", 65536), ("16m", 16 << 20), ("1G", 1 << 30)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "-1", "1.5M", "99999999999G", "é"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
