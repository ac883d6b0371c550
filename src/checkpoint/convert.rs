//! `bbt convert`: between `.pt` and `.safetensors`, and between dtypes.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use tch::Kind;

use super::training_checkpoint::{EMBEDDING, HEAD, TrainingCheckpoint, model_checkpoint, tensor_data, to_tensor};
use super::{CheckpointError, TensorData, Value, safetensors_file, torch_file};
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

/// Writes the checkpoint `input` as `output`, whose extension says how: `.pt` or `.safetensors`. `dtype`
/// changes the weights', `optim` the optimizer whose state it is. A `.pt` from a `.pt` keeps everything; otherwise the weights and the model's
/// configuration.
///
/// # Errors
/// As [`TrainingCheckpoint::open`]; an extension that is neither; no optimizer state to change; the file system's.
pub fn convert(
    input: &Path,
    output: &Path,
    dtype: Option<WeightDtype>,
    optim: Option<OptimizerName>,
) -> Result<(), CheckpointError> {
    let checkpoint = TrainingCheckpoint::open(input)?;
    let is = |path: &Path, extension: &str| path.extension().is_some_and(|e| e == extension);
    let cast = |tensor: &TensorData| cast(tensor, dtype).map_err(|e| CheckpointError::content(input, e));
    if let (Some(_), Some(weights)) = (optim, [input, output].into_iter().find(|path| is(path, "safetensors"))) {
        return Err(CheckpointError::content(weights, "holds no optimizer state, which --optim changes"));
    }
    if is(output, "safetensors") {
        // Where storages are shared safetensors wants one name: the head is the embedding.
        let weights = checkpoint.weights().iter().filter(|(name, _)| *name != HEAD);
        let weights = weights.map(|(name, tensor)| Ok((name.clone(), cast(tensor)?)));
        let weights = weights.collect::<Result<BTreeMap<_, _>, CheckpointError>>()?;
        let config = config_of(&checkpoint).to_yaml();
        let metadata = HashMap::from([("format".into(), "pt".into()), ("bbt".into(), config)]);
        return safetensors_file::write(output, &weights, metadata);
    }
    if !is(output, "pt") {
        return Err(CheckpointError::content(output, "must end in .pt or .safetensors, which says what to write"));
    }
    let value = if is(input, "safetensors") {
        let weights = checkpoint.weights().iter().map(|(name, tensor)| Ok((name.clone(), cast(tensor)?)));
        model_checkpoint(&config_of(&checkpoint), weights.collect::<Result<_, CheckpointError>>()?)
    } else {
        let mut value = torch_file::read(input)?;
        if dtype.is_some()
            && let Value::Dict(entries) = &mut value
        {
            for (_, model) in entries.iter_mut().filter(|(key, _)| key.as_str() == Some("model")) {
                cast_state_dict(model, cast)?;
            }
        }
        if let Some(name) = optim {
            convert_optimizer(&checkpoint, &mut value, name)?;
        }
        value
    };
    torch_file::write(output, &value)
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
