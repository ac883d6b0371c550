//! int8 activations: symmetric, one absmax scale per token (BitNet b1.58, arXiv 2402.17764, §2).

use tch::{Kind, Tensor};

use super::ternary_quant::SMALLEST_SCALE;

/// The largest absolute value of each vector of `x` along the last dimension, at least 1e-8: what its scale is made of.
///
/// # Shapes
/// `x`: `[..., D]` fp32 → `[..., 1]`.
pub(super) fn row_absmax(x: &Tensor) -> Tensor {
    x.abs().amax([-1], true).clamp_min(SMALLEST_SCALE)
}

/// The quantized values of `x`, one scale absmax / 127 for each vector along the last dimension.
///
/// # Shapes
/// `x`: `[..., D]` fp32 → the same. No gradient flows through.
pub fn act_quant(x: &Tensor) -> Tensor {
    let x = x.detach();
    let scale = row_absmax(&x) / 127.0;
    (x / &scale).round().clamp(-127, 127) * scale
}

/// [`act_quant`] with a straight-through estimator: `x + (xq - x).detach()`.
///
/// Without it only the largest element of each row would get a gradient, since rounding has none:
/// a model with quantized activations would hardly learn.
pub fn act_quant_per_token(x: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Float);
    let xq = act_quant(&x);
    &x + (xq - &x).detach()
}

/// [`act_quant`] without an estimator, as autograd makes of it: rounding has no gradient, so that it flows through the
/// scale alone, to the largest element of each row. The PyTorch original's rule, to compare with.
pub fn act_quant_through_scale(x: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Float);
    let scale = x.abs().amax([-1], true).clamp_min(SMALLEST_SCALE) / 127.0;
    (&x / &scale).detach().round().clamp(-127, 127) * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn each_row_has_its_own_127_steps() {
        tch::manual_seed(4);
        let x = Tensor::randn([3, 5, 32], (Kind::Float, Device::Cpu)) * 10.0;
        let xq = act_quant(&x);
        let scale = x.abs().amax([-1], true) / 127.0;
        let codes = &xq / &scale;
        assert!((&codes - codes.round()).abs().max().double_value(&[]) < 1e-4);
        assert!((codes.abs().amax([-1], false) - 127.0).abs().max().double_value(&[]) < 1e-4);
        // No element is further than half a step from where it was.
        assert!(((xq - x).abs() / scale).max().double_value(&[]) <= 0.5 + 1e-4);
    }

    #[test]
    fn every_element_gets_its_gradient() {
        tch::manual_seed(5);
        let x = Tensor::randn([2, 16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let weight = Tensor::arange(32, (Kind::Float, Device::Cpu)).view([2, 16]);
        (act_quant_per_token(&x) * &weight).sum(Kind::Float).backward();
        assert!(x.grad().equal(&weight));
    }

    #[test]
    fn without_an_estimator_the_largest_element_gets_all() {
        tch::manual_seed(7);
        let x = Tensor::randn([5, 16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let upstream = Tensor::randn([5, 16], (Kind::Float, Device::Cpu));
        let y = act_quant_through_scale(&x);
        assert!(y.equal(&act_quant(&x)));
        (&y * &upstream).sum(Kind::Float).backward();
        // y = q(x) · max|x| / 127, of which only max|x| has a derivative: the sign, at the largest element.
        let (gradient, x) = (x.grad(), x.detach());
        let largest = x.abs().amax([-1], true);
        let through = (&upstream * &y.detach() / &largest).sum_dim_intlist([-1].as_slice(), true, Kind::Float);
        let expected = x.abs().eq_tensor(&largest).to_kind(Kind::Float) * x.sign() * through;
        assert!((gradient - expected).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn zeros_stay_zeros() {
        let zeros = Tensor::zeros([2, 4], (Kind::Float, Device::Cpu));
        assert!(act_quant_per_token(&zeros).equal(&zeros));
    }
}
