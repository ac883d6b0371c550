//! What a training checkpoint holds: the keys that the PyTorch original writes with `torch.save`, read
//! strictly, and written so that the original and plain `torch.load` read ours.
//!
//! | key | what |
//! |---|---|
//! | `step` | number of the last step done, from 0 |
//! | `variant`, `model_family` | `ar`, `bitbyte` |
//! | `model` | the state_dict; `lm_head.weight` shares the storage of `tok_emb.weight` |
//! | `opt` | the state_dict of torch.optim.AdamW or bitsandbytes' AdamW8bit, parameters numbered in PyTorch's order |
//! | `scaler` | the state_dict of GradScaler; of a run that has none, the one it was resumed with, or GradScaler's defaults |
//! | `args` | the original's command-line arguments |
//! | `bbt` | what exact resume needs besides: `version`, `config` (YAML), `progress` (JSON), `data` (a fingerprint) |
//!
//! Reading takes weights alone, too. A value that bbt uses and that cannot be read is an error, never a default; a
//! key that bbt does not use may hold anything.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};

use super::optimizer_state::{Group, optimizer_value};
use super::original_args::{Rule, args, its_arithmetic, model_of_args, original_rule, rule_of};
use super::state_dict::{self, Weights, WeightsShape, is_state_dict, parameter_names, weights_of, without_prefix};
use super::{CheckpointError, Dtype, Format, Storage, TensorData, Value, safetensors_file, torch_file};
use crate::config::{ActQuant, Attention, Config, ModelConfig, QuantConfig, WeightQuant};
use crate::data::Position;
use crate::libtorch::cpu_bytes;
use crate::models::BitByteLM;
use crate::utils::optim::{OptimizerState, ScalerState};

/// The value of `model_family`.
pub(super) const FAMILY: &str = "bitbyte";
/// The original's file for inference: the weights are ternary values already, and activations stay in full precision.
const FAST_TERNARY: &str = "fast_ternary_v1";
/// The keys that people put a state_dict under.
pub(super) const STATE_DICTS: [&str; 3] = ["model", "state_dict", "model_state_dict"];

/// How far a run has come: what exact resume needs besides weights and optimizer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done, skipped ones included.
    pub completed: u64,
    /// Bytes predicted so far.
    pub bytes_seen: u64,
    /// Steps skipped for a loss or gradient that was not finite.
    pub skipped: u64,
    /// How many of them in a row, up to the last step.
    pub skipped_in_a_row: u64,
    /// The lowest validation loss so far, in nats per byte.
    pub best_val_loss: Option<f64>,
    /// Where in the data the next step reads.
    pub position: Position,
}

/// What goes into a training checkpoint.
pub struct Contents<'a> {
    /// The run's configuration.
    pub config: &'a Config,
    /// The parameters.
    pub vs: &'a nn::VarStore,
    /// Their optimizer's state, in PyTorch's order.
    pub optimizer: &'a OptimizerState,
    /// The learning rate of the last step.
    pub lr: f64,
    /// The weight decay of the last step.
    pub weight_decay: f64,
    /// The gradient scaler's state, for whoever goes on in fp16.
    pub scaler: ScalerState,
    /// What tells the training bytes from others ([`crate::data::ByteDataset::fingerprint`]).
    pub data: &'a str,
    /// How far the run has come.
    pub progress: &'a Progress,
}

impl Contents<'_> {
    /// Writes the checkpoint to `path`, whole or not at all.
    ///
    /// # Errors
    /// The file system's, naming the file.
    pub fn write(&self, path: &Path) -> Result<(), CheckpointError> {
        torch_file::write(path, &self.value())
    }

    fn value(&self) -> Value {
        let variables = self.vs.variables();
        let weights = parameter_names(&self.config.model).into_iter();
        let weights = weights.map(|name| {
            let data = tensor_data(&variables[&name]);
            (name, data)
        });
        let progress = serde_json::to_string(self.progress).unwrap_or_default();
        let ours = dict([
            ("version", Value::Int(VERSION)),
            ("config", str(&self.config.to_yaml())),
            ("progress", str(&progress)),
            ("data", str(self.data)),
        ]);
        dict([
            // Of the steps from 0 the last one done; 0, too, before the first.
            ("step", int(self.progress.completed.saturating_sub(1))),
            ("variant", str("ar")),
            ("model_family", str(FAMILY)),
            ("model", state_dict::state_dict(&self.config.model, weights.collect())),
            ("opt", self.optimizer()),
            ("scaler", scaler_value(self.scaler)),
            ("args", args(self.config)),
            ("bbt", ours),
        ])
    }

    fn optimizer(&self) -> Value {
        let optim = &self.config.optim;
        let group = Group { lr: self.lr, betas: optim.betas, eps: optim.eps, weight_decay: self.weight_decay };
        // Before the first step PyTorch holds no state.
        optimizer_value(self.optimizer, self.progress.completed > 0, group)
    }
}

