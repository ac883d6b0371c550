//! The key `args` of a training checkpoint: the PyTorch original's command-line arguments, from which it builds its
//! model; and what it trains by where they say nothing.

use super::Value;
use super::training_checkpoint::{FAMILY, Given, dict, int, str};
use crate::config::{
    ActQuant, ActSte, Attention, Config, Decay, ModelConfig, Precision, QuantConfig, QuantKernel, Schedule, Ste,
};

/// The longest sequence of the original's curriculum, where nothing caps it.
const UNCAPPED: i64 = 8192;

/// The original's arguments, from our configuration.
pub(super) fn args(config: &Config) -> Value {
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

/// Of the original's arguments those that say what the model is, for a file that says no more.
pub(super) fn model_args(config: &Config) -> Value {
    const KEYS: [&str; 8] =
        ["n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "use_sdpa", "no_act_quant", "model_family"];
    let mut all = args(config);
    if let Value::Dict(entries) = &mut all {
        entries.retain(|(key, _)| key.as_str().is_some_and(|key| KEYS.contains(&key)));
    }
    all
}

/// The model that the original's arguments describe. Where `n_head` is not among them, it is what was `given`.
pub(super) fn model_of_args(args: &Value, given: &Given) -> Result<(ModelConfig, QuantConfig), String> {
    if !matches!(args, Value::Dict(_) | Value::OrderedDict { .. }) {
        return Err(format!("its `args` are no dict but of type {}: save vars(args)", args.type_name()));
    }
    let unreadable = |key: &str, value: &Value, wanted: &str| {
        format!("`{key}` of its `args` is of type {}, not {wanted}", value.type_name())
    };
    let optional = |key: &str| match args.get(key) {
        None | Some(Value::None) => Ok(None),
        Some(value) => value.whole_number().map(Some).ok_or_else(|| unreadable(key, value, "a whole number")),
    };
    let number = |key: &str| {
        optional(key)?.ok_or_else(|| format!("its `args` have no number `{key}`, part of the model's shape"))
    };
    let flag = |key: &str, usual: bool| match args.get(key) {
        None | Some(Value::None) => Ok(usual),
        Some(Value::Int(number @ 0..=1)) => Ok(*number == 1),
        Some(value) => value.as_bool().ok_or_else(|| unreadable(key, value, "a bool")),
    };
    let n_head = match (optional("n_head")?, given.n_head) {
        (Some(n_head), _) | (None, Some(n_head)) => n_head,
        (None, None) => return Err("its `args` have no number `n_head`: give --n_head".into()),
    };
    let model = ModelConfig {
        n_layer: number("n_layer")?,
        d_model: number("d_model")?,
        n_head,
        n_kv_head: optional("n_kv_head")?,
        d_ff: number("d_ff")?,
        attention: if flag("use_sdpa", true)? { Attention::Sdpa } else { Attention::Math },
        ..ModelConfig::default()
    };
    let act = if flag("no_act_quant", false)? { ActQuant::None } else { ActQuant::Int8 };
    Ok((model, its_arithmetic(act)))
}

/// The original's arithmetic, to the last code. Training goes on with what the run's configuration says.
pub(super) fn its_arithmetic(act: ActQuant) -> QuantConfig {
    QuantConfig { act, kernel: QuantKernel::Reference, ..QuantConfig::default() }
}

/// How a run trains, but for its schedule: keys of the configuration with their values.
pub type Rule = Vec<(&'static str, String)>;

/// That of a configuration.
pub fn rule_of(config: &Config) -> Rule {
    let Config { quant, optim, train, .. } = config;
    // The names of these variants are those in YAML, but for their case.
    let name = |variant: &dyn std::fmt::Debug| format!("{variant:?}").to_lowercase();
    vec![
        ("quant.ste", name(&quant.ste)),
        ("quant.act_ste", name(&quant.act_ste)),
        ("train.precision", name(&train.precision)),
        ("optim.betas", format!("[{:?},{:?}]", optim.betas.0, optim.betas.1)),
        ("optim.eps", format!("{:?}", optim.eps)),
        ("optim.weight_decay", format!("{:?}", optim.weight_decay)),
        ("optim.decay", name(&optim.decay)),
    ]
}

/// That of the original. `scaled` is whether a gradient scaler was at work, where that is known; `groups` are lr, both
/// betas, eps and weight decay of its optimizer's groups of parameters.
pub(super) fn original_rule(scaled: Option<bool>, args: Option<&Value>, groups: &[[f64; 5]]) -> Rule {
    let mut config = Config::default();
    (config.quant.ste, config.quant.act_ste) = (Ste::Clipped, ActSte::None);
    config.train.precision = if scaled == Some(true) { Precision::Fp16 } else { Precision::Fp32 };
    let mut unknown = vec![];
    if scaled.is_none() {
        unknown.push("train.precision");
    }
    match groups.first() {
        Some(&[_, beta1, beta2, eps, _]) => (config.optim.betas, config.optim.eps) = ((beta1, beta2), eps),
        None => unknown.extend(["optim.betas", "optim.eps"]),
    }
    let decays: Vec<f64> = groups.iter().map(|group| group[4]).collect();
    let largest = decays.iter().copied().fold(0.0, f64::max);
    match args.and_then(|args| args.get("wd")).and_then(Value::number) {
        Some(decay) => config.optim.weight_decay = decay,
        None if decays.is_empty() => unknown.push("optim.weight_decay"),
        None => config.optim.weight_decay = largest,
    }
    let some_do_not = decays.contains(&0.0) && largest > 0.0;
    config.optim.decay = if some_do_not { Decay::Matrices } else { Decay::All };
    let mut rule = rule_of(&config);
    rule.retain(|(key, _)| !unknown.contains(key));
    rule
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    #[test]
    fn what_a_rule_says_can_be_set() {
        let mut config = Config::default();
        (config.quant.act_ste, config.train.precision) = (ActSte::None, Precision::Fp16);
        (config.optim.decay, config.optim.eps) = (Decay::Matrices, 1e-9);
        for (config, expected) in [(Config::default(), 0), (config, 4)] {
            let mut layers = Layers::default();
            for (key, value) in rule_of(&config) {
                layers.set_text(&format!("{key}={value}")).unwrap();
            }
            let read_back = layers.resolve(None).unwrap();
            assert_eq!(rule_of(&read_back), rule_of(&config));
            let usual = rule_of(&Config::default());
            assert_eq!(usual.iter().zip(rule_of(&read_back)).filter(|(a, b)| **a != *b).count(), expected);
        }
    }
}
