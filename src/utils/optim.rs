//! AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over libtorch's fused kernel, with the state of
//! `torch.optim.AdamW`; and the gradient scaler of `torch.amp.GradScaler`.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::config::OptimConfig;
use crate::libtorch::{self, AdamWStep, Error};

/// AdamW over a list of parameters in PyTorch's order.
#[derive(Debug)]
pub struct AdamW {
    params: Vec<Tensor>,
    /// State of each parameter, in the same order.
    pub state: Vec<AdamWState>,
    config: OptimConfig,
}

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

    /// Takes over the values of another of the same shape, from whatever device.
    pub fn copy_from(&mut self, other: &Self) {
        self.step.copy_(&other.step);
        self.exp_avg.copy_(&other.exp_avg);
        self.exp_avg_sq.copy_(&other.exp_avg_sq);
    }

    /// Handles to the three tensors.
    pub fn tensors(&self) -> [Tensor; 3] {
        [&self.step, &self.exp_avg, &self.exp_avg_sq].map(Tensor::shallow_clone)
    }
}

impl AdamW {
    /// A fresh optimizer: zero moments, no steps taken.
    pub fn new(params: Vec<Tensor>, config: &OptimConfig) -> Self {
        let state = params.iter().map(|p| AdamWState::zeros(&p.size(), p.device())).collect();
        Self { params, state, config: config.clone() }
    }

    /// The parameters' gradients. A parameter without one has no part in the loss, which no layer of
    /// BitByteLM is.
    pub fn gradients(&self) -> Vec<Tensor> {
        self.params.iter().map(Tensor::grad).collect()
    }

    /// One step along `grads`, shaped as the parameters, with learning rate `lr`; every parameter decays by
    /// `weight_decay`. Nothing changes where `found_inf` (fp32 `[]`) is 1.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn step(&mut self, grads: &[Tensor], lr: f64, weight_decay: f64, found_inf: &Tensor) -> Result<(), Error> {
        let list = |f: fn(&AdamWState) -> &Tensor| self.state.iter().map(|s| f(s).shallow_clone()).collect::<Vec<_>>();
        libtorch::fused_adamw(
            &self.params,
            grads,
            &list(|s| &s.exp_avg),
            &list(|s| &s.exp_avg_sq),
            &list(|s| &s.step),
            AdamWStep { lr, betas: self.config.betas, eps: self.config.eps, weight_decay },
            found_inf,
        )
    }

    /// Drops all gradients: backward then leaves its own, and need not add to zeros (PyTorch's `set_to_none`).
    ///
    /// # Errors
    /// libtorch's own.
    pub fn drop_grad(&mut self) -> Result<(), Error> {
        self.params.iter().try_for_each(|param| libtorch::set_grad(param, &Tensor::new()))
    }

    /// Sets all gradients to zero, where they lie: for a reducer, whose buckets they are views of.
    pub fn zero_grad(&mut self) {
        let _no_grad = tch::no_grad_guard();
        // Not tch's zero_grad, which detaches in place: views cannot be.
        for mut grad in self.params.iter().map(Tensor::grad).filter(Tensor::defined) {
            let _ = grad.zero_();
        }
    }
}

/// Scales `grads` so that their common L2 norm is at most `max_norm`, as
/// `torch.nn.utils.clip_grad_norm_`. `norm` is that norm, fp32 `[]`.
///
/// # Errors
/// libtorch's own.
pub fn clip_gradients(grads: &[Tensor], norm: &Tensor, max_norm: f64) -> Result<(), Error> {
    let factor = ((norm + 1e-6).reciprocal() * max_norm).clamp_max(1.0);
    libtorch::foreach_mul(grads, &factor)
}

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

    /// AdamW's equations in fp64: the independent account.
    fn closed_form(p: f64, grads: &[f64], lr: f64, c: &OptimConfig) -> f64 {
        let (mut p, mut m, mut v) = (p, 0.0, 0.0);
        for (t, g) in (1..).zip(grads) {
            p *= 1.0 - lr * c.weight_decay;
            m = c.betas.0 * m + (1.0 - c.betas.0) * g;
            v = c.betas.1 * v + (1.0 - c.betas.1) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - c.betas.0.powi(t)), v / (1.0 - c.betas.1.powi(t)));
            p -= lr * m_hat / (v_hat.sqrt() + c.eps);
        }
        p
    }

    fn set_gradient(p: &Tensor, g: f64) {
        // The gradient of g · p is g.
        (p * g).sum(Kind::Float).backward();
    }

    #[test]
    fn steps_follow_the_equations_and_a_skipped_step_changes_nothing() {
        let config = OptimConfig::default();
        let p = Tensor::from_slice(&[0.7f32]).set_requires_grad(true);
        let mut optimizer = AdamW::new(vec![p.shallow_clone()], &config);
        let (go, skip) = (Tensor::zeros([], CPU), Tensor::ones([], CPU));
        for (g, found_inf) in [(0.3, &go), (5.0, &skip), (-0.2, &go), (0.1, &go)] {
            optimizer.drop_grad().unwrap();
            assert!(!optimizer.gradients()[0].defined());
            set_gradient(&p, g);
            optimizer.step(&optimizer.gradients(), 1e-2, config.weight_decay, found_inf).unwrap();
        }
        let expected = closed_form(0.7, &[0.3, -0.2, 0.1], 1e-2, &config);
        assert!((p.double_value(&[0]) - expected).abs() < 1e-6);
        assert_eq!(optimizer.state[0].step.double_value(&[]), 3.0);
    }

    /// What is cached of a weight goes by its version.
    #[test]
    fn a_step_counts_as_a_write() {
        let p = Tensor::zeros([3], CPU).set_requires_grad(true);
        let mut optimizer = AdamW::new(vec![p.shallow_clone()], &OptimConfig::default());
        let before = libtorch::tensor_version(&p).unwrap();
        optimizer.step(&[Tensor::ones([3], CPU)], 1e-2, 0.1, &Tensor::zeros([], CPU)).unwrap();
        assert!(libtorch::tensor_version(&p).unwrap() > before);
    }

    #[test]
    fn clipping_scales_only_what_is_too_long() {
        for (max, factor) in [(1.0, 0.2), (10.0, 1.0)] {
            let grads = [Tensor::from_slice(&[3f32]), Tensor::from_slice(&[4f32])];
            let norm = libtorch::foreach_norms(&grads).unwrap().norm();
            assert_eq!(norm.double_value(&[]), 5.0);
            clip_gradients(&grads, &norm, max).unwrap();
            assert!((grads[0].double_value(&[0]) - 3.0 * factor).abs() < 1e-5);
        }
    }

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
