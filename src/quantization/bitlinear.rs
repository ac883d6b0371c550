//! `BitLinear`: a linear layer over quantized weights and activations.
//!
//! y = act_quant(x) · ternary_quant(W)ᵀ + b, both with straight-through gradients
//! (BitNet b1.58, arXiv 2402.17764). The quantizers compute in fp32 under any autocast dtype;
//! the product runs in what autocast says.

use tch::{Tensor, nn};

use super::{TernaryQuantSTE, act_quant, act_quant_per_token, ternary_quant};
use crate::config::{ActQuant, QuantConfig, WeightQuant};

/// A linear layer over quantized weights and activations.
#[derive(Debug)]
pub struct BitLinear {
    /// Trained weight, `[out, in]` fp32, never quantized in place.
    pub weight: Tensor,
    /// Optional bias, `[out]` fp32, full precision.
    pub bias: Option<Tensor>,
    quant: QuantConfig,
    /// The quantized weight, once [`BitLinear::freeze`] was called.
    frozen: Option<Tensor>,
}

impl BitLinear {
    /// Adds `weight` (and `bias`) to `vs`, Kaiming-uniform with a = sqrt(5) as `torch.nn.Linear`:
    /// both uniform within ±1 / sqrt(in).
    pub fn new(vs: nn::Path, in_dim: i64, out_dim: i64, bias: bool, quant: &QuantConfig) -> Self {
        let bound = 1.0 / (in_dim as f64).sqrt();
        let init = nn::Init::Uniform { lo: -bound, up: bound };
        Self {
            weight: vs.var("weight", &[out_dim, in_dim], init),
            bias: bias.then(|| vs.var("bias", &[out_dim], init)),
            quant: *quant,
            frozen: None,
        }
    }

    /// # Shapes
    /// `x`: `[..., in]` → `[..., out]`, in autocast's dtype where it is on, else fp32.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if let Some(weight) = &self.frozen {
            let x = match self.quant.act {
                ActQuant::Int8 => act_quant(&x.to_kind(tch::Kind::Float)),
                ActQuant::None => x.shallow_clone(),
            };
            return x.linear(weight, self.bias.as_ref());
        }
        let x = match self.quant.act {
            ActQuant::Int8 => act_quant_per_token(x),
            ActQuant::None => x.shallow_clone(),
        };
        let weight = match self.quant.weight {
            WeightQuant::Ternary => TernaryQuantSTE { ste: self.quant.ste }.forward(&self.weight),
            WeightQuant::None => self.weight.shallow_clone(),
        };
        x.linear(&weight, self.bias.as_ref())
    }

    /// Quantizes the weight once, for inference: later changes of `weight` are not seen, and no
    /// gradient flows.
    pub fn freeze(&mut self) {
        self.frozen = Some(match self.quant.weight {
            WeightQuant::Ternary => ternary_quant(&self.weight).0,
            WeightQuant::None => self.weight.detach(),
        });
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            quant: self.quant,
            frozen: self.frozen.as_ref().map(Tensor::shallow_clone),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Precision;
    use crate::utils::device::autocast;
    use tch::{Device, Kind};

    #[test]
    fn quantizers_compute_in_fp32_under_any_autocast_dtype() {
        tch::manual_seed(6);
        let vs = nn::VarStore::new(Device::Cpu);
        let layer = BitLinear::new(vs.root(), 64, 32, false, &QuantConfig::default());
        let x = Tensor::randn([8, 64], (Kind::Float, Device::Cpu));
        let expected = layer.forward(&x).detach();
        for (precision, kind) in [(Precision::Bf16, Kind::BFloat16), (Precision::Fp16, Kind::Half)] {
            let y = autocast(Device::Cpu, precision, || layer.forward(&x)).unwrap();
            assert_eq!(y.kind(), kind);
            // What a product of rounded operands is off by: a wrong code, as of a quantizer in bf16, would be
            // off by much more in some element.
            let difference = (y.to_kind(Kind::Float) - &expected).abs().max() / expected.abs().max();
            assert!(difference.double_value(&[]) < 1e-2, "{precision:?}: {difference}");
            y.to_kind(Kind::Float).sum(Kind::Float).backward();
            assert_eq!(layer.weight.grad().kind(), Kind::Float);
        }
    }
}
