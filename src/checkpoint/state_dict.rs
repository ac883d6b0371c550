//! The parameters of BitByteLM by PyTorch's names: which there are, the state_dict that they are saved as, and what
//! a state_dict alone tells of its model.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{TensorData, Value};
use crate::config::{ModelConfig, VOCAB_SIZE};

/// The embedding.
pub(super) const EMBEDDING: &str = "tok_emb.weight";
/// The output head, tied to it.
pub(super) const HEAD: &str = "lm_head.weight";

/// What wrappers put before every name: DistributedDataParallel and torch.compile.
const PREFIXES: [&str; 2] = ["module.", "_orig_mod."];

/// Tensors by name.
pub(super) type Weights = BTreeMap<String, TensorData>;

/// The names of the parameters in PyTorch's order.
pub(crate) fn parameter_names(model: &ModelConfig) -> Vec<String> {
    parameters(model).into_iter().map(|(name, _)| name).collect()
}

/// Their shapes, in the same order.
pub(super) fn parameter_shapes(model: &ModelConfig) -> Vec<Vec<i64>> {
    parameters(model).into_iter().map(|(_, shape)| shape).collect()
}

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
pub(super) fn state_dict(model: &ModelConfig, weights: Vec<(String, TensorData)>) -> Value {
    let str = |text: &str| Value::Str(text.into());
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
    let version = || Value::Dict(vec![(str("version"), Value::Int(1))]);
    let metadata = modules.iter().map(|m| (str(m), version())).collect();
    Value::OrderedDict {
        items,
        attributes: vec![("_metadata".into(), Value::OrderedDict { items: metadata, attributes: vec![] })],
    }
}

/// Whether `value` looks like a state_dict: a dict with nothing but tensors in it.
pub(super) fn is_state_dict(value: &Value) -> bool {
    let entries = value.entries();
    !entries.is_empty() && entries.iter().all(|(name, x)| name.as_str().is_some() && matches!(x, Value::Tensor(_)))
}

/// The tensors of the state_dict `value`, which the file has under `key`, without a wrapper's prefix.
pub(super) fn weights_of(value: &Value, key: &str) -> Result<Weights, String> {
    if !matches!(value, Value::Dict(_) | Value::OrderedDict { .. }) {
        return Err(format!("`{key}` is not a state_dict but of type {}", value.type_name()));
    }
    let tensor = |(name, value): &(Value, Value)| match (name, value) {
        (Value::Str(name), Value::Tensor(tensor)) => Ok((name.clone(), tensor.clone())),
        (Value::Str(name), other) => {
            Err(format!("`{key}` is not a state_dict: {name} is no tensor but of type {}", other.type_name()))
        }
        (name, _) => Err(format!("`{key}` is not a state_dict: a name in it is of type {}", name.type_name())),
    };
    Ok(without_prefix(value.entries().iter().map(tensor).collect::<Result<_, _>>()?))
}

/// `weights` with the prefix taken off that all names share.
pub(super) fn without_prefix(weights: Weights) -> Weights {
    let names: Vec<&str> = weights.keys().map(String::as_str).collect();
    match prefix_len(&names) {
        0 => weights,
        length => weights.into_iter().map(|(name, tensor)| (name[length..].to_string(), tensor)).collect(),
    }
}

/// How many bytes of wrappers' prefixes stand before every one of `names`.
pub(super) fn prefix_len(names: &[&str]) -> usize {
    let mut length = 0;
    let shared = |length: usize, prefix: &&&str| names.iter().all(|name| name[length..].starts_with(**prefix));
    while !names.is_empty()
        && let Some(prefix) = PREFIXES.iter().find(|prefix| shared(length, prefix))
    {
        length += prefix.len();
    }
    length
}

/// The shape of a BitByteLM as its weights tell it: all but the number of heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightsShape {
    /// Number of blocks.
    pub n_layer: i64,
    /// Width of the residual stream.
    pub d_model: i64,
    /// Width of all keys of a token, and of all values.
    pub kv_width: i64,
    /// Width of the SwiGLU hidden layer.
    pub d_ff: i64,
}