/// The version of the key `bbt`.
const VERSION: i64 = 1;

/// What the user says of a model, for files that do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Given {
    /// Number of heads, which no weight's shape tells.
    pub n_head: Option<i64>,
    /// Quantization of activations; int8 where nothing is said.
    pub act: Option<ActQuant>,
}

/// Who wrote a checkpoint, and so what it tells.
#[derive(Debug)]
enum Origin {
    /// bbt; with the configuration of its run.
    Ours(Box<Config>),
    /// The PyTorch original, or a trainer that writes as it does.
    Original,
    /// The original's file for inference, [`FAST_TERNARY`].
    FastTernary,
    /// Somebody who saved weights alone.
    Weights,
}

/// A checkpoint that was opened: its tensors are still in the file.
#[derive(Debug)]
pub struct TrainingCheckpoint {
    path: PathBuf,
    origin: Origin,
    model: ModelConfig,
    quant: QuantConfig,
    /// How far quantization had come in, 0 to 1.
    lambda: f64,
    weights: Weights,
    optimizer: Option<Value>,
    scaler: Option<ScalerState>,
    /// Steps done; none where the file does not say.
    completed: Option<u64>,
    progress: Option<Progress>,
    data: Option<String>,
    /// The original's arguments, where it has them.
    args: Option<Value>,
    /// Whether it has a `scaler`, be it an empty one.
    has_scaler: bool,
}

