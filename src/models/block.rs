//! One transformer block: x + attn(n1(x)), then x + mlp(n2(x)).

use tch::{Tensor, nn};

use super::{Attention, LayerCache, Mlp, RmsNorm, Rope};
use crate::config::{ModelConfig, QuantConfig};
use crate::libtorch::{or_panic, recompute_in_backward};
use crate::quantization::BitLinear;

/// Epsilon of every RMSNorm of the model.
pub(super) const RMS_EPS: f64 = 1e-6;

/// One pre-norm transformer block.
#[derive(Debug)]
pub struct Block {
    n1: RmsNorm,
    attn: Attention,
    n2: RmsNorm,
    mlp: Mlp,
}

impl Block {
    /// Adds `n1`, `attn`, `n2` and `mlp` to `vs`.
    pub fn new(vs: nn::Path, config: &ModelConfig, quant: &QuantConfig) -> Self {
        Self {
            n1: RmsNorm::new(&vs / "n1", config.d_model, RMS_EPS),
            attn: Attention::new(&vs / "attn", config, quant),
            n2: RmsNorm::new(&vs / "n2", config.d_model, RMS_EPS),
            mlp: Mlp::new(&vs / "mlp", config, quant),
        }
    }

    /// # Shapes
    /// `x`: `[B, T, d_model]` → the same.
    pub fn forward(&self, x: &Tensor, rope: &Rope, cache: Option<&mut LayerCache>) -> Tensor {
        let x = x + self.attn.forward(self.n1.input(x), rope, cache);
        &x + self.mlp.forward(self.n2.input(&x))
    }

    /// [`Block::forward`] with activation checkpointing: keeps one tensor for each half and computes
    /// the half again in backward. `x` must require a gradient.
    pub fn forward_checkpointed(&self, x: &Tensor, rope: &Rope) -> Tensor {
        // The graph owns what it recomputes with: handles to the same parameters.
        let (n1, attn, rope) = (self.n1.shallow_clone(), self.attn.shallow_clone(), rope.shallow_clone());
        let attention_half = move |x: &Tensor| x + attn.forward(n1.input(x), &rope, None);
        let (n2, mlp) = (self.n2.shallow_clone(), self.mlp.shallow_clone());
        let mlp_half = move |x: &Tensor| x + mlp.forward(n2.input(x));
        let x = recompute(attention_half, x);
        recompute(mlp_half, &x)
    }

    pub(super) fn set_quantization(&mut self, lambda: f64) {
        self.attn.set_quantization(lambda);
        self.mlp.set_quantization(lambda);
    }

    /// The quantized layers by name, in the order of the parameters.
    pub(super) fn layers(&self) -> impl Iterator<Item = (String, &BitLinear)> {
        let attention = self.attn.layers().map(|(name, layer)| (format!("attn.{name}"), layer));
        let mlp = self.mlp.layers().map(|(name, layer)| (format!("mlp.{name}"), layer));
        attention.into_iter().chain(mlp)
    }

    pub(super) fn freeze(&mut self) {
        self.attn.freeze();
        self.mlp.freeze();
    }
}

/// Panics where libtorch fails, as every tch operation in a forward pass does.
fn recompute(f: impl Fn(&Tensor) -> Tensor + Send + 'static, x: &Tensor) -> Tensor {
    or_panic(recompute_in_backward(f, x))
}
