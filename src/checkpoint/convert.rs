//! `bbt convert`: between `.pt` and `.safetensors`, and between dtypes.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use tch::Kind;

use super::original_args::model_args;
use super::state_dict::{EMBEDDING, HEAD, is_state_dict, prefix_len};
use super::training_checkpoint::{STATE_DICTS, TrainingCheckpoint, model_checkpoint};
use super::{CheckpointError, Format, TensorData, Value, safetensors_file, tensor_data, to_tensor, torch_file};
use crate::config::{Config, OptimizerName};

/// What weights may be converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// float32
    Fp32,
    /// bfloat16
    Bf16,
    /// float16
    Fp16,
}

/// Writes `checkpoint` as `output`, whose extension says how: `.pt` or `.safetensors`. `dtype` changes the weights',
/// `optim` the optimizer whose state it is. A `.pt` from a `.pt` keeps everything but what bbt cannot write, which is
/// returned by name; otherwise the weights and the model's configuration.
///
/// # Errors
/// An extension that is neither; no optimizer state to change; the file system's.
pub fn convert(
    checkpoint: &TrainingCheckpoint,
    output: &Path,
    dtype: Option<WeightDtype>,
    optim: Option<OptimizerName>,
) -> Result<Vec<String>, CheckpointError> {
    let input = checkpoint.path();
    let from_safetensors = Format::of(input)? == Some(Format::Safetensors);
    let is = |path: &Path, extension: &str| path.extension().is_some_and(|e| e == extension);
    let cast = |tensor: &TensorData| cast(tensor, dtype).map_err(|e| CheckpointError::content(input, e));
    if optim.is_some() && (from_safetensors || is(output, "safetensors")) {
        let weights = if from_safetensors { input } else { output };
        return Err(CheckpointError::content(weights, "holds no optimizer state, which --optim changes"));
    }
    if is(output, "safetensors") {
        // Where storages are shared safetensors wants one name: the head is the embedding.
        let weights = checkpoint.weights().iter().filter(|(name, _)| *name != HEAD);
        let weights = weights.map(|(name, tensor)| Ok((name.clone(), cast(tensor)?)));
        let weights = weights.collect::<Result<BTreeMap<_, _>, CheckpointError>>()?;
        let config = config_of(checkpoint).to_yaml();
        let metadata = HashMap::from([("format".into(), "pt".into()), ("bbt".into(), config)]);
        safetensors_file::write(output, &weights, metadata)?;
        return Ok(vec![]);
    }
    if !is(output, "pt") {
        return Err(CheckpointError::content(output, "must end in .pt or .safetensors, which says what to write"));
    }
    let mut value = match from_safetensors {
        true => Value::None,
        false => torch_file::read(input)?,
    };
    if from_safetensors || is_state_dict(&value) {
        if optim.is_some() {
            return Err(CheckpointError::content(input, "holds no optimizer state, which --optim changes"));
        }
        let weights = checkpoint.weights().iter().map(|(name, tensor)| Ok((name.clone(), cast(tensor)?)));
        let weights = weights.collect::<Result<_, CheckpointError>>()?;
        torch_file::write(output, &model_checkpoint(&config_of(checkpoint), weights))?;
        return Ok(vec![]);
    }
    if let Value::Dict(entries) | Value::OrderedDict { items: entries, .. } = &mut value {
        let key = |entry: &(Value, Value), key: &str| entry.0.as_str() == Some(key);
        let found = STATE_DICTS.iter().find_map(|name| entries.iter().position(|entry| key(entry, name)));
        if let Some((name, model)) = found.map(|index| &mut entries[index]) {
            *name = Value::Str("model".into());
            cast_state_dict(model, cast)?;
        }
        if checkpoint.is_weights_alone() {
            entries.retain(|entry| !key(entry, "args"));
            entries.push((Value::Str("args".into()), model_args(&config_of(checkpoint))));
        }
    }
    if let Some(name) = optim {
        convert_optimizer(checkpoint, &mut value, name)?;
    }
    let mut left_out = vec![];
    drop_opaque(&mut value, "", &mut left_out);
    torch_file::write(output, &value)?;
    Ok(left_out)
}

