//! Cross-entropy of the next byte, in nats.

use tch::{Kind, Reduction, Tensor};

use crate::config::QuantKernel;
use crate::libtorch::{Error, cross_entropy_mean};

/// Nats to bits.
pub const BITS_PER_NAT: f64 = std::f64::consts::LOG2_E;

/// Mean cross-entropy in nats per byte, computed in fp32.
///
/// # Shapes
/// `logits`: `[B, T, 256]`, `targets`: `[B, T]` int64 → `[]` fp32.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Tensor {
    reduced(logits, targets, Reduction::Mean)
}

/// [`cross_entropy`] as training computes it: by a kernel of our own, unless `kernel` says otherwise.
pub fn training_loss(kernel: QuantKernel, logits: &Tensor, targets: &Tensor) -> Result<Tensor, Error> {
    match kernel {
        QuantKernel::Reference => Ok(cross_entropy(logits, targets)),
        QuantKernel::Auto | QuantKernel::Fused => cross_entropy_mean(logits, targets),
    }
}

/// Cross-entropy of each byte, in nats.
///
/// # Shapes
/// `logits`: `[B, T, 256]`, `targets`: `[B, T]` int64 → `[B, T]` fp32.
pub fn cross_entropy_per_byte(logits: &Tensor, targets: &Tensor) -> Tensor {
    reduced(logits, targets, Reduction::None).view_as(targets)
}

fn reduced(logits: &Tensor, targets: &Tensor, reduction: Reduction) -> Tensor {
    let logits = logits.flatten(0, -2).to_kind(Kind::Float);
    logits.cross_entropy_loss(&targets.flatten(0, -1), None::<&Tensor>, reduction, -100, 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn equals_the_closed_form_in_fp64() {
        tch::manual_seed(2);
        let logits = Tensor::randn([2, 3, 256], (Kind::Float, Device::Cpu));
        let targets = Tensor::randint(256, [2, 3], (Kind::Int64, Device::Cpu));
        let exact = logits.to_kind(Kind::Double);
        let chosen = exact.gather(-1, &targets.unsqueeze(-1), false).squeeze_dim(-1);
        let expected = exact.logsumexp([-1], false) - chosen;
        assert!((cross_entropy_per_byte(&logits, &targets) - &expected).abs().max().double_value(&[]) < 1e-5);
        let mean = expected.mean(Kind::Double).double_value(&[]);
        assert!((cross_entropy(&logits, &targets).double_value(&[]) - mean).abs() < 1e-5);
    }

    #[test]
    fn knowing_nothing_costs_eight_bits() {
        let logits = Tensor::zeros([1, 4, 256], (Kind::BFloat16, Device::Cpu));
        let loss = cross_entropy(&logits, &Tensor::zeros([1, 4], (Kind::Int64, Device::Cpu)));
        assert!((loss.double_value(&[]) * BITS_PER_NAT - 8.0).abs() < 1e-5);
    }
}
