//! Root-mean-square layer normalisation (Zhang & Sennrich 2019, arXiv 1910.07467).

use tch::{Tensor, nn};

use crate::quantization::{Input, rms_norm};

/// y = x / sqrt(mean(x²) + eps) · weight, over the last dimension.
#[derive(Debug)]
pub struct RmsNorm {
    /// `[dim]` fp32, initially ones.
    pub weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Adds `weight` to `vs`.
    pub fn new(vs: nn::Path, dim: i64, eps: f64) -> Self {
        Self { weight: vs.ones("weight", &[dim]), eps }
    }

    /// # Shapes
    /// `x`: `[..., dim]` → the same, computed and returned in fp32.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        rms_norm(x, &self.weight, self.eps)
    }

    /// [`RmsNorm::forward`] of `x`, for layers that compute it with their own.
    pub fn input<'a>(&'a self, x: &'a Tensor) -> Input<'a> {
        Input::RmsNorm { x, weight: &self.weight, eps: self.eps }
    }

    /// Another handle to the same tensor.
    pub fn shallow_clone(&self) -> Self {
        Self { weight: self.weight.shallow_clone(), eps: self.eps }
    }
}
