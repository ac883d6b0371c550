//! The gradient scaler of `torch.amp.GradScaler`.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::libtorch::{self, Error};

/// Loss scaling for fp16, rule by rule that of `torch.amp.GradScaler`: scale the loss, unscale the
/// gradients, skip the step where one is not finite and halve the scale, double it after 2,000 steps
/// without.
#[derive(Debug)]
pub struct GradScaler {
    /// fp32 `[1]`
    scale: Tensor,
    /// int32 `[1]`
    growth_tracker: Tensor,
    rule: ScalerState,
}

/// `GradScaler.state_dict()`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ScalerState {
    /// Factor on the loss.
    pub scale: f64,
    /// The scale grows by this.
    pub growth_factor: f64,
    /// The scale shrinks by this.
    pub backoff_factor: f64,
    /// After so many finite steps in a row it grows.
    pub growth_interval: i64,
    /// Finite steps in a row so far.
    pub growth_tracker: i64,
}

impl Default for ScalerState {
    fn default() -> Self {
        Self { scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000, growth_tracker: 0 }
    }
}

impl GradScaler {
    /// A scaler in `state`, on `device`.
    pub fn new(state: ScalerState, device: Device) -> Self {
        Self {
            scale: Tensor::from_slice(&[state.scale as f32]).to_device(device),
            growth_tracker: Tensor::from_slice(&[state.growth_tracker as i32]).to_device(device),
            rule: state,
        }
    }

    /// The loss times the scale.
    pub fn scale(&self, loss: &Tensor) -> Tensor {
        loss * self.scale.squeeze()
    }

    /// Divides `grads` by the scale in place; sets `found_inf` (fp32 `[]`) to 1 where one is not finite.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn unscale(&self, grads: &[Tensor], found_inf: &Tensor) -> Result<(), Error> {
        // In fp64 as PyTorch does: the reciprocal of a large scale must not be a denormal.
        let inverse = self.scale.to_kind(Kind::Double).reciprocal().to_kind(Kind::Float);
        libtorch::amp_unscale(grads, found_inf, &inverse)
    }

    /// Adapts the scale to whether the step was skipped.
    pub fn update(&mut self, found_inf: &Tensor) {
        let _no_grad = tch::no_grad_guard();
        let _ = self.scale.internal_amp_update_scale_(
            &self.growth_tracker,
            found_inf,
            self.rule.growth_factor,
            self.rule.backoff_factor,
            self.rule.growth_interval,
        );
    }

    /// What a checkpoint holds.
    pub fn state(&self) -> ScalerState {
        ScalerState {
            scale: self.scale.double_value(&[0]),
            growth_tracker: self.growth_tracker.int64_value(&[0]),
            ..self.rule
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    #[test]
    fn the_scale_halves_on_overflow_and_doubles_after_the_interval() {
        let mut scaler = GradScaler::new(ScalerState { growth_interval: 3, ..Default::default() }, Device::Cpu);
        let mut seen = vec![];
        for g in [1.0, f32::INFINITY, 1.0, 1.0, 1.0, 1.0] {
            let grads = [Tensor::from_slice(&[g * scaler.state().scale as f32])];
            let found_inf = Tensor::zeros([], CPU);
            scaler.unscale(&grads, &found_inf).unwrap();
            assert_eq!(found_inf.double_value(&[]), if g.is_finite() { 0.0 } else { 1.0 });
            if g.is_finite() {
                assert_eq!(grads[0].double_value(&[0]), 1.0);
            }
            scaler.update(&found_inf);
            seen.push((scaler.state().scale, scaler.state().growth_tracker));
        }
        let s = 65536.0;
        assert_eq!(seen, [(s, 1), (s / 2.0, 0), (s / 2.0, 1), (s / 2.0, 2), (s, 0), (s, 1)]);
    }
}
