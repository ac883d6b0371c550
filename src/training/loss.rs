//! Cross-entropy of the next byte, in nats.

use tch::{Kind, Reduction, Tensor};

use crate::config::QuantKernel;
use crate::kernels::cross_entropy_mean;
use crate::libtorch::Error;

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

/// Bytes that count as whitespace: tab, line feed, vertical tab, form feed, carriage return, blank.
const WHITESPACE: [i64; 6] = [9, 10, 11, 12, 13, 32];

/// The sums of the losses, and the numbers, of whitespace and of all other bytes: `[whitespace nats, whitespace bytes,
/// other nats, other bytes]`, without gradients.
///
/// # Shapes
/// `logits`: `[B, T, 256]`, `targets`: `[B, T]` int64 → `[4]` fp64.
pub fn byte_class_sums(logits: &Tensor, targets: &Tensor) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let losses = cross_entropy_per_byte(logits, targets).to_kind(Kind::Double);
    let kinds = Tensor::from_slice(&WHITESPACE).to_device(targets.device());
    let whitespace = Tensor::isin(targets, &kinds, false, false);
    let sums = [&whitespace, &whitespace.logical_not()].map(|class| {
        let class_losses = losses.where_scalarother(class, 0.0).sum(Kind::Double);
        [class_losses, class.to_kind(Kind::Double).sum(Kind::Double)]
    });
    Tensor::stack(&sums.into_iter().flatten().collect::<Vec<_>>(), 0)
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
    fn whitespace_and_other_bytes_are_summed_apart() {
        tch::manual_seed(3);
        let logits = Tensor::randn([2, 8, 256], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let text = *b"a b\n\tc\x0b\x0c\r\xa0\x85de  ";
        let tokens: Vec<i64> = text.iter().map(|&byte| byte.into()).chain([0]).take(16).collect();
        let targets = Tensor::from_slice(&tokens).view([2, 8]);
        let losses = Vec::<f32>::try_from(cross_entropy_per_byte(&logits, &targets).flatten(0, -1)).unwrap();
        // Python's bytes.isspace.
        let is_space = |byte: i64| matches!(byte, 32 | 9..=13);
        let mut expected = [0.0; 4];
        for (&byte, loss) in tokens.iter().zip(losses) {
            let at = if is_space(byte) { 0 } else { 2 };
            expected[at] += f64::from(loss);
            expected[at + 1] += 1.0;
        }
        let sums = byte_class_sums(&logits, &targets);
        assert!(!sums.requires_grad());
        let sums = Vec::<f64>::try_from(sums).unwrap();
        assert!(
            sums.iter().zip(expected).all(|(sum, expected)| (sum - expected).abs() < 1e-9),
            "{sums:?} {expected:?}"
        );
        assert_eq!((sums[1], sums[1] + sums[3]), (8.0, 16.0));
    }

    #[test]
    fn knowing_nothing_costs_eight_bits() {
        let logits = Tensor::zeros([1, 4, 256], (Kind::BFloat16, Device::Cpu));
        let loss = cross_entropy(&logits, &Tensor::zeros([1, 4], (Kind::Int64, Device::Cpu)));
        assert!((loss.double_value(&[]) * BITS_PER_NAT - 8.0).abs() < 1e-5);
    }
}
