//! Section `quant`: how weights and activations are quantized.

use serde::{Deserialize, Serialize};

use super::check::within;
use super::error::ConfigError;

/// Quantization of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantConfig {
    /// How the weights of the linear layers are quantized.
    pub weight: WeightQuant,
    /// The straight-through estimator of the weights: which gradient passes through their quantization.
    pub ste: Ste,
    /// How the inputs of the linear layers are quantized.
    pub act: ActQuant,
    /// The straight-through estimator of the inputs.
    pub act_ste: ActSte,
    /// Which kernels compute the quantized layers. All compute the same functions, but round in different places.
    pub kernel: QuantKernel,
    /// Fraction of the run over which quantization is phased in, starting from full precision. 0 means that it is on
    /// from the first step.
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
    /// No gradient where |w / gamma| > 1, as in the original.
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
    /// No estimator, as in the original: the gradient flows through the scale alone, to the largest element of each
    /// token. Only the reference kernels compute this.
    None,
}

/// Which kernels compute the quantized layers. All compute the same functions, but round in different places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum QuantKernel {
    /// The fused kernels where they can compute a layer (ternary weights, int8 activations with the identity estimator,
    /// fully quantized), else the reference. The choice depends on the configuration alone, never on timing, so that
    /// every process of a run chooses alike.
    Auto,
    /// bbt's own kernels: integer products, with the normalization and quantization before them in one pass.
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

    /// Whether the fused kernels can compute this quantization, and `kernel` allows them.
    pub fn may_fuse(&self) -> bool {
        let quantized = self.weight == WeightQuant::Ternary && self.act == ActQuant::Int8;
        quantized && self.act_ste == ActSte::Identity && self.kernel != QuantKernel::Reference
    }

    /// λ, the weight of quantization at `step` (counted from 0) of a run of `steps`. It rises linearly from 0, which is
    /// full precision, to 1 at `start_frac` of the run. A layer uses x + λ (q(x) - x) in place of x.
    pub fn lambda(&self, step: u64, steps: u64) -> f64 {
        let start = self.start_frac * steps as f64;
        if start > 0.0 { (step as f64 / start).min(1.0) } else { 1.0 }
    }
}
