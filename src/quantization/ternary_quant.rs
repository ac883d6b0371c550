//! Ternary weights: gamma = mean|w|, wq = round(clamp(w / gamma, -1, 1)) · gamma
//! (BitNet b1.58, arXiv 2402.17764, equations 1–3).

use tch::{Kind, Tensor};

use crate::config::Ste;

/// Below this a scale counts as zero: keeps an all-zero tensor from dividing by zero.
pub(super) const SMALLEST_SCALE: f64 = 1e-8;

/// The ternary values of `w` times their scale, and the scale gamma = mean|w| over the whole tensor.
///
/// # Shapes
/// `w`: any, fp32 → the same shape; gamma: `[]`. No gradient flows through either.
pub fn ternary_quant(w: &Tensor) -> (Tensor, Tensor) {
    let w = w.detach();
    let gamma = w.abs().mean(Kind::Float).clamp_min(SMALLEST_SCALE);
    let wq = (&w / &gamma).clamp(-1, 1).round() * &gamma;
    (wq, gamma)
}

/// Ternary quantization with a straight-through estimator, as detach arithmetic:
/// `w + (wq - w).detach()` has wq's value and w's gradient.
#[derive(Debug, Clone, Copy)]
pub struct TernaryQuantSTE {
    /// Which gradient passes.
    pub ste: Ste,
}

impl TernaryQuantSTE {
    /// Quantizes `w` (any shape) in fp32.
    pub fn forward(&self, w: &Tensor) -> Tensor {
        let w = w.to_kind(Kind::Float);
        let (wq, gamma) = ternary_quant(&w);
        let passing = match self.ste {
            Ste::Identity => w.shallow_clone(),
            // Where |w / gamma| > 1 the value is the same but carries no gradient.
            Ste::Clipped => {
                let inside = w.detach().abs().le_tensor(&gamma);
                w.where_self(&inside, &w.detach())
            }
        };
        passing + (wq - w).detach()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn weights() -> Tensor {
        tch::manual_seed(3);
        Tensor::randn([16, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true)
    }

    #[test]
    fn values_are_minus_one_zero_or_one_times_the_mean() {
        let w = weights();
        let (wq, gamma) = ternary_quant(&w);
        let mean = w.detach().to_kind(Kind::Double).abs().mean(Kind::Double).double_value(&[]);
        assert!((gamma.double_value(&[]) - mean).abs() < 1e-6);
        let units: Vec<f32> = Vec::try_from((wq / gamma).flatten(0, -1)).unwrap();
        assert!(units.iter().all(|u| [-1.0, 0.0, 1.0].contains(u)));
        assert!(units.contains(&0.0) && units.contains(&1.0) && units.contains(&-1.0));
    }

    #[test]
    fn identity_passes_every_gradient_and_clipped_only_those_inside() {
        for ste in [Ste::Identity, Ste::Clipped] {
            let w = weights();
            let weight = Tensor::arange(128, (Kind::Float, Device::Cpu)).view([16, 8]);
            (TernaryQuantSTE { ste }.forward(&w) * &weight).sum(Kind::Float).backward();
            let (_, gamma) = ternary_quant(&w);
            let inside = w.detach().abs().le_tensor(&gamma).to_kind(Kind::Float);
            let expected = if ste == Ste::Identity { weight } else { weight * inside };
            assert!(w.grad().equal(&expected), "{ste:?}");
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let zeros = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu));
        assert!(TernaryQuantSTE { ste: Ste::Identity }.forward(&zeros).equal(&zeros));
    }
}
