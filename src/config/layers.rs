//! Where values come from: files and flags, laid over the defaults and over a checkpoint's own model.

use std::collections::BTreeMap;
use std::path::Path;

use super::data::DEFAULT_SEQ_LEN;
use super::error::{ConfigError, invalid};
use super::yaml::{self, Mapping, Value};
use super::{Config, DataConfig, ModelConfig, QuantConfig};

/// The original's sequence lengths, each with the fraction of the run at which it begins.
const ORIGINAL_CURRICULUM: [(f64, i64); 3] = [(0.0, 2048), (0.2, 4096), (0.5, 8192)];

/// A partial configuration: the values that files and flags gave, without the defaults.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    /// The values by section and key, each as its own type is written, so that it reads back as that type.
    given: Mapping,
    /// Where each key (`section.key`) was given: a flag, or a file and line. Errors tell it.
    origins: BTreeMap<String, String>,
}

impl Layers {
    /// Adds a YAML file. Its values override earlier ones.
    ///
    /// # Errors
    /// An unreadable file, unknown or mistyped keys (with their line), `seq_len` beside `curriculum`.
    pub fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        self.add_yaml(&text, path)
    }

    pub(super) fn add_yaml(&mut self, text: &str, path: &Path) -> Result<(), ConfigError> {
        if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(());
        }
        let typed: Config = yaml::parse(text).map_err(|source| ConfigError::Yaml { path: path.into(), source })?;
        if typed.data.seq_len.is_some() && typed.data.curriculum.is_some() {
            return Err(ConfigError::Flag {
                flag: path.display().to_string(),
                message: "data.seq_len and data.curriculum exclude each other: keep one".into(),
            });
        }
        self.take(text, &typed, |section, key| {
            let line = yaml::line_of(text, section, key).map(|line| format!(" line {line}")).unwrap_or_default();
            format!("{}{line}", path.display())
        });
        Ok(())
    }

    /// Takes from `typed`, which was read from `text`, the values of the keys that `text` names.
    fn take(&mut self, text: &str, typed: &Config, origin: impl Fn(&str, &str) -> String) {
        // The text is read once more, untyped, to see which keys it has: `typed` has them all.
        let sections: Mapping = yaml::parse(text).unwrap_or_default();
        let values = yaml::to_value(typed).unwrap_or_default();
        for (section, keys) in &sections {
            let (Some(section), Some(keys)) = (section.as_str(), keys.as_mapping()) else { continue };
            for key in keys.keys().filter_map(Value::as_str) {
                if let Some(value) = values.get(section).and_then(|keys| keys.get(key)) {
                    self.put(section, key, value.clone(), origin(section, key));
                }
            }
        }
    }

    /// Sets `key` (`section.key`) to a value; `flag` is what an error names.
    ///
    /// # Errors
    /// An unknown key or a value of another type.
    pub fn set(&mut self, flag: &str, key: &str, value: impl Into<Value>) -> Result<(), ConfigError> {
        let error = |message: String| ConfigError::Flag { flag: flag.into(), message };
        let (section, name) =
            key.split_once('.').ok_or_else(|| error(format!("`{key}` is not of the form section.key")))?;
        let mut keys = Mapping::new();
        keys.insert(name.into(), value.into());
        let mut sections = Mapping::new();
        sections.insert(section.into(), keys.into());
        // The value goes through YAML text, so that the same rules hold as in a file.
        let text = yaml::to_text(&sections).map_err(|e| error(e.to_string()))?;
        let typed: Config = yaml::parse(&text).map_err(|e| error(e.without_line().into()))?;
        self.take(&text, &typed, |_, _| flag.into());
        Ok(())
    }

    /// Sets a key from `section.key=value`, the value being YAML.
    ///
    /// # Errors
    /// As [`Layers::set`], or text of another form.
    pub fn set_text(&mut self, assignment: &str) -> Result<(), ConfigError> {
        let flag = format!("--set {assignment}");
        let Some((key, value)) = assignment.split_once('=') else {
            return Err(ConfigError::Flag { flag, message: "expected section.key=value".into() });
        };
        let value: Value =
            yaml::parse(value).map_err(|e| ConfigError::Flag { flag: flag.clone(), message: e.to_string() })?;
        self.set(&flag, key.trim(), value)
    }

    /// Caps every sequence length (`--seq_len_cap`): the fixed length, the curriculum given, or the
    /// original's curriculum (2048, 4096 from 20 % on, 8192 from 50 % on) where neither is.
    ///
    /// # Errors
    /// A cap below 1.
    pub fn cap_seq_len(&mut self, flag: &str, cap: i64) -> Result<(), ConfigError> {
        if cap < 1 {
            return Err(ConfigError::Flag { flag: flag.into(), message: format!("{cap} is less than 1") });
        }
        let data: DataConfig = match self.given.get("data") {
            Some(section) => yaml::from_value(section.clone())
                .map_err(|e| ConfigError::Flag { flag: flag.into(), message: e.to_string() })?,
            None => DataConfig::default(),
        };
        match (data.seq_len, data.curriculum) {
            (Some(length), _) => self.set(flag, "data.seq_len", length.min(cap)),
            (None, curriculum) => {
                let stages = curriculum.unwrap_or_else(|| ORIGINAL_CURRICULUM.to_vec());
                let capped: Vec<Value> = stages
                    .into_iter()
                    .map(|(start, length)| Value::Sequence(vec![start.into(), length.min(cap).into()]))
                    .collect();
                self.set(flag, "data.curriculum", capped)
            }
        }
    }

    fn put(&mut self, section: &str, key: &str, value: Value, origin: String) {
        self.origins.insert(format!("{section}.{key}"), origin);
        let keys = self.given.entry(section.into()).or_insert_with(|| Mapping::new().into());
        let Value::Mapping(keys) = keys else { return };
        // The two exclude each other: the later one replaces the earlier.
        match (section, key) {
            ("data", "seq_len") if !value.is_null() => drop(keys.remove("curriculum")),
            ("data", "curriculum") if !value.is_null() => drop(keys.remove("seq_len")),
            _ => {}
        }
        keys.insert(key.into(), value);
    }

    /// Whether `section.key` was given.
    pub fn has(&self, section: &str, key: &str) -> bool {
        self.given.get(section).and_then(|keys| keys.get(key)).is_some()
    }

    /// What was given over the defaults, not validated yet.
    ///
    /// # Errors
    /// None that adding a layer would not have found.
    pub fn given(&self) -> Result<Config, ConfigError> {
        yaml::from_value(Value::Mapping(self.given.clone())).map_err(|e| invalid("configuration", e.to_string()))
    }

    /// The whole configuration, validated. `checkpoint` is the model and quantization of a checkpoint
    /// that is continued: what was not given comes from there, and a shape that was given and differs
    /// is an error.
    ///
    /// # Errors
    /// A value out of range, or a contradiction with the checkpoint; both name the key.
    pub fn resolve(&self, checkpoint: Option<(&ModelConfig, &QuantConfig)>) -> Result<Config, ConfigError> {
        let given = self.given()?;
        let mut config = given.clone();
        if let Some((model, quant)) = checkpoint {
            let shapes = [
                ("n_layer", given.model.n_layer, model.n_layer),
                ("d_model", given.model.d_model, model.d_model),
                ("n_head", given.model.n_head, model.n_head),
                // Null means as many as n_head, so the number of heads is what must agree.
                ("n_kv_head", given.model.n_kv_head.unwrap_or(model.n_head), model.kv_heads()),
                ("d_ff", given.model.d_ff, model.d_ff),
            ];
            for (key, asked, has) in shapes {
                if self.has("model", key) && asked != has {
                    return Err(invalid(
                        &format!("model.{key}"),
                        format!(
                            "{asked} was asked for, but the checkpoint has {has}: leave it out, or start without the checkpoint"
                        ),
                    ));
                }
            }
            config.model = ModelConfig { attention: given.model.attention, ..model.clone() };
            if self.has("model", "rope_base") {
                config.model.rope_base = given.model.rope_base;
            }
            if !self.has("quant", "weight") {
                config.quant.weight = quant.weight;
            }
            if !self.has("quant", "ste") {
                config.quant.ste = quant.ste;
            }
            if !self.has("quant", "act_ste") {
                config.quant.act_ste = quant.act_ste;
            }
            if !self.has("quant", "act") {
                config.quant.act = quant.act;
            }
        }
        if config.data.curriculum.is_none() {
            config.data.seq_len.get_or_insert(DEFAULT_SEQ_LEN);
        }
        config.validate().map_err(|error| self.with_origin(error))?;
        Ok(config)
    }

    /// A value out of range, with where it was given.
    fn with_origin(&self, error: ConfigError) -> ConfigError {
        match error {
            ConfigError::Invalid { key, message } => match self.origins.get(&key) {
                Some(origin) => ConfigError::Invalid { message: format!("{message} ({origin})"), key },
                None => ConfigError::Invalid { key, message },
            },
            other => other,
        }
    }
}
