//! The configuration of a run: typed, validated, and saved with each checkpoint.
//!
//! This module knows no tensor and imports no other module of the crate. A struct for each section of the YAML file
//! holds its keys and their defaults. Values come in layers, and a later layer overrides an earlier one: the defaults,
//! the model of the checkpoint that is resumed, the YAML file, the command-line flags. [`Layers`] collects what was
//! given, and [`Layers::resolve`] makes the [`Config`]. `bbt config` prints the result.

mod check;
mod data;
mod ddp;
mod device;
mod error;
mod layers;
mod model;
mod optim;
mod quant;
#[cfg(test)]
mod tests;
mod train;
pub(crate) mod yaml;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use data::{DataConfig, Order};
pub use ddp::{Backend, DdpConfig};
pub use device::DeviceSpec;
pub use error::ConfigError;
pub use layers::Layers;
pub use model::{Attention, ModelConfig, VOCAB_SIZE};
pub use optim::{Decay, OptimConfig, OptimizerName, Schedule};
pub use quant::{ActQuant, ActSte, QuantConfig, QuantKernel, Ste, WeightQuant};
pub use train::{OnUsr1, Precision, TrainConfig};
pub use yaml::{Value, YamlError};

/// The configuration of a run: a section for each field.
///
/// ```
/// use bbt::config::Config;
///
/// let config = Config::load("configs/tiny.yaml")?;
/// assert_eq!(config.model.head_dim() * config.model.n_head, config.model.d_model);
/// // What was not given has its default.
/// assert_eq!(config.optim.eps, Config::default().optim.eps);
/// # Ok::<(), bbt::config::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The shape of the model.
    pub model: ModelConfig,
    /// Quantization of weights and activations.
    pub quant: QuantConfig,
    /// What is read, and in which order.
    pub data: DataConfig,
    /// The optimizer and the learning-rate schedule.
    pub optim: OptimConfig,
    /// The run itself.
    pub train: TrainConfig,
    /// Data-parallel training, one process per rank.
    pub ddp: DdpConfig,
}

impl Config {
    /// Reads the configuration that a YAML file gives over the defaults, and validates it.
    ///
    /// # Errors
    /// A file that cannot be read, unknown or mistyped keys (with their line), a value out of range.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let mut layers = Layers::default();
        layers.add_file(path.as_ref())?;
        layers.resolve(None)
    }

    /// Reads back what [`Config::to_yaml`] wrote, as a checkpoint holds it. Ranges are not checked:
    /// [`Config::validate`] does that.
    ///
    /// # Errors
    /// Text that is no configuration.
    pub fn from_yaml(text: &str) -> Result<Self, YamlError> {
        yaml::parse(text)
    }

    /// The configuration as YAML, with every key.
    pub fn to_yaml(&self) -> String {
        yaml::to_text(self).unwrap_or_else(|error| format!("# {error}\n"))
    }

    /// Checks that every value is in its range, and that none contradicts another.
    ///
    /// # Errors
    /// The first key that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.model.validate()?;
        self.quant.validate()?;
        self.data.validate()?;
        self.optim.validate(self.train.steps)?;
        self.train.validate()?;
        self.ddp.validate()
    }
}
