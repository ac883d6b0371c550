//! The key `opt` of a training checkpoint: the state_dict of `torch.optim.AdamW` or of bitsandbytes' `AdamW8bit`.
//!
//! PyTorch numbers parameters through its groups: group 0 holds 0, 1, 2, …, and the next group goes on from there. bbt
//! writes one group of all parameters in PyTorch's order.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::training_checkpoint::{TrainingCheckpoint, dict, str};
use super::{CheckpointError, Dtype, Value, state_dict, tensor_data, to_tensor};
use crate::config::OptimizerName;
use crate::utils::optim::{AdamW8bit, AdamW8bitState, AdamWState, Moments, OptimizerState};

/// Where bitsandbytes puts what it keeps of a parameter, but for the step.
const QUANT_STATE: &str = "__bnb_optimizer_quant_state__";
/// What to do without the optimizer's state.
pub(super) const WITHOUT_STATE: &str = "use --no-opt-state to start with fresh moments, or --init to start at step 0";

/// The hyperparameters of an optimizer's one group of parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub lr: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
}

/// The `state_dict()` of the optimizer that `state` is of; without the state of parameters unless `stepped`.
pub(super) fn optimizer_value(state: &OptimizerState, stepped: bool, group: Group) -> Value {
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

impl TrainingCheckpoint {
    /// Whose state the checkpoint holds; none where there is none of any parameter.
    pub fn optimizer_name(&self) -> Option<OptimizerName> {
        let state = self.optimizer().and_then(|opt| opt.get("state")).map(Value::entries).unwrap_or_default();
        let bitsandbytes = |entry: &Value| entry.get(QUANT_STATE).or(entry.get("state1")).is_some();
        match state {
            [] => None,
            _ if state.iter().any(|(_, entry)| bitsandbytes(entry)) => Some(OptimizerName::AdamW8bit),
            _ => Some(OptimizerName::AdamW),
        }
    }

    /// Copies the optimizer's state to `optimizer`, one per parameter in PyTorch's order.
    ///
    /// # Errors
    /// No state in it, that of another optimizer, or of other parameters; groups of parameters that cannot be told
    /// apart; a rule that bbt's optimizers do not have (amsgrad, maximize, coupled weight decay).
    pub fn load_optimizer(&self, optimizer: &mut OptimizerState) -> Result<(), CheckpointError> {
        let Some(opt) = self.optimizer() else {
            return Err(self.error(format!("has no optimizer state (`opt`): {WITHOUT_STATE}")));
        };
        let no_dict = |key: &str| self.error(format!("its `{key}` is missing or no dict: {WITHOUT_STATE}"));
        let state = match opt.get("state") {
            Some(Value::Dict(entries) | Value::OrderedDict { items: entries, .. }) => entries,
            _ => return Err(no_dict("opt.state")),
        };
        if state.is_empty() && self.completed() == 0 {
            return Ok(());
        }
        let groups = self.groups()?;
        let counted: usize = groups.iter().map(|group| group.params.len()).sum();
        if counted != optimizer.len() {
            let needs = optimizer.len();
            return Err(self
                .error(format!("its optimizer has {counted} parameters, but the model has {needs}: {WITHOUT_STATE}")));
        }
        let name = self.optimizer_name().unwrap_or(OptimizerName::AdamW);
        if name != optimizer.name() {
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
        let by_number = state.iter().map(|(key, entry)| match key.whole_number() {
            Some(number) => Ok((number, entry)),
            None => Err(self.error(format!(
                "a key of its `opt.state` is of type {}, not the number of a parameter: {WITHOUT_STATE}",
                key.type_name()
            ))),
        });
        let by_number = by_number.collect::<Result<HashMap<_, _>, _>>()?;
        self.check_rule(&groups, state)?;
        let names = state_dict::parameter_names(self.model_config());
        let numbers = self.in_order(&groups, &by_number)?;
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
                    self.copy_step(&mut to.step, entry, name)?;
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

    /// The groups of parameters of its optimizer.
    pub(super) fn groups(&self) -> Result<Vec<ParamGroup<'_>>, CheckpointError> {
        let Some(Value::List(groups)) = self.optimizer().and_then(|opt| opt.get("param_groups")) else {
            return Err(self.error(format!("its `opt.param_groups` is missing or no list: {WITHOUT_STATE}")));
        };
        let group = |(index, value)| {
            let key = format!("opt.param_groups[{index}]");
            let params = match Value::get(value, "params") {
                Some(Value::List(params)) => params.iter().map(Value::whole_number).collect::<Option<Vec<_>>>(),
                _ => None,
            };
            let params = params.ok_or_else(|| {
                self.error(format!("its `{key}.params` is missing or no list of numbers: {WITHOUT_STATE}"))
            })?;
            Ok(ParamGroup { key, value, params })
        };
        groups.iter().enumerate().map(group).collect()
    }

    /// Refuses the optimizers whose state looks like AdamW's, but that step by another rule.
    fn check_rule(&self, groups: &[ParamGroup], state: &[(Value, Value)]) -> Result<(), CheckpointError> {
        let refused = |what: &str| Err(self.error(format!("its optimizer has {what}: {WITHOUT_STATE}")));
        if state.iter().any(|(_, entry)| entry.get("max_exp_avg_sq").is_some()) {
            return refused("a third moment (amsgrad), which bbt's have not");
        }
        for group in groups {
            for (key, usual, what) in [
                ("amsgrad", false, "amsgrad: True, which bbt's have not"),
                ("maximize", false, "maximize: True, but bbt minimizes the loss"),
                ("decoupled_weight_decay", true, "decoupled_weight_decay: False (Adam, not AdamW)"),
            ] {
                let is_usual = match group.value.get(key) {
                    None | Some(Value::None) => true,
                    Some(value) => match value.as_bool() {
                        Some(flag) => flag == usual || (usual && group.number("weight_decay") == Some(0.0)),
                        None => return refused(&format!("a `{key}` of type {}", value.type_name())),
                    },
                };
                if !is_usual {
                    return refused(what);
                }
            }
        }
        Ok(())
    }

    /// PyTorch's number of each parameter, in the order of the model's.
    ///
    /// Several groups share the parameters out, each keeping the model's order. Where the shapes allow one way only to
    /// deal them out, that is it: so where matrices decay and vectors do not.
    fn in_order(&self, groups: &[ParamGroup], state: &HashMap<i64, &Value>) -> Result<Vec<i64>, CheckpointError> {
        if let [group] = groups {
            return Ok(group.params.clone());
        }
        let shape = |number: &i64| {
            let entry = state.get(number)?;
            let moments = entry.get(QUANT_STATE).unwrap_or(entry);
            match moments.get("exp_avg").or(moments.get("state1")) {
                Some(Value::Tensor(tensor)) => Some(tensor.shape.iter().map(|&n| n as i64).collect::<Vec<_>>()),
                _ => None,
            }
        };
        let shapes: Vec<Vec<_>> = groups.iter().map(|group| group.params.iter().map(shape).collect()).collect();
        let ways = deal_out(&state_dict::parameter_shapes(self.model_config()), &shapes);
        match &ways[..] {
            [only] => {
                let mut left: Vec<_> = groups.iter().map(|group| group.params.iter()).collect();
                Ok(only.iter().filter_map(|&group| left[group].next().copied()).collect())
            }
            ways => Err(self.error(format!(
                "its optimizer has {} parameter groups, and the shapes of their moments {}: {WITHOUT_STATE}",
                groups.len(),
                if ways.is_empty() { "are not those of the model" } else { "do not tell which parameter is whose" },
            ))),
        }
    }

    /// Of the parameter `name`.
    fn copy_adamw8bit(
        &self,
        to: &mut AdamW8bitState,
        entry: &Value,
        qmaps: &mut [Tensor; 2],
        name: &str,
    ) -> Result<(), CheckpointError> {
        self.copy_step(&mut to.step, entry, name)?;
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
                    if !qmap.equal(&ours) {
                        return Err(self.error(format!(
                            "its optimizer's {map} of {name} is not bitsandbytes' dynamic map: {WITHOUT_STATE}"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies how many steps the optimizer has taken with parameter `name`: a tensor, or an int as before PyTorch 1.12
    /// and in bitsandbytes.
    fn copy_step(&self, to: &mut Tensor, entry: &Value, name: &str) -> Result<(), CheckpointError> {
        let step = match entry.get("step") {
            None => return Err(self.error(format!("its optimizer has no step for {name}: {WITHOUT_STATE}"))),
            Some(value) => value.whole_number().filter(|&step| step >= 0).ok_or_else(|| {
                self.error(format!("its optimizer's step of {name} is no count of steps: {WITHOUT_STATE}"))
            })?,
        };
        let _ = to.fill_(step as f64);
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
        let from = self.tensor(&format!("{key} of {name}"), data, &to.size())?;
        if dtype == Dtype::F32 && i64::try_from(from.isfinite().all()).unwrap_or(1) == 0 {
            return Err(self.error(format!("its optimizer's {key} of {name} is not finite: {WITHOUT_STATE}")));
        }
        to.copy_(&from);
        Ok(())
    }

    /// The checkpoint's `opt` with its moments as `name` keeps them.
    ///
    /// # Errors
    /// As [`TrainingCheckpoint::load_optimizer`]; a group without its numbers, or groups whose numbers differ, since
    /// one group is written.
    pub(super) fn converted_optimizer(&self, name: OptimizerName) -> Result<Value, CheckpointError> {
        let has = self.optimizer_name().unwrap_or(OptimizerName::AdamW);
        let shapes = state_dict::parameter_shapes(self.model_config());
        let mut state = OptimizerState::zeros(has, &shapes, Device::Cpu);
        self.load_optimizer(&mut state)?;
        let groups = self.groups()?;
        let Some((first, others)) = groups.split_first() else {
            return Err(self.error("its optimizer has no parameter group".into()));
        };
        let numbers = first
            .numbers()
            .map_err(|key| self.error(format!("its optimizer has no number `{key}` (in `{}`)", first.key)))?;
        if others.iter().any(|group| group.numbers().ok() != Some(numbers)) {
            return Err(self.error(
                "its optimizer's parameter groups differ in lr, betas, eps or weight_decay, and --optim writes one \
                 group: train on from it for a step first, with optim.decay as it had, and convert that checkpoint"
                    .into(),
            ));
        }
        let [lr, beta1, beta2, eps, weight_decay] = numbers;
        let group = Group { lr, betas: (beta1, beta2), eps, weight_decay };
        Ok(optimizer_value(&state.converted(name), self.completed() > 0, group))
    }

    /// A CPU tensor with a copy of `data`, which must have shape `size`.
    pub(super) fn tensor(&self, name: &str, data: &super::TensorData, size: &[i64]) -> Result<Tensor, CheckpointError> {
        if data.shape.iter().map(|&n| n as i64).ne(size.iter().copied()) {
            return Err(self.error(format!("{name} has shape {:?}, but {size:?} is needed", data.shape)));
        }
        to_tensor(data).map_err(|e| self.error(format!("{name}: {e}")))
    }
}

/// One of `param_groups`.
pub(super) struct ParamGroup<'a> {
    /// Where it stands, for messages.
    key: String,
    value: &'a Value,
    /// PyTorch's numbers of its parameters.
    params: Vec<i64>,
}

impl ParamGroup<'_> {
    /// Its number `key`, which may be a tensor.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.value.get(key)?.number()
    }

    /// lr, both betas, eps and weight_decay; the key that is none.
    pub fn numbers(&self) -> Result<[f64; 5], &'static str> {
        let betas = self.value.get("betas").map(Value::elements).unwrap_or_default();
        let beta = |index: usize| betas.get(index).and_then(Value::number).ok_or("betas");
        let number = |key: &'static str| self.number(key).ok_or(key);
        Ok([number("lr")?, beta(0)?, beta(1)?, number("eps")?, number("weight_decay")?])
    }
}

/// The ways to deal out `parameters` (by shape, in the model's order) to groups of known shapes, each group keeping the
/// order: for each parameter the group it falls to. Two ways at most are returned, which is already one too many.
fn deal_out(parameters: &[Vec<i64>], groups: &[Vec<Option<Vec<i64>>>]) -> Vec<Vec<usize>> {
    /// More states than this are no longer looked through: such groups are far from telling.
    const MOST: usize = 256;
    // How many of each group are dealt out, and the first two ways to come there.
    let mut states: HashMap<Vec<usize>, Vec<Vec<usize>>> = HashMap::from([(vec![0; groups.len()], vec![vec![]])]);
    for shape in parameters {
        let mut next: HashMap<Vec<usize>, Vec<Vec<usize>>> = HashMap::new();
        for (taken, ways) in &states {
            for (group, shapes) in groups.iter().enumerate() {
                if shapes.get(taken[group]).is_none_or(|of_next| of_next.as_ref() != Some(shape)) {
                    continue;
                }
                let mut taken = taken.clone();
                taken[group] += 1;
                let there = next.entry(taken).or_default();
                for way in ways {
                    if there.len() < 2 {
                        there.push(way.iter().copied().chain([group]).collect());
                    }
                }
            }
        }
        if next.len() > MOST {
            return vec![vec![]; 2];
        }
        states = next;
    }
    states.into_values().flatten().take(2).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_dealt_out_where_there_is_one_way() {
        let [matrix, vector, embedding] = [vec![4, 4], vec![4], vec![256, 4]];
        let all = [&embedding, &vector, &matrix, &matrix, &vector].map(Clone::clone);
        let group = |shapes: &[&Vec<i64>]| shapes.iter().map(|&shape| Some(shape.clone())).collect::<Vec<_>>();
        let (decays, rest) = (group(&[&embedding, &matrix, &matrix]), group(&[&vector, &vector]));
        assert_eq!(deal_out(&all, &[decays.clone(), rest.clone()]), [[0, 1, 0, 0, 1]]);
        assert_eq!(deal_out(&all, &[rest.clone(), decays]), [[1, 0, 1, 1, 0]]);
        let three = [group(&[&embedding]), group(&[&matrix, &matrix]), rest.clone()];
        assert_eq!(deal_out(&all, &three), [[0, 2, 1, 1, 2]]);
        // Each of two groups could hold the first of two equal matrices.
        assert_eq!(deal_out(&all, &[group(&[&embedding, &matrix]), group(&[&matrix]), rest]).len(), 2);
        assert!(deal_out(&all, &[group(&[&embedding]), group(&[&vector; 4])]).is_empty());
    }
}
