//! What BitLinear layers read: a tensor, or what a norm or a gate makes of one. Fused kernels compute it in one pass
//! with the quantization; the reference by libtorch's operators.

use tch::{Kind, Tensor};

/// The input of one or several BitLinear layers.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// The tensor itself, `[..., in]`.
    Plain(&'a Tensor),
    /// Its root-mean-square normalisation ([`rms_norm`]).
    RmsNorm {
        /// `[..., in]`
        x: &'a Tensor,
        /// `[in]` fp32
        weight: &'a Tensor,
        /// Added to the mean square.
        eps: f64,
    },
    /// silu(gate) · up (SwiGLU: Shazeer 2020, arXiv 2002.05202) of a `[..., 2 in]` that holds both, the gate first.
    SwiGlu(&'a Tensor),
}

impl Input<'_> {
    /// By libtorch's operators: `[..., in]`.
    pub fn reference(&self) -> Tensor {
        match *self {
            Self::Plain(x) => x.shallow_clone(),
            Self::RmsNorm { x, weight, eps } => rms_norm(x, weight, eps),
            Self::SwiGlu(gate_up) => {
                let halves = gate_up.chunk(2, -1);
                halves[0].silu() * &halves[1]
            }
        }
    }

    /// What it is made of.
    pub(super) fn tensor(&self) -> &Tensor {
        match self {
            Self::Plain(x) | Self::RmsNorm { x, .. } | Self::SwiGlu(x) => x,
        }
    }
}

/// x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).
///
/// # Shapes
/// `x`: `[..., D]`, `weight`: `[D]` fp32 → `[..., D]`, computed and returned in fp32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    x.to_kind(Kind::Float).rms_norm(weight.size(), Some(weight), eps)
}
