//! What a training checkpoint holds: the keys that the PyTorch original writes with `torch.save`, read
//! strictly, and written so that the original and plain `torch.load` read ours.
//!
//! | key | what |
//! |---|---|
//! | `step` | number of the last step done, from 0 |
//! | `variant`, `model_family` | `ar`, `bitbyte` |
//! | `model` | the state_dict; `lm_head.weight` shares the storage of `tok_emb.weight` |
//! | `opt` | the state_dict of torch.optim.AdamW or bitsandbytes' AdamW8bit, parameters numbered in PyTorch's order |
//! | `scaler` | the state_dict of GradScaler; empty where the run has none |
//! | `args` | the original's command-line arguments |
//! | `bbt` | what exact resume needs besides: `version`, `config` (YAML), `progress` (JSON) |

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};

use super::{CheckpointError, Dtype, Storage, TensorData, Value, safetensors_file, torch_file};
use crate::config::{
    ActQuant, Attention, Config, ModelConfig, OptimizerName, QuantConfig, QuantKernel, Schedule, VOCAB_SIZE,
};
use crate::data::Position;
use crate::libtorch::cpu_bytes;
use crate::models::BitByteLM;
use crate::utils::optim::{AdamW8bit, AdamW8bitState, AdamWState, Moments, OptimizerState, ScalerState};