impl TrainingCheckpoint {
    /// Opens a training checkpoint, of ours or the original's, or weights that say their model's shape. What a file is
    /// its content says, not its name.
    ///
    /// # Errors
    /// A file that is missing, damaged, or of another model family; a value that bbt uses and cannot read; weights that
    /// leave the number of heads open.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_given(path, &Given::default())
    }

    /// The same, and weights alone whose shapes and `given` say what the model is.
    ///
    /// # Errors
    /// As [`TrainingCheckpoint::open`].
    pub fn open_given(path: &Path, given: &Given) -> Result<Self, CheckpointError> {
        let checkpoint = match Format::of(path)? {
            Some(Format::Safetensors) => Self::from_safetensors(path, given)?,
            // What is no checkpoint at all is refused there.
            _ => Self::from_value(path, torch_file::read(path)?, given)?,
        };
        state_dict::check(&checkpoint.weights, &checkpoint.model).map_err(|e| checkpoint.error(e))?;
        Ok(checkpoint)
    }

    fn from_value(path: &Path, value: Value, given: &Given) -> Result<Self, CheckpointError> {
        let error = |message: String| CheckpointError::Content { path: path.into(), message };
        if is_state_dict(&value) {
            return Self::from_weights(path, weights_of(&value, "the file").map_err(error)?, given);
        }
        let found = STATE_DICTS.iter().find_map(|key| Some((*key, value.get(key)?)));
        let Some((key, model)) = found else {
            return Err(error("has no `model`: this is no BitByteLM training checkpoint, nor a state_dict".into()));
        };
        let of_family = |key: &str, ours: &str| match text(&value, key).map_err(error)? {
            None => Ok(()),
            Some(theirs) if theirs == ours => Ok(()),
            Some(theirs) => Err(error(format!("is of {key} {theirs}; bbt trains {FAMILY}, variant ar"))),
        };
        of_family("model_family", FAMILY)?;
        of_family("variant", "ar")?;
        let fast = match text(&value, "format").map_err(error)? {
            None => false,
            Some(FAST_TERNARY) => true,
            Some(other) => return Err(error(format!("is of format {other}, which bbt does not read"))),
        };
        let weights = weights_of(model, key).map_err(error)?;
        let ours = part(&value, "bbt").map_err(error)?;
        let args = value.get("args").filter(|args| !args.is_none());
        let config = match ours {
            Some(ours) => Some(config_of(ours).map_err(error)?),
            None => None,
        };
        let (mut origin, model, mut quant) = match (config, args) {
            (Some(config), _) => (Origin::Ours(Box::new(config.clone())), config.model, config.quant),
            (None, Some(args)) => {
                let (model, quant) = model_of_args(args, given).map_err(error)?;
                (Origin::Original, model, quant)
            }
            (None, None) => {
                let (model, quant) = model_of_weights(path, &weights, given)?;
                (Origin::Weights, model, quant)
            }
        };
        if fast {
            origin = Origin::FastTernary;
            (quant.weight, quant.act) = (WeightQuant::None, ActQuant::None);
        }
        model.validate().map_err(|e| error(format!("its model is none that bbt can build: {e}")))?;
        let progress = match ours.map(|ours| text(ours, "progress")).transpose().map_err(error)?.flatten() {
            Some(json) => Some(
                serde_json::from_str::<Progress>(json)
                    .map_err(|e| error(format!("its `bbt.progress` cannot be read: {e}")))?,
            ),
            None => None,
        };
        let data = ours.map(|ours| text(ours, "data")).transpose().map_err(error)?.flatten().map(String::from);
        let steps = match &origin {
            Origin::Ours(config) => config.train.steps,
            _ => 0,
        };
        let optimizer = value.get("opt").filter(|opt| !opt.is_none()).cloned();
        // Weights of ours that belong to no run have step 0, too.
        let of_no_run = ours.is_some() && progress.is_none();
        let completed = if of_no_run { None } else { completed(&value, optimizer.as_ref()).map_err(error)? };
        Ok(Self {
            path: path.into(),
            origin,
            model,
            quant,
            // Weights alone, of no run, count as a finished one's.
            lambda: progress.as_ref().map_or(1.0, |progress| quant.lambda(progress.completed, steps)),
            weights,
            optimizer,
            scaler: scaler_state(&value).map_err(error)?,
            completed,
            progress,
            data,
            args: args.cloned(),
            has_scaler: value.get("scaler").is_some(),
        })
    }

    fn from_safetensors(path: &Path, given: &Given) -> Result<Self, CheckpointError> {
        let error = |message: String| CheckpointError::Content { path: path.into(), message };
        let (tensors, metadata) = safetensors_file::read(path)?;
        let Some(yaml) = metadata.get("bbt") else {
            return Self::from_weights(path, without_prefix(tensors), given);
        };
        let config = Config::from_yaml(yaml).map_err(|e| error(format!("its configuration cannot be read: {e}")))?;
        config.model.validate().map_err(|e| error(format!("its model is none that bbt can build: {e}")))?;
        let (model, quant) = (config.model.clone(), config.quant);
        Ok(Self::of_weights(path, Origin::Ours(Box::new(config)), model, quant, tensors))
    }

    /// Weights that say nothing of their model but their shapes.
    fn from_weights(path: &Path, weights: Weights, given: &Given) -> Result<Self, CheckpointError> {
        let (model, quant) = model_of_weights(path, &weights, given)?;
        Ok(Self::of_weights(path, Origin::Weights, model, quant, weights))
    }

    fn of_weights(path: &Path, origin: Origin, model: ModelConfig, quant: QuantConfig, weights: Weights) -> Self {
        Self {
            path: path.into(),
            origin,
            model,
            quant,
            lambda: 1.0,
            weights,
            optimizer: None,
            scaler: None,
            completed: None,
            progress: None,
            data: None,
            args: None,
            has_scaler: false,
        }
    }

    /// Sees that a run can start from the weights.
    ///
    /// # Errors
    /// Weights that are ternary already, or not finite.
    pub fn check_trainable(&self) -> Result<(), CheckpointError> {
        if matches!(self.origin, Origin::FastTernary) {
            return Err(self.error(format!(
                "is a file for inference ({FAST_TERNARY}): what training needs of its weights was rounded away; start                  from the checkpoint that it was made of"
            )));
        }
        self.check_finite()
    }

    /// Sees that the checkpoint can be resumed.
    ///
    /// # Errors
    /// One that does not say how far its run had come.
    pub fn check_resumable(&self) -> Result<(), CheckpointError> {
        match (self.completed, &self.progress) {
            (None, None) => Err(self.error(
                "does not say how far its run had come (it has no `step`): --init starts at step 0 with its weights"
                    .into(),
            )),
            _ => Ok(()),
        }
    }

    /// Sees that every weight is finite.
    fn check_finite(&self) -> Result<(), CheckpointError> {
        let mut bad = vec![];
        let (mut broken, mut total) = (0, 0);
        for name in parameter_names(&self.model) {
            let Some(data) = self.weights.get(&name) else { continue };
            let tensor = to_tensor(data).map_err(|e| self.error(format!("{name}: {e}")))?;
            let finite = i64::try_from(tensor.isfinite().sum(Kind::Int64)).unwrap_or(0);
            total += data.numel() as i64;
            if finite < data.numel() as i64 {
                broken += data.numel() as i64 - finite;
                bad.push(name);
            }
        }
        match &bad[..] {
            [] => Ok(()),
            [first, rest @ ..] => {
                let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
                Err(self.error(format!(
                    "{broken} of its {total} weights are not finite, in {first}{more}: go back to an earlier checkpoint"
                )))
            }
        }
    }

    /// Whether the file holds weights that say nothing of their model, so that it was [`Given`].
    pub fn is_weights_alone(&self) -> bool {
        matches!(self.origin, Origin::Weights)
    }

    /// Whether bbt wrote it.
    pub fn is_ours(&self) -> bool {
        matches!(self.origin, Origin::Ours(_))
    }

    /// How its run trained, as far as it tells.
    pub fn rule(&self) -> Rule {
        match &self.origin {
            Origin::Ours(config) if self.progress.is_some() => rule_of(config),
            Origin::Original => {
                let groups = self.groups().unwrap_or_default();
                let numbers: Vec<_> = groups.iter().filter_map(|group| group.numbers().ok()).collect();
                let has_scaler = self.has_scaler.then_some(self.scaler.is_some());
                original_rule(has_scaler, self.args.as_ref(), &numbers)
            }
            _ => vec![],
        }
    }

    /// What tells the bytes that it was trained on from others; none where it does not say.
    pub fn data(&self) -> Option<&str> {
        self.data.as_deref()
    }

    pub(super) fn optimizer(&self) -> Option<&Value> {
        self.optimizer.as_ref()
    }

    /// Steps done, 0 where the file does not say.
    pub(super) fn completed(&self) -> u64 {
        self.completed.unwrap_or(0)
    }

    pub(super) fn error(&self, message: String) -> CheckpointError {
        CheckpointError::Content { path: self.path.clone(), message }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The weights by PyTorch's names, as they are in the file.
    pub fn weights(&self) -> &std::collections::BTreeMap<String, TensorData> {
        &self.weights
    }

    /// The model's shape.
    pub fn model_config(&self) -> &ModelConfig {
        &self.model
    }

    /// The model's quantization.
    pub fn quant_config(&self) -> &QuantConfig {
        &self.quant
    }

    /// The gradient scaler's state, if the run had one.
    pub fn scaler(&self) -> Option<ScalerState> {
        self.scaler
    }

    /// How far its run had come. A checkpoint of the original does not say where in the data it was:
    /// reading starts anew.
    pub fn progress(&self) -> Progress {
        self.progress.clone().unwrap_or(Progress { completed: self.completed(), ..Progress::default() })
    }

    /// Copies the weights to the parameters of `vs`, which must be those of [`BitByteLM`].
    ///
    /// # Errors
    /// A weight of another shape or not fp32.
    pub fn load_weights(&self, vs: &nn::VarStore) -> Result<(), CheckpointError> {
        let _no_grad = tch::no_grad_guard();
        let mut variables = vs.variables();
        for name in parameter_names(&self.model) {
            let Some(variable) = variables.get_mut(&name) else { continue };
            let data = self.weights.get(&name).ok_or_else(|| self.error(format!("has no {name}")))?;
            let size = variable.size();
            let half = matches!(data.dtype(), Dtype::F16 | Dtype::BF16);
            let fits = data.dtype() == Dtype::F32 || (half && matches!(self.origin, Origin::FastTernary));
            if !fits {
                return Err(self.error(format!(
                    "{name} is {:?}, but bbt trains fp32: `bbt convert IN OUT --dtype fp32` makes it so",
                    data.dtype()
                )));
            }
            variable.copy_(&self.tensor(&name, data, &size)?);
        }
        Ok(())
    }
}

