//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of
//! GPT-NeoX and LLaMA: dimension i turns together with dimension i + D/2.

use tch::{Device, Kind, Tensor};

/// The angles' cosines and sines for a run of positions.
#[derive(Debug)]
pub struct Rope {
    /// `[T, D/2]` fp32
    cos: Tensor,
    /// `[T, D/2]` fp32
    sin: Tensor,
}

impl Rope {
    /// Tables for positions `start .. start + len` and heads of width `head_dim` (even):
    /// angle(t, i) = t · base^(-2i / head_dim).
    pub fn new(head_dim: i64, base: f64, start: i64, len: i64, device: Device) -> Self {
        let options = (Kind::Float, device);
        let exponents = Tensor::arange_start_step(0, head_dim, 2, options) / head_dim as f64;
        let inverse_frequency = Tensor::full([1], base, options).pow(&exponents).reciprocal();
        let positions = Tensor::arange_start(start, start + len, options);
        let angles = positions.outer(&inverse_frequency);
        Self { cos: angles.cos(), sin: angles.sin() }
    }

    /// Turns each head's vector by its position's angles.
    ///
    /// # Shapes
    /// `x`: `[B, H, T, D]` → the same, computed in fp32 and returned in `x`'s dtype.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        Tensor::cat(&[a * &self.cos - b * &self.sin, a * &self.sin + b * &self.cos], -1).to_kind(x.kind())
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }
}