/// The value of `model_family`.
const FAMILY: &str = "bitbyte";
/// The embedding.
pub(super) const EMBEDDING: &str = "tok_emb.weight";
/// The output head, tied to it.
pub(super) const HEAD: &str = "lm_head.weight";
/// Where bitsandbytes puts what it keeps of a parameter, but for the step.
const QUANT_STATE: &str = "__bnb_optimizer_quant_state__";
/// What to do without the optimizer's state.
const WITHOUT_STATE: &str = "use --no-opt-state to start with fresh moments, or --init to start at step 0";
/// The longest sequence of the original's curriculum, where nothing caps it.
const UNCAPPED: i64 = 8192;

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
    /// The gradient scaler, for fp16.
    pub scaler: Option<ScalerState>,
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
        let ours =
            dict([("version", Value::Int(1)), ("config", str(&self.config.to_yaml())), ("progress", str(&progress))]);
        dict([
            // Of the steps from 0 the last one done; 0, too, before the first.
            ("step", int(self.progress.completed.saturating_sub(1))),
            ("variant", str("ar")),
            ("model_family", str(FAMILY)),
            ("model", state_dict(&self.config.model, weights.collect())),
            ("opt", self.optimizer()),
            ("scaler", self.scaler.map_or(dict([]), scaler_value)),
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

/// The numbers of an optimizer's one group of parameters.
struct Group {
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
}

/// The `state_dict()` of the optimizer that `state` is of; without the state of parameters unless `stepped`.
fn optimizer_value(state: &OptimizerState, stepped: bool, group: Group) -> Value {
    let params = (0..state.len() as i64).map(Value::Int).collect();
    let common = [
        ("lr", Value::Float(group.lr)),
        ("betas", Value::Tuple(vec![Value::Float(group.betas.0), Value::Float(group.betas.1)])),
        ("eps", Value::Float(group.eps)),
        ("weight_decay", Value::Float(group.weight_decay)),
    ];
    let (entries, of_its_own) = match state {
        OptimizerState::AdamW(state) => (state.iter().map(adamw_value).collect(), ADAMW_GROUP),
        OptimizerState::AdamW8bit(state) => (adamw8bit_values(state), ADAMW8BIT_GROUP),
    };
    let entries: Vec<Value> = if stepped { entries } else { vec![] };
    let group = common.into_iter().chain(of_its_own.iter().cloned()).chain([("params", Value::List(params))]);
    dict([
        ("state", Value::Dict((0..).map(Value::Int).zip(entries).collect())),
        ("param_groups", Value::List(vec![Value::Dict(group.map(|(key, value)| (str(key), value)).collect())])),
    ])
}

/// What else PyTorch 2.11 has in a group of `torch.optim.AdamW`.
const ADAMW_GROUP: &[(&str, Value)] = &[
    ("amsgrad", Value::Bool(false)),
    ("maximize", Value::Bool(false)),
    ("foreach", Value::None),
    ("capturable", Value::Bool(false)),
    ("differentiable", Value::Bool(false)),
    ("fused", Value::None),
    ("decoupled_weight_decay", Value::Bool(true)),
];

/// What else bitsandbytes 0.50 has in one of `AdamW8bit`.
const ADAMW8BIT_GROUP: &[(&str, Value)] =
    &[("alpha", Value::Float(0.0)), ("t_alpha", Value::None), ("t_beta3", Value::None)];

fn adamw_value(s: &AdamWState) -> Value {
    dict([
        ("step", Value::Tensor(tensor_data(&s.step))),
        ("exp_avg", Value::Tensor(tensor_data(&s.exp_avg))),
        ("exp_avg_sq", Value::Tensor(tensor_data(&s.exp_avg_sq))),
    ])
}

fn adamw8bit_values(state: &AdamW8bit) -> Vec<Value> {
    // One storage for all.
    let [qmap1, qmap2] = state.qmaps().map(|qmap| Value::Tensor(tensor_data(qmap)));
    let tensor = |tensor: &Tensor| Value::Tensor(tensor_data(tensor));
    let of_one = |s: &AdamW8bitState| {
        let moments = match &s.moments {
            Moments::Full([first, second]) => dict([("state1", tensor(first)), ("state2", tensor(second))]),
            Moments::Quantized([first, second]) => dict([
                ("state1", tensor(&first.codes)),
                ("qmap1", qmap1.clone()),
                ("state2", tensor(&second.codes)),
                ("qmap2", qmap2.clone()),
                ("absmax1", tensor(&first.absmax)),
                ("absmax2", tensor(&second.absmax)),
            ]),
        };
        dict([("step", Value::Int(s.step.double_value(&[]) as i64)), (QUANT_STATE, moments)])
    };
    state.params.iter().map(of_one).collect()
}

/// A checkpoint that was opened: its tensors are still in the file.
#[derive(Debug)]
pub struct TrainingCheckpoint {
    path: PathBuf,
    model: ModelConfig,
    quant: QuantConfig,
    /// How far quantization had come in, 0 to 1.
    lambda: f64,
    weights: BTreeMap<String, TensorData>,
    optimizer: Option<Value>,
    scaler: Option<ScalerState>,
    completed: u64,
    progress: Option<Progress>,
}

impl TrainingCheckpoint {
    /// Opens a training checkpoint (`.pt`, of ours or the original's) or weights (`.safetensors`, of ours).
    ///
    /// # Errors
    /// A file that is missing, damaged, of another model family, or says nothing of its model's shape.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let checkpoint = if path.extension().is_some_and(|e| e == "safetensors") {
            Self::from_safetensors(path)?
        } else {
            Self::from_value(path, torch_file::read(path)?)?
        };
        checkpoint.check_weights()?;
        Ok(checkpoint)
    }

    fn from_value(path: &Path, value: Value) -> Result<Self, CheckpointError> {
        let error = |message: String| CheckpointError::Content { path: path.into(), message };
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        if value.get("model").is_none() {
            return Err(error("has no `model`: this is no BitByteLM training checkpoint".into()));
        }
        match (text("model_family"), text("variant")) {
            (Some(FAMILY) | None, Some("ar") | None) => {}
            (family, variant) => {
                return Err(error(format!(
                    "is of model family {}, variant {}; bbt trains {FAMILY}, variant ar",
                    family.unwrap_or("unknown"),
                    variant.unwrap_or("unknown")
                )));
            }
        }
        let weights =
            value.get("model").and_then(named_tensors).ok_or_else(|| error("`model` is not a state_dict".into()))?;
        let ours = value.get("bbt");
        let config = match ours.and_then(|o| o.get("config")).and_then(Value::as_str) {
            Some(yaml) => {
                Some(Config::from_yaml(yaml).map_err(|e| error(format!("its configuration cannot be read: {e}")))?)
            }
            None => None,
        };
        let (model, quant, steps) = match config {
            Some(config) => (config.model, config.quant, config.train.steps),
            None => {
                let (model, quant) = model_of_args(value.get("args")).map_err(error)?;
                (model, quant, 0)
            }
        };
        model.validate().map_err(|e| error(format!("its model is none that bbt can build: {e}")))?;
        let progress: Option<Progress> = match ours.and_then(|o| o.get("progress")).and_then(Value::as_str) {
            Some(json) => {
                Some(serde_json::from_str(json).map_err(|e| error(format!("its progress cannot be read: {e}")))?)
            }
            None => None,
        };
        let optimizer = value.get("opt").filter(|opt| !opt.is_none()).cloned();
        // `step` is the last step done, but a checkpoint saved before the first has step 0, too: then no
        // parameter has optimizer state.
        let step = value.get("step").and_then(Value::as_i64).unwrap_or(0).max(0) as u64;
        let untouched = optimizer.as_ref().and_then(|o| o.get("state")).is_some_and(|s| s.entries().is_empty());
        Ok(Self {
            path: path.into(),
            model,
            quant,
            // Weights alone, of no run, count as a finished one's.
            lambda: progress.as_ref().map_or(1.0, |progress| quant.lambda(progress.completed, steps)),
            weights,
            optimizer,
            scaler: value.get("scaler").and_then(scaler_state),
            completed: if untouched { step } else { step.saturating_add(1) },
            progress,
        })
    }

    fn from_safetensors(path: &Path) -> Result<Self, CheckpointError> {
        let error = |message: String| CheckpointError::Content { path: path.into(), message };
        let (tensors, metadata) = safetensors_file::read(path)?;
        let yaml = metadata.get("bbt").ok_or_else(|| {
            error("says nothing of its model's shape (metadata key `bbt`): write it with `bbt convert`".into())
        })?;
        let config = Config::from_yaml(yaml).map_err(|e| error(format!("its configuration cannot be read: {e}")))?;
        config.model.validate().map_err(|e| error(format!("its model is none that bbt can build: {e}")))?;
        Ok(Self {
            path: path.into(),
            model: config.model,
            quant: config.quant,
            lambda: 1.0,
            weights: tensors,
            optimizer: None,
            scaler: None,
            completed: 0,
            progress: None,
        })
    }

    /// Sees that the weights are exactly those that the model has.
    fn check_weights(&self) -> Result<(), CheckpointError> {
        let names = parameter_names(&self.model);
        let mut missing: Vec<&str> =
            names.iter().filter(|n| !self.weights.contains_key(*n)).map(String::as_str).collect();
        let mut unexpected: Vec<&str> =
            self.weights.keys().map(String::as_str).filter(|n| *n != HEAD && !names.iter().any(|m| m == n)).collect();
        missing.sort_unstable();
        unexpected.sort_unstable();
        if !missing.is_empty() || !unexpected.is_empty() {
            let list = |what: &str, names: &[&str]| match names {
                [] => String::new(),
                [first, rest @ ..] => format!(
                    "; {what} {first}{}",
                    if rest.is_empty() { "".into() } else { format!(" and {} more", rest.len()) }
                ),
            };
            return Err(self.error(format!(
                "its weights are not those of its model{}{}",
                list("missing", &missing),
                list("unexpected", &unexpected)
            )));
        }
        if let (Some(head), Some(embedding)) = (self.weights.get(HEAD), self.weights.get(EMBEDDING)) {
            let tied = Arc::ptr_eq(&head.storage, &embedding.storage)
                || (head.shape == embedding.shape && head.contiguous_bytes() == embedding.contiguous_bytes());
            if !tied {
                return Err(self.error(format!("{HEAD} differs from {EMBEDDING}, but BitByteLM ties them")));
            }
        }
        for (name, shape) in names.iter().zip(parameter_shapes(&self.model)) {
            let found = &self.weights[name].shape;
            if found.iter().map(|&n| n as i64).ne(shape.iter().copied()) {
                return Err(self.error(format!("{name} has shape {found:?}, but its model's is {shape:?}")));
            }
        }
        Ok(())
    }

    fn error(&self, message: String) -> CheckpointError {
        CheckpointError::Content { path: self.path.clone(), message }
    }

    /// The weights by PyTorch's names, as they are in the file.
    pub fn weights(&self) -> &BTreeMap<String, TensorData> {
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
        self.progress.clone().unwrap_or(Progress { completed: self.completed, ..Progress::default() })
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
            if data.dtype() != Dtype::F32 {
                return Err(self.error(format!(
                    "{name} is {:?}, but bbt trains fp32: `bbt convert IN OUT --dtype fp32` makes it so",
                    data.dtype()
                )));
            }
            variable.copy_(&self.tensor(&name, data, &size)?);
        }
        Ok(())
    }

    /// Whose state the checkpoint holds; `torch.optim.AdamW`'s where it is not seen to be bitsandbytes'.
    fn optimizer_name(&self) -> OptimizerName {
        let state = self.optimizer.as_ref().and_then(|opt| opt.get("state")).map(Value::entries).unwrap_or_default();
        let bitsandbytes = |entry: &Value| entry.get(QUANT_STATE).or(entry.get("state1")).is_some();
        match state.iter().any(|(_, entry)| bitsandbytes(entry)) {
            true => OptimizerName::AdamW8bit,
            false => OptimizerName::AdamW,
        }
    }

    /// Copies the optimizer's state to `optimizer`, one per parameter in PyTorch's order.
    ///
    /// # Errors
    /// No state in it, that of another optimizer, or of other parameters.
    pub fn load_optimizer(&self, optimizer: &mut OptimizerState) -> Result<(), CheckpointError> {
        let Some(opt) = &self.optimizer else {
            return Err(self.error(format!("has no optimizer state (`opt`): {WITHOUT_STATE}")));
        };
        let state = opt.get("state").map(Value::entries).unwrap_or_default();
        if state.is_empty() && self.completed == 0 {
            return Ok(());
        }
        let numbers: Vec<i64> = opt
            .get("param_groups")
            .map(Value::elements)
            .unwrap_or_default()
            .iter()
            .flat_map(|group| group.get("params").map(Value::elements).unwrap_or_default())
            .filter_map(Value::as_i64)
            .collect();
        if numbers.len() != optimizer.len() {
            let (has, needs) = (numbers.len(), optimizer.len());
            return Err(
                self.error(format!("its optimizer has {has} parameters, but the model has {needs}: {WITHOUT_STATE}"))
            );
        }
        if self.optimizer_name() != optimizer.name() {
            let (has, wants, other) = match optimizer.name() {
                OptimizerName::AdamW => ("bitsandbytes' AdamW8bit", "AdamW", "adamw8bit"),
                OptimizerName::AdamW8bit => ("AdamW", "AdamW8bit", "adamw"),
            };
            return Err(self.error(format!(
                "its optimizer is {has}, not {wants}: go on with --set optim.name={other}, or make it {wants}'s with \
                 `bbt convert IN OUT --optim {}`; or {WITHOUT_STATE}",
                wants.to_lowercase()
            )));
        }
        let names = parameter_names(&self.model);
        let by_number: HashMap<i64, &Value> = state.iter().filter_map(|(k, v)| Some((k.as_i64()?, v))).collect();
        let entries = numbers.iter().zip(&names).map(|(number, name)| {
            let entry = by_number.get(number).ok_or_else(|| {
                self.error(format!("its optimizer has no state for parameter {number} ({name}): {WITHOUT_STATE}"))
            })?;
            Ok::<_, CheckpointError>((name, *entry))
        });
        let _no_grad = tch::no_grad_guard();
        match optimizer {
            OptimizerState::AdamW(state) => {
                for (to, entry) in state.iter_mut().zip(entries) {
                    let (name, entry) = entry?;
                    self.copy_field(&mut to.step, entry, "step", name)?;
                    self.copy_field(&mut to.exp_avg, entry, "exp_avg", name)?;
                    self.copy_field(&mut to.exp_avg_sq, entry, "exp_avg_sq", name)?;
                }
            }
            OptimizerState::AdamW8bit(state) => {
                let mut qmaps = state.qmaps().map(Tensor::copy);
                for (to, entry) in state.params.iter_mut().zip(entries) {
                    let (name, entry) = entry?;
                    self.copy_adamw8bit(to, entry, &mut qmaps, name)?;
                }
            }
        }
        Ok(())
    }

    /// Of the parameter `name`.
    fn copy_adamw8bit(
        &self,
        to: &mut AdamW8bitState,
        entry: &Value,
        qmaps: &mut [Tensor; 2],
        name: &str,
    ) -> Result<(), CheckpointError> {
        let step = entry
            .get("step")
            .and_then(Value::as_i64)
            .ok_or_else(|| self.error(format!("its optimizer has no step for {name}: {WITHOUT_STATE}")))?;
        let _ = to.step.fill_(step as f64);
        // Before 0.49 bitsandbytes put all side by side.
        let kept = entry.get(QUANT_STATE).unwrap_or(entry);
        match &mut to.moments {
            Moments::Full(moments) => {
                for (moment, key) in moments.iter_mut().zip(["state1", "state2"]) {
                    self.copy_field(moment, kept, key, name)?;
                }
            }
            Moments::Quantized(moments) => {
                let keys = [["state1", "absmax1", "qmap1"], ["state2", "absmax2", "qmap2"]];
                for ((moment, qmap), [codes, absmax, map]) in moments.iter_mut().zip(qmaps).zip(keys) {
                    self.copy_field(&mut moment.codes, kept, codes, name)?;
                    self.copy_field(&mut moment.absmax, kept, absmax, name)?;
                    let ours = qmap.copy();
                    self.copy_field(qmap, kept, map, name)?;
                    // A CPU without fused multiply-add makes other last bits of it.
                    if !qmap.allclose(&ours, 1e-6, 0.0, false) {
                        return Err(self.error(format!(
                            "its optimizer's {map} of {name} is not bitsandbytes' dynamic map: {WITHOUT_STATE}"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies a field of the optimizer's state of parameter `name`.
    fn copy_field(&self, to: &mut Tensor, entry: &Value, key: &str, name: &str) -> Result<(), CheckpointError> {
        let (dtype, words) = if to.kind() == Kind::Uint8 { (Dtype::U8, "uint8") } else { (Dtype::F32, "fp32") };
        let data = match entry.get(key) {
            Some(Value::Tensor(data)) if data.dtype() == dtype => data,
            Some(Value::Tensor(_)) => {
                return Err(self.error(format!("its optimizer's {key} of {name} is not {words}: {WITHOUT_STATE}")));
            }
            _ => {
                return Err(
                    self.error(format!("its optimizer has no {key} for {name}, so it is no AdamW: {WITHOUT_STATE}"))
                );
            }
        };
        to.copy_(&self.tensor(&format!("{key} of {name}"), data, &to.size())?);
        Ok(())
    }

    /// What the optimizer's first group of parameters says of `key`.
    fn group(&self, key: &str) -> Option<&Value> {
        self.optimizer.as_ref()?.get("param_groups")?.elements().first()?.get(key)
    }

    /// The checkpoint's `opt` with its moments as `name` keeps them.
    ///
    /// # Errors
    /// As [`TrainingCheckpoint::load_optimizer`]; a group without its numbers.
    pub(super) fn converted_optimizer(&self, name: OptimizerName) -> Result<Value, CheckpointError> {
        let mut state = OptimizerState::zeros(self.optimizer_name(), &parameter_shapes(&self.model), Device::Cpu);
        self.load_optimizer(&mut state)?;
        let betas = self.group("betas").map(Value::elements).unwrap_or_default();
        let number = |value: Option<&Value>, key: &str| {
            value.and_then(Value::as_f64).ok_or_else(|| self.error(format!("its optimizer has no number `{key}`")))
        };
        let group = Group {
            lr: number(self.group("lr"), "lr")?,
            betas: (number(betas.first(), "betas")?, number(betas.get(1), "betas")?),
            eps: number(self.group("eps"), "eps")?,
            weight_decay: number(self.group("weight_decay"), "weight_decay")?,
        };
        Ok(optimizer_value(&state.converted(name), self.completed > 0, group))
    }

    /// A CPU tensor with a copy of `data`, which must have shape `size`.
    fn tensor(&self, name: &str, data: &TensorData, size: &[i64]) -> Result<Tensor, CheckpointError> {
        if data.shape.iter().map(|&n| n as i64).ne(size.iter().copied()) {
            return Err(self.error(format!("{name} has shape {:?}, but {size:?} is needed", data.shape)));
        }
        to_tensor(data).map_err(|e| self.error(format!("{name}: {e}")))
    }
}

/// The model of the checkpoint at `path` with its parameters on `device`, quantized as far as its run was.
///
/// # Errors
/// As [`TrainingCheckpoint::open`].
pub fn load_model(path: &Path, device: Device) -> Result<(nn::VarStore, BitByteLM), CheckpointError> {
    let checkpoint = TrainingCheckpoint::open(path)?;
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
    // The store, which holds the trained weights, is gone before any is quantized.
    let mut model = load_model(path, device)?.1;
    model.freeze();
    Ok(model)
}

/// A checkpoint of weights alone, from which a run can start (`--init`).
pub(super) fn model_checkpoint(config: &Config, mut weights: BTreeMap<String, TensorData>) -> Value {
    let names = parameter_names(&config.model).into_iter();
    let weights = names.filter_map(|name| weights.remove(&name).map(|data| (name, data)));
    dict([
        ("step", Value::Int(0)),
        ("variant", str("ar")),
        ("model_family", str(FAMILY)),
        ("model", state_dict(&config.model, weights.collect())),
        ("args", args(config)),
        ("bbt", dict([("version", Value::Int(1)), ("config", str(&config.to_yaml()))])),
    ])
}

/// The names of the parameters in PyTorch's order.
pub(crate) fn parameter_names(model: &ModelConfig) -> Vec<String> {
    parameters(model).into_iter().map(|(name, _)| name).collect()
}

fn parameter_shapes(model: &ModelConfig) -> Vec<Vec<i64>> {
    parameters(model).into_iter().map(|(_, shape)| shape).collect()
}

/// Names and shapes of the parameters in PyTorch's order.
fn parameters(model: &ModelConfig) -> Vec<(String, Vec<i64>)> {
    let (d, f, kv) = (model.d_model, model.d_ff, model.kv_heads() * model.head_dim());
    let mut all = vec![(EMBEDDING.to_string(), vec![VOCAB_SIZE, d])];
    for i in 0..model.n_layer {
        let layer = [
            ("n1", vec![d]),
            ("attn.q_proj", vec![d, d]),
            ("attn.k_proj", vec![kv, d]),
            ("attn.v_proj", vec![kv, d]),
            ("attn.o_proj", vec![d, d]),
            ("n2", vec![d]),
            ("mlp.gate_up", vec![2 * f, d]),
            ("mlp.down", vec![d, f]),
        ];
        all.extend(layer.map(|(name, shape)| (format!("blocks.{i}.{name}.weight"), shape)));
    }
    all.push(("norm_f.weight".into(), vec![d]));
    all
}

/// The OrderedDict that `module.state_dict()` returns, with the versions of the original's modules.
fn state_dict(model: &ModelConfig, weights: Vec<(String, TensorData)>) -> Value {
    let mut items: Vec<(Value, Value)> = weights.into_iter().map(|(n, t)| (str(&n), Value::Tensor(t))).collect();
    if let Some((_, embedding)) = items.first().cloned() {
        items.push((str(HEAD), embedding));
    }
    let mut modules: Vec<String> = ["", "tok_emb", "blocks"].map(String::from).into();
    for i in 0..model.n_layer {
        let parts = [
            "",
            ".n1",
            ".attn",
            ".attn.q_proj",
            ".attn.k_proj",
            ".attn.v_proj",
            ".attn.o_proj",
            ".attn.rope",
            ".n2",
            ".mlp",
            ".mlp.gate_up",
            ".mlp.down",
            ".mlp.act",
        ];
        modules.extend(parts.map(|part| format!("blocks.{i}{part}")));
    }
    modules.extend(["norm_f", "lm_head"].map(String::from));
    let metadata = modules.iter().map(|m| (str(m), dict([("version", Value::Int(1))]))).collect();
    Value::OrderedDict {
        items,
        attributes: vec![("_metadata".into(), Value::OrderedDict { items: metadata, attributes: vec![] })],
    }
}

/// The original's command-line arguments, from our configuration.
fn args(config: &Config) -> Value {
    let (model, data, optim, train) = (&config.model, &config.data, &config.optim, &config.train);
    let optional = |value: Option<i64>| value.map_or(Value::None, Value::Int);
    let longest = data.max_seq_len();
    let cap = (data.curriculum.is_some() && longest < UNCAPPED).then_some(longest);
    dict([
        ("n_layer", Value::Int(model.n_layer)),
        ("d_model", Value::Int(model.d_model)),
        ("n_head", Value::Int(model.n_head)),
        ("n_kv_head", optional(model.n_kv_head)),
        ("d_ff", Value::Int(model.d_ff)),
        ("data", str(&data.train)),
        ("out", str(&train.out.to_string_lossy())),
        ("steps", int(train.steps)),
        ("lr", Value::Float(optim.lr)),
        ("wd", Value::Float(optim.weight_decay)),
        ("warmup_frac", Value::Float(optim.warmup_frac)),
        ("warmup_steps", optim.warmup_steps.map_or(Value::None, int)),
        (
            "lr_schedule",
            str(match optim.schedule {
                Schedule::Cosine => "cosine",
                Schedule::Constant => "constant",
                // None of the original's.
                Schedule::Wsd => "wsd",
                Schedule::TwoStage => "two_stage",
            }),
        ),
        ("lr_min_factor", Value::Float(optim.min_lr_factor)),
        ("grad_clip", Value::Float(optim.grad_clip)),
        ("batch_size", Value::Int(train.batch_size)),
        ("grad_accum", Value::Int(train.grad_accum)),
        ("seq_len", if data.curriculum.is_some() { Value::None } else { Value::Int(longest) }),
        ("seq_len_cap", optional(cap)),
        ("resume", Value::None),
        ("no_opt_state", Value::Bool(false)),
        ("ddp", Value::Bool(false)),
        ("use_sdpa", Value::Bool(model.attention != Attention::Math)),
        ("no_ckpt", Value::Bool(!train.checkpointing)),
        ("no_act_quant", Value::Bool(config.quant.act == ActQuant::None)),
        ("log_every", int(train.log_every)),
        ("save_every", int(train.save_every)),
        ("allow_overwrite", Value::Bool(false)),
        ("model_family", str(FAMILY)),
    ])
}

/// The model that the original's arguments describe.
fn model_of_args(args: Option<&Value>) -> Result<(ModelConfig, QuantConfig), String> {
    let args = args.ok_or("has no `args`, which say the model's shape")?;
    let number = |key: &str| {
        args.get(key)
            .and_then(Value::as_i64)
            .ok_or_else(|| format!("its `args` have no number `{key}`, part of the model's shape"))
    };
    let sdpa = args.get("use_sdpa").and_then(Value::as_bool).unwrap_or(true);
    let model = ModelConfig {
        n_layer: number("n_layer")?,
        d_model: number("d_model")?,
        n_head: number("n_head")?,
        n_kv_head: args.get("n_kv_head").and_then(Value::as_i64),
        d_ff: number("d_ff")?,
        attention: if sdpa { Attention::Sdpa } else { Attention::Math },
        ..ModelConfig::default()
    };
    let full_precision = args.get("no_act_quant").and_then(Value::as_bool).unwrap_or(false);
    let act = if full_precision { ActQuant::None } else { ActQuant::Int8 };
    // Its arithmetic, to the last code; training goes on with what the run's configuration says.
    Ok((model, QuantConfig { act, kernel: QuantKernel::Reference, ..QuantConfig::default() }))
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
fn scaler_state(value: &Value) -> Option<ScalerState> {
    Some(ScalerState {
        scale: value.get("scale")?.as_f64()?,
        growth_factor: value.get("growth_factor")?.as_f64()?,
        backoff_factor: value.get("backoff_factor")?.as_f64()?,
        growth_interval: value.get("growth_interval")?.as_i64()?,
        growth_tracker: value.get("_growth_tracker")?.as_i64()?,
    })
}

/// The entries of a state_dict whose values are tensors; none where one is not.
fn named_tensors(value: &Value) -> Option<BTreeMap<String, TensorData>> {
    let entries = value.entries().iter().map(|(name, value)| match value {
        Value::Tensor(data) => Some((name.as_str()?.to_string(), data.clone())),
        _ => None,
    });
    entries.collect()
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

fn dict<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Dict(entries.into_iter().map(|(key, value)| (str(key), value)).collect())
}

fn str(text: &str) -> Value {
    Value::Str(text.into())
}

fn int(value: u64) -> Value {
    Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
}
