//! Optimizers over the model's parameters; and the gradient scaler.

mod adamw;
mod adamw8bit;
mod grad_scaler;
mod piece;

pub use adamw::AdamWState;
pub use adamw8bit::{AdamW8bit, AdamW8bitState, Moments, dynamic_map};
pub use grad_scaler::{GradScaler, ScalerState};
pub use piece::Piece;

use tch::{Device, Tensor};

use crate::config::{Config, OptimConfig, OptimizerName};
use crate::kernels::AdamW8bitKernel;
use crate::libtorch::{self, AdamWStep, Error};

/// Whose kernel the optimizer of `config` takes on `device`; none where it is not a matter of choice.
///
/// # Errors
/// Those of [`AdamW8bitKernel::find`].
pub fn adamw8bit_kernel(config: &Config, device: Device) -> Result<Option<AdamW8bitKernel>, Error> {
    match device.is_cuda() && config.optim.name == OptimizerName::AdamW8bit {
        true => AdamW8bitKernel::find().map(Some),
        false => Ok(None),
    }
}

/// The optimizer of `optim.name` over a list of parameters in PyTorch's order.
#[derive(Debug)]
pub struct Optimizer {
    params: Vec<Tensor>,
    /// What it keeps.
    pub state: OptimizerState,
    config: OptimConfig,
}

/// What an optimizer keeps of its parameters, in their order.
#[derive(Debug)]
pub enum OptimizerState {
    /// torch.optim.AdamW's.
    AdamW(Vec<AdamWState>),
    /// bitsandbytes' AdamW8bit's.
    AdamW8bit(AdamW8bit),
}

impl OptimizerState {
    /// That of parameters of these shapes before the first step.
    pub fn zeros<S: AsRef<[i64]>>(name: OptimizerName, sizes: &[S], device: Device) -> Self {
        let sizes = sizes.iter().map(AsRef::as_ref);
        match name {
            OptimizerName::AdamW => Self::AdamW(sizes.map(|size| AdamWState::zeros(size, device)).collect()),
            OptimizerName::AdamW8bit => {
                Self::AdamW8bit(AdamW8bit::new(sizes.map(|size| AdamW8bitState::zeros(size, device)).collect()))
            }
        }
    }

    /// That of `pieces` of parameters of these shapes: the state of a whole parameter ([`OptimizerState::zeros`]), cut.
    pub fn zeros_of_pieces<S: AsRef<[i64]>>(
        name: OptimizerName,
        sizes: &[S],
        pieces: &[Piece],
        device: Device,
    ) -> Self {
        let numel = |piece: &Piece| sizes[piece.param].as_ref().iter().product();
        match name {
            OptimizerName::AdamW => {
                Self::AdamW(pieces.iter().map(|piece| AdamWState::zeros(&[piece.len], device)).collect())
            }
            OptimizerName::AdamW8bit => {
                let zeros = |piece| AdamW8bitState::zeros_within(numel(piece), &[piece.len], device);
                Self::AdamW8bit(AdamW8bit::new(pieces.iter().map(zeros).collect()))
            }
        }
    }

    /// That of `pieces` of the parameters, as views: what is written to them is written here.
    pub fn pieces(&self, pieces: &[Piece]) -> Self {
        match self {
            Self::AdamW(state) => Self::AdamW(pieces.iter().map(|piece| state[piece.param].piece(*piece)).collect()),
            Self::AdamW8bit(state) => Self::AdamW8bit(state.pieces(pieces)),
        }
    }

    /// Whose state it is.
    pub fn name(&self) -> OptimizerName {
        match self {
            Self::AdamW(_) => OptimizerName::AdamW,
            Self::AdamW8bit(_) => OptimizerName::AdamW8bit,
        }
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        match self {
            Self::AdamW(state) => state.len(),
            Self::AdamW8bit(state) => state.params.len(),
        }
    }

    /// Whether it is that of no parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Handles to all tensors.
    pub fn tensors(&self) -> Vec<Tensor> {
        match self {
            Self::AdamW(state) => state.iter().flat_map(AdamWState::tensors).collect(),
            Self::AdamW8bit(state) => state.params.iter().flat_map(AdamW8bitState::tensors).collect(),
        }
    }