impl WeightsShape {
    /// Reads it from the shapes of `weights`.
    pub(super) fn of(weights: &Weights) -> Result<Self, String> {
        let matrix = |name: &str| match weights.get(name).map(|tensor| &tensor.shape[..]) {
            Some(&[rows, columns]) => Ok([rows as i64, columns as i64]),
            Some(shape) => Err(format!("{name} has shape {shape:?}, but a BitByteLM's is a matrix")),
            None => Err(format!("its tensors are not those of a BitByteLM: it has no {name}")),
        };
        let [vocabulary, d_model] = matrix(EMBEDDING)?;
        if vocabulary != VOCAB_SIZE {
            return Err(format!("{EMBEDDING} has {vocabulary} rows, but bbt's models have {VOCAB_SIZE}, one a byte"));
        }
        let layer = |name: &str| name.strip_prefix("blocks.")?.split('.').next()?.parse::<i64>().ok();
        let n_layer = weights.keys().filter_map(|name| layer(name)).max().map_or(0, |last| last.saturating_add(1));
        let [kv_width, _] = matrix("blocks.0.attn.k_proj.weight")?;
        let [_, d_ff] = matrix("blocks.0.mlp.down.weight")?;
        Ok(Self { n_layer, d_model, kv_width, d_ff })
    }

    /// The model of that shape with `n_head` heads.
    pub(super) fn model(self, n_head: i64) -> Result<ModelConfig, String> {
        let Self { n_layer, d_model, kv_width, d_ff } = self;
        if n_head < 1 || d_model % n_head != 0 {
            return Err(format!("{n_head} heads do not divide its width {d_model}: give another --n_head"));
        }
        let head_dim = d_model / n_head;
        if head_dim == 0 || kv_width % head_dim != 0 {
            return Err(format!(
                "its keys are {kv_width} wide, which {n_head} heads of width {head_dim} do not divide: give another --n_head"
            ));
        }
        let kv_heads = kv_width / head_dim;
        let n_kv_head = (kv_heads != n_head).then_some(kv_heads);
        Ok(ModelConfig { n_layer, d_model, n_head, n_kv_head, d_ff, ..ModelConfig::default() })
    }
}

/// Sees that `weights` are exactly those of `model`, in names and shapes, and that the head is the embedding.
pub(super) fn check(weights: &Weights, model: &ModelConfig) -> Result<(), String> {
    // Before names are made for that many layers.
    if model.n_layer > weights.len() as i64 {
        let (layers, tensors) = (model.n_layer, weights.len());
        return Err(format!("its model has {layers} layers (model.n_layer), but there are only {tensors} tensors"));
    }
    let names = parameter_names(model);
    let mut missing: Vec<&str> = names.iter().filter(|n| !weights.contains_key(*n)).map(String::as_str).collect();
    let mut unexpected: Vec<&str> =
        weights.keys().map(String::as_str).filter(|n| *n != HEAD && !names.iter().any(|m| m == n)).collect();
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
        return Err(format!(
            "its weights are not those of its model{}{}",
            list("missing", &missing),
            list("unexpected", &unexpected)
        ));
    }
    if let (Some(head), Some(embedding)) = (weights.get(HEAD), weights.get(EMBEDDING)) {
        let tied = Arc::ptr_eq(&head.storage, &embedding.storage)
            || (head.shape == embedding.shape && head.contiguous_bytes() == embedding.contiguous_bytes());
        if !tied {
            return Err(format!("{HEAD} differs from {EMBEDDING}, but BitByteLM ties them"));
        }
    }
    for (name, shape) in names.iter().zip(parameter_shapes(model)) {
        let found = &weights[name].shape;
        if found.iter().map(|&n| n as i64).ne(shape.iter().copied()) {
            return Err(format!("{name} has shape {found:?}, but its model's is {shape:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_prefixes_are_taken_off_in_any_order_where_all_names_have_them() {
        for (names, length) in [
            (&["module.a", "module.b"][..], 7),
            (&["_orig_mod.a", "_orig_mod.b"], 10),
            (&["module._orig_mod.a", "module._orig_mod.b"], 17),
            (&["_orig_mod.module.a", "_orig_mod.module.b"], 17),
            (&["module.a", "b"], 0),
            (&["module._orig_mod.a", "module.b"], 7),
            (&[], 0),
        ] {
            assert_eq!(prefix_len(names), length, "{names:?}");
        }
    }
}