/// Takes the entries out of `value` that hold something that cannot be written, and notes their names.
fn drop_opaque(value: &mut Value, path: &str, left_out: &mut Vec<String>) {
    let (Value::Dict(entries) | Value::OrderedDict { items: entries, .. }) = value else { return };
    entries.retain_mut(|(key, value)| {
        let name = key.as_str().map_or_else(|| format!("{key:?}"), String::from);
        let path = if path.is_empty() { name } else { format!("{path}.{name}") };
        drop_opaque(value, &path, left_out);
        let opaque = opaque_in(key).or_else(|| opaque_in(value));
        if let Some(kind) = opaque {
            left_out.push(format!("{path} ({kind})"));
        }
        opaque.is_none()
    });
}

fn opaque_in(value: &Value) -> Option<&'static str> {
    match value {
        Value::Opaque(kind) => Some(kind),
        Value::List(elements) | Value::Tuple(elements) => elements.iter().find_map(opaque_in),
        Value::Dict(entries) => entries.iter().find_map(|(key, value)| opaque_in(key).or_else(|| opaque_in(value))),
        Value::OrderedDict { items, attributes } => items
            .iter()
            .find_map(|(key, value)| opaque_in(key).or_else(|| opaque_in(value)))
            .or_else(|| attributes.iter().find_map(|(_, value)| opaque_in(value))),
        _ => None,
    }
}

fn config_of(checkpoint: &TrainingCheckpoint) -> Config {
    Config { model: checkpoint.model_config().clone(), quant: *checkpoint.quant_config(), ..Config::default() }
}

/// Makes the optimizer of a checkpoint, and of the configuration in it, that of `name`.
fn convert_optimizer(
    checkpoint: &TrainingCheckpoint,
    value: &mut Value,
    name: OptimizerName,
) -> Result<(), CheckpointError> {
    let converted = checkpoint.converted_optimizer(name)?;
    if let Some(opt) = value.get_mut("opt") {
        *opt = converted;
    }
    // Opening has read it already.
    if let Some(Value::Str(yaml)) = value.get_mut("bbt").and_then(|ours| ours.get_mut("config"))
        && let Ok(mut config) = Config::from_yaml(yaml)
    {
        config.optim.name = name;
        *yaml = config.to_yaml();
    }
    Ok(())
}

fn cast_state_dict(
    model: &mut Value,
    cast: impl Fn(&TensorData) -> Result<TensorData, CheckpointError>,
) -> Result<(), CheckpointError> {
    let (Value::OrderedDict { items, .. } | Value::Dict(items)) = model else { return Ok(()) };
    let prefix = prefix_len(&items.iter().filter_map(|(name, _)| name.as_str()).collect::<Vec<_>>());
    for (name, _) in items.iter_mut() {
        if let Value::Str(name) = name {
            name.drain(..prefix);
        }
    }
    for (_, value) in items.iter_mut() {
        if let Value::Tensor(tensor) = value {
            *tensor = cast(tensor)?;
        }
    }
    // The head stays tied.
    let embedding = items.iter().find(|(key, _)| key.as_str() == Some(EMBEDDING)).map(|(_, value)| value.clone());
    for (_, value) in items.iter_mut().filter(|(key, _)| key.as_str() == Some(HEAD)) {
        *value = embedding.clone().unwrap_or(Value::None);
    }
    Ok(())
}

fn cast(tensor: &TensorData, dtype: Option<WeightDtype>) -> Result<TensorData, String> {
    let Some(dtype) = dtype else { return Ok(tensor.clone()) };
    let kind = match dtype {
        WeightDtype::Fp32 => Kind::Float,
        WeightDtype::Bf16 => Kind::BFloat16,
        WeightDtype::Fp16 => Kind::Half,
    };
    Ok(tensor_data(&to_tensor(tensor).map_err(|e| e.to_string())?.to_kind(kind)))
}
