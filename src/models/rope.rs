//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of
//! GPT-NeoX and LLaMA: dimension i turns together with dimension i + D/2.

use tch::{Device, Kind, Tensor};

use crate::libtorch;

/// The angles' cosines and sines for a run of positions.
#[derive(Debug)]
pub struct Rope {
    /// `[T, D/2]` fp32
    cos: Tensor,
    /// `[T, D/2]` fp32
    sin: Tensor,
    /// Whether kernels of our own turn.
    fused: bool,
}

impl Rope {
    /// Tables for positions `start .. start + len` and heads of width `head_dim` (even):
    /// angle(t, i) = t · base^(-2i / head_dim).
    pub fn new(head_dim: i64, base: f64, start: i64, len: i64, device: Device, fused: bool) -> Self {
        let options = (Kind::Float, device);
        let exponents = Tensor::arange_start_step(0, head_dim, 2, options) / head_dim as f64;
        let inverse_frequency = Tensor::full([1], base, options).pow(&exponents).reciprocal();
        let positions = Tensor::arange_start(start, start + len, options);
        let angles = positions.outer(&inverse_frequency);
        Self { cos: angles.cos(), sin: angles.sin(), fused }
    }

    /// Turns each head's vector by its position's angles.
    ///
    /// # Shapes
    /// `x`: `[B, T, H, D]` → the same, computed in fp32 and returned in `x`'s dtype.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        if self.fused {
            // Panics where libtorch fails, as every tch operation in a forward pass does.
            return libtorch::rope(x, &self.cos, &self.sin).unwrap_or_else(|error| panic!("{error}"));
        }
        let (cos, sin) = (self.cos.unsqueeze(1), self.sin.unsqueeze(1)); // [T, 1, D/2]
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        Tensor::cat(&[a * &cos - b * &sin, a * &sin + b * &cos], -1).to_kind(x.kind())
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone(), fused: self.fused }
    }
}