/// The model of the checkpoint at `path` with its parameters on `device`, quantized as far as its run was.
///
/// # Errors
/// As [`TrainingCheckpoint::open`]; weights that are not finite.
pub fn load_model(path: &Path, device: Device) -> Result<(nn::VarStore, BitByteLM), CheckpointError> {
    build_model(&TrainingCheckpoint::open(path)?, device)
}

/// The model of an open checkpoint with its parameters on `device`, quantized as far as its run was.
///
/// # Errors
/// Weights that are neither fp32 nor finite.
pub fn build_model(
    checkpoint: &TrainingCheckpoint,
    device: Device,
) -> Result<(nn::VarStore, BitByteLM), CheckpointError> {
    checkpoint.check_finite()?;
    let mut vs = nn::VarStore::new(Device::Cpu);
    let mut model = BitByteLM::new(&vs.root(), &checkpoint.model, &checkpoint.quant);
    model.set_quantization(checkpoint.lambda);
    checkpoint.load_weights(&vs)?;
    vs.set_device(device);
    vs.freeze();
    Ok((vs, model))
}

/// The model of the checkpoint at `path` for inference alone, on `device`: each weight is held once, as what computes
/// its layer reads it ([`BitByteLM::freeze`]).
///
/// # Errors
/// As [`TrainingCheckpoint::open`].
pub fn load_for_inference(path: &Path, device: Device) -> Result<BitByteLM, CheckpointError> {
    build_for_inference(&TrainingCheckpoint::open(path)?, device)
}

