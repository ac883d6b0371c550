//! `bbt inspect`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::checkpoint::{
    CheckpointError, Format, TensorData, TrainingCheckpoint, Value, WeightsShape, safetensors_file, torch_file,
};
use crate::data::{self, MANIFEST, PackReport};
use crate::training::RunDir;

/// Say what is in a checkpoint or a set of shards, as a table
///
/// Examples:
///   bbt inspect runs/tiny/ckpt.pt
///   bbt inspect model.safetensors
///   bbt inspect corpus/train
///
/// Any file of torch.save is shown, as long as it holds plain containers and tensors.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Checkpoint, run directory, or shards: a directory, glob or file
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let (path, out) = (&args.path, &mut super::stdout());
    if path.is_dir() {
        return match RunDir::new(path).newest() {
            Some(newest) => checkpoint(out, &newest),
            None => shards(out, path),
        };
    }
    // What it is its content says; only where that is neither, a name may promise a checkpoint.
    let named = path.extension().and_then(|e| e.to_str());
    let named = named.is_some_and(|e| ["pt", "pth", "ckpt", "safetensors"].contains(&e));
    match path.exists().then(|| Format::of(path)).transpose()?.flatten() {
        Some(Format::Safetensors) => safetensors(out, path),
        Some(Format::Torch) => checkpoint(out, path),
        None if named => checkpoint(out, path),
        None => shards(out, path),
    }
}

fn checkpoint(out: &mut impl Write, path: &Path) -> anyhow::Result<()> {
    let value = torch_file::read(path)?;
    writeln!(out, "{}", path.display())?;
    match TrainingCheckpoint::open(path) {
        Ok(checkpoint) => {
            let (model, progress) = (checkpoint.model_config(), checkpoint.progress());
            writeln!(
                out,
                "BitByteLM: {} parameters, {} layers × {}, {} heads ({} key/value), d_ff {}",
                model.parameters(),
                model.n_layer,
                model.d_model,
                model.n_head,
                model.kv_heads(),
                model.d_ff
            )?;
            writeln!(out, "after {} steps, {} bytes seen", progress.completed, progress.bytes_seen)?;
        }
        Err(CheckpointError::Heads { shape, .. }) => weights_alone(out, &shape)?,
        Err(error) => writeln!(out, "no checkpoint that bbt trains: {error}")?,
    }
    writeln!(out)?;
    let mut rows = vec![];
    flatten("", &value, &mut rows);
    table(out, &rows)?;
    Ok(())
}

fn weights_alone(out: &mut impl Write, shape: &WeightsShape) -> std::io::Result<()> {
    let WeightsShape { n_layer, d_model, kv_width, d_ff } = shape;
    writeln!(out, "weights of a BitByteLM: {n_layer} layers × {d_model}, keys {kv_width} wide, d_ff {d_ff}")?;
    writeln!(out, "the number of heads is not in them: commands take it with --n-head")
}

fn safetensors(out: &mut impl Write, path: &Path) -> anyhow::Result<()> {
    let (tensors, metadata) = safetensors_file::read(path)?;
    writeln!(out, "{}", path.display())?;
    if let Err(CheckpointError::Heads { shape, .. }) = TrainingCheckpoint::open(path) {
        weights_alone(out, &shape)?;
    }
    writeln!(out)?;
    let mut rows: Vec<[String; 3]> = tensors.iter().map(|(name, tensor)| tensor_row(name, tensor)).collect();
    let mut metadata: Vec<_> = metadata.into_iter().collect();
    metadata.sort();
    rows.extend(metadata.into_iter().map(|(key, value)| [format!("metadata.{key}"), "str".into(), short(&value)]));
    table(out, &rows)?;
    Ok(())
}

fn shards(out: &mut impl Write, path: &Path) -> anyhow::Result<()> {
    if let Some(report) = manifest(path)? {
        writeln!(out, "{}\n", path.display())?;
        let mut rows = vec![["split".to_string(), "shards".into(), "bytes".into()]];
        for (name, split) in [("train", Some(report.train)), ("val", report.val)] {
            if let Some(split) = split {
                rows.push([name.into(), split.shards.to_string(), split.bytes.to_string()]);
            }
        }
        table(out, &rows)?;
        return Ok(());
    }
    let set = data::open(&path.to_string_lossy())?;
    writeln!(out, "{}: {} shards, {} bytes\n", path.display(), set.shards().len(), set.total_bytes())?;
    let rows = set.shards().iter().map(|shard| {
        let name = shard.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        [name, "bytes".into(), shard.bytes().len().to_string()]
    });
    table(out, &rows.collect::<Vec<_>>())?;
    Ok(())
}

/// What `bbt pack` wrote of a directory.
fn manifest(path: &Path) -> anyhow::Result<Option<PackReport>> {
    let path = path.join(MANIFEST);
    match std::fs::read(&path) {
        Ok(text) => {
            Ok(Some(serde_json::from_slice(&text).with_context(|| format!("{}: not bbt pack's", path.display()))?))
        }
        Err(_) => Ok(None),
    }
}

/// A row for each leaf of `value`: its path, type and content.
fn flatten(path: &str, value: &Value, rows: &mut Vec<[String; 3]>) {
    let below = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match value {
        Value::Dict(items) | Value::OrderedDict { items, .. } if !items.is_empty() => {
            for (key, value) in items {
                let key = match key {
                    Value::Str(key) => key.clone(),
                    Value::Int(key) => key.to_string(),
                    other => format!("{other:?}"),
                };
                flatten(&below(&key), value, rows);
            }
        }
        Value::List(elements) if elements.iter().any(|e| !e.entries().is_empty()) => {
            for (index, element) in elements.iter().enumerate() {
                flatten(&below(&index.to_string()), element, rows);
            }
        }
        Value::Tensor(tensor) => rows.push(tensor_row(path, tensor)),
        plain => {
            let (kind, text) = plain_row(plain);
            rows.push([path.into(), kind.into(), text]);
        }
    }
}

fn plain_row(value: &Value) -> (&'static str, String) {
    let list = |elements: &[Value]| short(&elements.iter().map(|e| plain_row(e).1).collect::<Vec<_>>().join(", "));
    match value {
        Value::None => ("None", String::new()),
        Value::Bool(value) => ("bool", value.to_string()),
        Value::Int(number) => ("int", number.to_string()),
        Value::Float(number) => ("float", format!("{number:?}")),
        Value::Str(text) => ("str", short(text)),
        Value::Bytes(bytes) => ("bytes", format!("{} bytes", bytes.len())),
        Value::List(elements) => ("list", list(elements)),
        Value::Tuple(elements) => ("tuple", list(elements)),
        Value::Dict(_) | Value::OrderedDict { .. } => ("dict", "empty".into()),
        Value::Tensor(tensor) => ("tensor", format!("{:?}", tensor.shape)),
        Value::Opaque(kind) => (kind, String::new()),
    }
}

fn tensor_row(name: &str, tensor: &TensorData) -> [String; 3] {
    [name.into(), format!("{:?}", tensor.dtype()).to_lowercase(), format!("{:?}", tensor.shape)]
}

/// The first line of a text, cut where it is long.
fn short(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let cut: String = line.chars().take(60).map(|c| if c.is_control() { '·' } else { c }).collect();
    if cut.len() < text.len() { format!("{cut}…") } else { cut }
}

fn table(out: &mut impl Write, rows: &[[String; 3]]) -> std::io::Result<()> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (a, b) = (width(0), width(1));
    for [name, kind, text] in rows {
        writeln!(out, "{}", format!("{name:a$}  {kind:b$}  {text}").trim_end())?;
    }
    Ok(())
}