    /// Takes over the values of the same optimizer's state over parameters of the same shapes, from whatever device.
    pub fn copy_from(&mut self, other: &Self) {
        let _no_grad = tch::no_grad_guard();
        self.tensors().iter_mut().zip(other.tensors()).for_each(|(to, from)| to.copy_(&from));
    }

    /// The same moments as `name` keeps them: rounded to 8 bits, or what 8 bits stand for. On the CPU.
    pub fn converted(self, name: OptimizerName) -> Self {
        match (self, name) {
            (Self::AdamW(state), OptimizerName::AdamW8bit) => Self::AdamW8bit(AdamW8bit::of_adamw(&state)),
            (Self::AdamW8bit(state), OptimizerName::AdamW) => Self::AdamW(state.to_adamw()),
            (same, _) => same,
        }
    }
}

impl Optimizer {
    /// A fresh optimizer: zero moments, no steps taken.
    pub fn new(params: Vec<Tensor>, config: &OptimConfig) -> Self {
        let sizes: Vec<_> = params.iter().map(Tensor::size).collect();
        let device = params.first().map_or(Device::Cpu, Tensor::device);
        Self { params, state: OptimizerState::zeros(config.name, &sizes, device), config: config.clone() }
    }

    /// A fresh optimizer of `pieces` of parameters of shapes `sizes`; `params` are the pieces, `[len]` each. What it
    /// does to them is what one over whole parameters does.
    pub fn of_pieces<S: AsRef<[i64]>>(
        params: Vec<Tensor>,
        sizes: &[S],
        pieces: &[Piece],
        config: &OptimConfig,
    ) -> Self {
        let device = params.first().map_or(Device::Cpu, Tensor::device);
        let state = OptimizerState::zeros_of_pieces(config.name, sizes, pieces, device);
        Self { params, state, config: config.clone() }
    }

    /// What it steps: the parameters, in PyTorch's order, or pieces of them.
    pub fn params(&self) -> &[Tensor] {
        &self.params
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
        let step = AdamWStep { lr, betas: self.config.betas, eps: self.config.eps, weight_decay };
        match &self.state {
            OptimizerState::AdamW(state) => adamw::step(&self.params, grads, state, step, found_inf),
            OptimizerState::AdamW8bit(state) => state.step(&self.params, grads, step, found_inf),
        }
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

#[cfg(test)]
mod tests {
    use tch::Kind;

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
        for name in [OptimizerName::AdamW, OptimizerName::AdamW8bit] {
            let config = OptimConfig { name, ..OptimConfig::default() };
            let p = Tensor::from_slice(&[0.7f32]).set_requires_grad(true);
            let mut optimizer = Optimizer::new(vec![p.shallow_clone()], &config);
            let (go, skip) = (Tensor::zeros([], CPU), Tensor::ones([], CPU));
            for (g, found_inf) in [(0.3, &go), (5.0, &skip), (-0.2, &go), (0.1, &go)] {
                optimizer.drop_grad().unwrap();
                assert!(!optimizer.gradients()[0].defined());
                set_gradient(&p, g);
                optimizer.step(&optimizer.gradients(), 1e-2, config.weight_decay, found_inf).unwrap();
            }
            let expected = closed_form(0.7, &[0.3, -0.2, 0.1], 1e-2, &config);
            assert!((p.double_value(&[0]) - expected).abs() < 1e-6);
            assert_eq!(optimizer.state.tensors()[0].double_value(&[]), 3.0, "steps counted");
        }
    }

    /// What is cached of a weight goes by its version.
    #[test]
    fn a_step_counts_as_a_write() {
        for name in [OptimizerName::AdamW, OptimizerName::AdamW8bit] {
            let params = [3, 5000].map(|n| Tensor::zeros([n], CPU).set_requires_grad(true));
            let versions = || params.each_ref().map(|p| libtorch::tensor_version(p).unwrap());
            let config = OptimConfig { name, ..OptimConfig::default() };
            let mut optimizer = Optimizer::new(params.each_ref().map(Tensor::shallow_clone).into(), &config);
            let before = versions();
            let grads = [3, 5000].map(|n| Tensor::ones([n], CPU));
            optimizer.step(&grads, 1e-2, 0.1, &Tensor::zeros([], CPU)).unwrap();
            assert!(versions().iter().zip(before).all(|(after, before)| *after > before));
        }
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
}
