//! `bbt pack`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use super::progress::BytesProgress;
use crate::data::{PackOptions, PackReport, pack};
use crate::launch::SignalListener;

/// Make shards of training data from files and directories
///
/// Examples:
///   bbt pack --out corpus ~/notes
///   bbt pack --out corpus --ext rs,md --val-frac 0.05 src docs
///
/// Writes OUT/train/shard_*.bin, OUT/val/shard_*.bin and OUT/manifest.json, all or nothing. The same
/// files give the same bytes. Documents go whole to one side; hidden files are passed over.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Files and directories
    #[arg(required = true, value_name = "PATH")]
    inputs: Vec<PathBuf>,
    /// Directory to make
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Bytes per shard, about: a number, or one with K, M or G (powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size)]
    shard_size: u64,
    /// Byte between two documents: 0 to 255, `newline`, or `none`
    #[arg(long, value_name = "BYTE", default_value = "0", value_parser = separator)]
    separator: Separator,
    /// Take only files with these extensions: rs,md
    #[arg(long, value_name = "EXT,...", value_delimiter = ',')]
    ext: Vec<String>,
    /// Fraction of the bytes held out for validation, up to 0.5
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0)]
    val_frac: f64,
    /// Replace an earlier output
    #[arg(long)]
    allow_overwrite: bool,
}

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

pub fn run(args: Args) -> anyhow::Result<()> {
    let options = PackOptions {
        inputs: args.inputs,
        out: args.out,
        shard_size: args.shard_size,
        separator: args.separator.0,
        extensions: args.ext,
        val_frac: args.val_frac,
        allow_overwrite: args.allow_overwrite,
    };
    let interrupt = Arc::new(AtomicBool::new(false));
    let flag = interrupt.clone();
    let _listener = SignalListener::start(&SignalListener::ENDING, move |_| flag.store(true, Ordering::SeqCst))
        .context("cannot listen for Ctrl-C")?;
    let mut bar: Option<BytesProgress> = None;
    let report = pack(&options, |done, total| {
        bar.get_or_insert_with(|| BytesProgress::new("packing", total)).update(done);
        if interrupt.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if let Some(bar) = bar {
        bar.finish();
    }
    print(&report?, &options);
    Ok(())
}

fn print(report: &PackReport, options: &PackOptions) {
    for (name, split) in [("train", Some(&report.train)), ("val", report.val.as_ref())] {
        if let Some(split) = split {
            super::note(&format!(
                "{}: {} documents, {} bytes, {} shards",
                options.out.join(name).display(),
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
    fn sizes_have_units() {
        for (text, bytes) in [("7", 7), ("64K", 65536), ("64KB", 65536), ("16m", 16 << 20), ("1G", 1 << 30)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "-1", "1.5M", "99999999999G", "é"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
