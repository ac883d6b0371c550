//! Section `quant`: how weights and activations are quantized.

use serde::{Deserialize, Serialize};

use super::check::within;
use super::error::ConfigError;

/// Quantization of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantConfig {
    /// Weights of the linear layers.
    pub weight: WeightQuant,
    /// The weights' straight-through estimator.
    pub ste: Ste,
    /// Inputs of the linear layers.
    pub act: ActQuant,
    /// The inputs' straight-through estimator.
    pub act_ste: ActSte,
    /// What computes it.
    pub kernel: QuantKernel,
    /// Fraction of the run over which quantization comes in, from full precision; 0: it is there from the start.
    pub start_frac: f64,
}

/// Quantization of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum WeightQuant {
    /// {-1, 0, 1} times the mean absolute value of the tensor.
    Ternary,
    /// Full precision.
    None,
}

/// The straight-through estimator of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Ste {
    /// The gradient passes unchanged.
    Identity,
    /// No gradient where |w / gamma| > 1, as the original.
    Clipped,
}

/// Quantization of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ActQuant {
    /// Symmetric absmax int8, one scale per token.
    Int8,
    /// Full precision.
    None,
}

/// The straight-through estimator of the activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ActSte {
    /// The gradient passes unchanged.
    Identity,
    /// None, as the original: the gradient flows through the scale alone, to the largest element of each token. The
    /// reference computes it.
    None,
}

/// What computes quantized layers and what stands around them. The same functions, rounded elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum QuantKernel {
    /// The fused kernels for each layer that they compute: ternary weights, int8 activations with the identity as
    /// estimator, fully quantized. Else the reference. Nothing is timed, so every process of a run chooses alike.
    Auto,
    /// Kernels of our own: integer products, and what comes before them in one pass.
    Fused,
    /// libtorch's operators: detach arithmetic and floating-point products.
    Reference,
}

impl Default for QuantConfig {
    fn default() -> Self {
        Self {
            weight: WeightQuant::Ternary,
            ste: Ste::Identity,
            act: ActQuant::Int8,
            act_ste: ActSte::Identity,
            kernel: QuantKernel::Auto,
            start_frac: 0.0,
        }
    }
}

impl QuantConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        within("quant.start_frac", self.start_frac, 0.0..1.0)
    }

    /// Whether there are fused kernels for it, and `kernel` does not rule them out.
    pub fn may_fuse(&self) -> bool {
        let quantized = self.weight == WeightQuant::Ternary && self.act == ActQuant::Int8;
        quantized && self.act_ste == ActSte::Identity && self.kernel != QuantKernel::Reference
    }

    /// λ, how far quantization has come in at `step` (from 0) in a run of `steps`: from 0, full precision, in a line to
    /// 1 at `start_frac` of the run. Each quantized x is x + λ (q(x) - x).
    pub fn lambda(&self, step: u64, steps: u64) -> f64 {
        let start = self.start_frac * steps as f64;
        if start > 0.0 { (step as f64 / start).min(1.0) } else { 1.0 }
    }
}
