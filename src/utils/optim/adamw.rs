//! AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over libtorch's fused kernel, with the state of
//! `torch.optim.AdamW`.

use tch::{Device, Kind, Tensor};

use super::Piece;
use crate::libtorch::{self, AdamWStep, Error};

/// What `torch.optim.AdamW` keeps for one parameter.
#[derive(Debug)]
pub struct AdamWState {
    /// Steps taken: fp32 `[]`.
    pub step: Tensor,
    /// First moment, as the parameter.
    pub exp_avg: Tensor,
    /// Second moment, as the parameter.
    pub exp_avg_sq: Tensor,
}

impl AdamWState {
    /// The state of a parameter of shape `size` before the first step.
    pub fn zeros(size: &[i64], device: Device) -> Self {
        let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, device));
        Self { step: zeros(&[]), exp_avg: zeros(size), exp_avg_sq: zeros(size) }
    }

    /// That of a piece of the parameter: views, but for the step, which is the whole's.
    pub(super) fn piece(&self, piece: Piece) -> Self {
        let [exp_avg, exp_avg_sq] = [&self.exp_avg, &self.exp_avg_sq].map(|moment| piece.of(moment));
        Self { step: self.step.shallow_clone(), exp_avg, exp_avg_sq }
    }

    /// Handles to the three tensors.
    pub fn tensors(&self) -> [Tensor; 3] {
        [&self.step, &self.exp_avg, &self.exp_avg_sq].map(Tensor::shallow_clone)
    }
}

/// One step of `params` along `grads`, as [`super::Optimizer::step`].
pub(super) fn step(
    params: &[Tensor],
    grads: &[Tensor],
    state: &[AdamWState],
    step: AdamWStep,
    found_inf: &Tensor,
) -> Result<(), Error> {
    let list = |f: fn(&AdamWState) -> &Tensor| state.iter().map(|s| f(s).shallow_clone()).collect::<Vec<_>>();
    libtorch::fused_adamw(
        params,
        grads,
        &list(|s| &s.exp_avg),
        &list(|s| &s.exp_avg_sq),
        &list(|s| &s.step),
        step,
        found_inf,
    )
}
