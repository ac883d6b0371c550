//! Weight decay of some of the parameters, whatever the optimizer: `optim.decay: matrices`.

use tch::{Kind, Tensor};

use crate::libtorch::{self, Error};

/// Tensors that decay, p ← p · (1 − lr · weight_decay), while others do not: decoupled weight decay (Loshchilov & Hutter
/// 2019, arXiv 1711.05101), which an optimizer then must not apply itself. In place of PyTorch's parameter groups, so
/// that the optimizer's state keeps its one group, and parts of parameters (ZeRO-1's shards) can decay.
#[derive(Debug)]
pub struct DecayingTensors(Vec<Tensor>);

impl DecayingTensors {
    /// All of `tensors`, parameters or views of parts of them, fp32.
    pub fn new(tensors: Vec<Tensor>) -> Self {
        Self(tensors)
    }

    /// Those of `params` that have two or more dimensions.
    pub fn matrices(params: &[Tensor]) -> Self {
        Self(params.iter().filter(|param| param.dim() >= 2).map(Tensor::shallow_clone).collect())
    }

    /// To be called before the optimizer's step. Nothing changes where `found_inf` (fp32 `[]`, on the tensors' device)
    /// is 1.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn decay(&self, lr: f64, weight_decay: f64, found_inf: &Tensor) -> Result<(), Error> {
        if self.0.is_empty() || weight_decay == 0.0 {
            return Ok(());
        }
        // Exactly 1 where the step is skipped, which the device alone knows. In fp64, rounded once, as PyTorch's.
        let factor = (found_inf.to_kind(Kind::Double) - 1.0) * (lr * weight_decay) + 1.0;
        libtorch::foreach_mul(&self.0, &factor.to_kind(Kind::Float))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn matrices_decay_and_a_skipped_step_changes_no_bit() {
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let params = [random(&[5, 7]), random(&[7]), random(&[2, 3, 4]), random(&[])];
        let before: Vec<Tensor> = params.iter().map(|p| p.detach().copy()).collect();
        let decaying = DecayingTensors::matrices(&params);
        let found_inf = |found: f64| Tensor::full([], found, (Kind::Float, Device::Cpu));
        // A rate of which 1 - x has no fp32 of its own, and one that is no small part of 1.
        for (lr, weight_decay) in [(1e-3, 0.1), (0.3, 0.9)] {
            decaying.decay(lr, weight_decay, &found_inf(1.0)).unwrap();
            assert!(params.iter().zip(&before).all(|(p, b)| p.equal(b)));
        }
        decaying.decay(0.3, 0.0, &found_inf(0.0)).unwrap();
        assert!(params.iter().zip(&before).all(|(p, b)| p.equal(b)));
        let version = libtorch::tensor_version(&params[0]).unwrap();
        decaying.decay(0.3, 0.1, &found_inf(0.0)).unwrap();
        assert!(libtorch::tensor_version(&params[0]).unwrap() > version, "what is cached of a weight goes by it");
        for (p, b) in params.iter().zip(&before) {
            let expected = if p.dim() >= 2 { b * (1.0f64 - 0.3 * 0.1) } else { b.shallow_clone() };
            assert!(p.equal(&expected), "{:?}", p.size());
        }
    }
}