/// The same of an open checkpoint.
///
/// # Errors
/// As [`build_model`].
pub fn build_for_inference(checkpoint: &TrainingCheckpoint, device: Device) -> Result<BitByteLM, CheckpointError> {
    // The store, which holds the trained weights, is gone before any is quantized.
    let mut model = build_model(checkpoint, device)?.1;
    model.freeze();
    Ok(model)
}

/// A checkpoint of weights alone, from which a run can start (`--init`).
pub(super) fn model_checkpoint(config: &Config, mut weights: Weights) -> Value {
    let names = parameter_names(&config.model).into_iter();
    let weights = names.filter_map(|name| weights.remove(&name).map(|data| (name, data)));
    dict([
        ("step", Value::Int(0)),
        ("variant", str("ar")),
        ("model_family", str(FAMILY)),
        ("model", state_dict::state_dict(&config.model, weights.collect())),
        ("args", args(config)),
        ("bbt", dict([("version", Value::Int(VERSION)), ("config", str(&config.to_yaml()))])),
    ])
}

/// The model that `weights` are of, as their shapes and `given` say.
fn model_of_weights(
    path: &Path,
    weights: &Weights,
    given: &Given,
) -> Result<(ModelConfig, QuantConfig), CheckpointError> {
    let error = |message: String| CheckpointError::Content { path: path.into(), message };
    let shape = WeightsShape::of(weights).map_err(error)?;
    let Some(n_head) = given.n_head else {
        return Err(CheckpointError::Heads { path: path.into(), shape });
    };
    let model = ModelConfig { attention: Attention::Sdpa, ..shape.model(n_head).map_err(error)? };
    model.validate().map_err(|e| error(format!("its model is none that bbt can build: {e}")))?;
    Ok((model, its_arithmetic(given.act.unwrap_or(ActQuant::Int8))))
}

/// The dict under `key`; none where there is none.
fn part<'a>(value: &'a Value, key: &str) -> Result<Option<&'a Value>, String> {
    match value.get(key) {
        None | Some(Value::None) => Ok(None),
        Some(found @ (Value::Dict(_) | Value::OrderedDict { .. })) => Ok(Some(found)),
        Some(other) => Err(format!("its `{key}` is no dict but of type {}", other.type_name())),
    }
}

/// The text under `key`; none where there is none.
fn text<'a>(value: &'a Value, key: &str) -> Result<Option<&'a str>, String> {
    match value.get(key) {
        None | Some(Value::None) => Ok(None),
        Some(Value::Str(text)) => Ok(Some(text)),
        Some(other) => Err(format!("its `{key}` is no text but of type {}", other.type_name())),
    }
}

/// The configuration of our run, from the key `bbt`.
fn config_of(ours: &Value) -> Result<Config, String> {
    match ours.get("version") {
        Some(Value::Int(VERSION)) => {}
        Some(Value::Int(newer)) if *newer > VERSION => {
            return Err(format!("was written by a later bbt (`bbt.version` {newer}): use that one"));
        }
        _ => return Err("its `bbt.version` is missing or no number that bbt has used".into()),
    }
    let yaml = text(ours, "config")?.ok_or("its `bbt` has no `config`")?;
    Config::from_yaml(yaml).map_err(|e| format!("its configuration cannot be read: {e}"))
}

/// Steps done, from `step`, the last one counted from 0; none without the key.
fn completed(value: &Value, optimizer: Option<&Value>) -> Result<Option<u64>, String> {
    let Some(step) = value.get("step").filter(|step| !step.is_none()) else { return Ok(None) };
    let step = match step.whole_number() {
        // Some count from here before the first.
        Some(-1) => return Ok(Some(0)),
        Some(step) => u64::try_from(step).map_err(|_| format!("its `step` is {step}, which is no step"))?,
        None => return Err(format!("its `step` is no whole number but of type {}", step.type_name())),
    };
    // A checkpoint saved before the first step has step 0, too: then no parameter has optimizer state.
    let untouched = optimizer.and_then(|o| o.get("state")).is_some_and(|s| s.entries().is_empty());
    Ok(Some(if untouched { step } else { step.saturating_add(1) }))
}

fn scaler_value(state: ScalerState) -> Value {
    dict([
        ("scale", Value::Float(state.scale)),
        ("growth_factor", Value::Float(state.growth_factor)),
        ("backoff_factor", Value::Float(state.backoff_factor)),
        ("growth_interval", Value::Int(state.growth_interval)),
        ("_growth_tracker", Value::Int(state.growth_tracker)),
    ])
}

/// None where the run had no scaler: then the dict is empty.
fn scaler_state(value: &Value) -> Result<Option<ScalerState>, String> {
    let Some(scaler) = part(value, "scaler")?.filter(|scaler| !scaler.entries().is_empty()) else { return Ok(None) };
    let field = |key: &str| scaler.get(key).ok_or_else(|| format!("its `scaler` has no `{key}`"));
    let factor = |key: &str| match field(key)?.number() {
        Some(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err(format!("`{key}` of its `scaler` is no number above 0")),
    };
    let count = |key: &str| match field(key)?.whole_number() {
        Some(number) if number >= 0 => Ok(number),
        _ => Err(format!("`{key}` of its `scaler` is no count")),
    };
    Ok(Some(ScalerState {
        scale: factor("scale")?,
        growth_factor: factor("growth_factor")?,
        backoff_factor: factor("backoff_factor")?,
        growth_interval: count("growth_interval")?,
        growth_tracker: count("_growth_tracker")?,
    }))
}

/// A libtorch tensor's values as a checkpoint's, without a copy where it lies on the CPU.
pub(super) fn tensor_data(tensor: &Tensor) -> TensorData {
    let dtype = match tensor.kind() {
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Double => Dtype::F64,
        Kind::Int64 => Dtype::I64,
        Kind::Uint8 => Dtype::U8,
        other => unreachable!("no tensor of kind {other:?} is saved"),
    };
    let shape = tensor.size().iter().map(|&n| n as usize).collect();
    TensorData::contiguous(Storage::new(dtype, cpu_bytes(tensor)), shape)
}

/// A CPU tensor with a copy of `data`.
pub(super) fn to_tensor(data: &TensorData) -> Result<Tensor, tch::TchError> {
    let kind = match data.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::Bool => Kind::Bool,
    };
    let shape: Vec<i64> = data.shape.iter().map(|&n| n as i64).collect();
    Tensor::f_from_data_size(&data.contiguous_bytes(), &shape, kind)
}

pub(super) fn dict<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Dict(entries.into_iter().map(|(key, value)| (str(key), value)).collect())
}

pub(super) fn str(text: &str) -> Value {
    Value::Str(text.into())
}

pub(super) fn int(value: u64) -> Value {
    Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
}
