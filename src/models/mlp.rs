//! The SwiGLU feed-forward layer (Shazeer 2020, arXiv 2002.05202).

use tch::{Tensor, nn};

use crate::config::{ModelConfig, QuantConfig};
use crate::quantization::{BitLinear, Input};

/// y = down(silu(gate) · up), with gate and up as one projection, gate first.
#[derive(Debug)]
pub struct Mlp {
    /// `[2 · d_ff, d_model]`
    gate_up: BitLinear,
    /// `[d_model, d_ff]`
    down: BitLinear,
}

impl Mlp {
    /// Adds `gate_up.weight` and `down.weight` to `vs`.
    pub fn new(vs: nn::Path, config: &ModelConfig, quant: &QuantConfig) -> Self {
        Self {
            gate_up: BitLinear::new(&vs / "gate_up", config.d_model, 2 * config.d_ff, false, quant),
            down: BitLinear::new(&vs / "down", config.d_ff, config.d_model, false, quant),
        }
    }

    /// # Shapes
    /// `x`: `[B, T, d_model]` → the same.
    pub fn forward(&self, x: Input) -> Tensor {
        let [gate_up] = BitLinear::forward_each([&self.gate_up], x);
        let [y] = BitLinear::forward_each([&self.down], Input::SwiGlu(&gate_up));
        y
    }

    pub(super) fn set_quantization(&mut self, lambda: f64) {
        self.gate_up.set_quantization(lambda);
        self.down.set_quantization(lambda);
    }

    /// The quantized layers by name, in the order of the parameters.
    pub(super) fn layers(&self) -> [(&'static str, &BitLinear); 2] {
        [("gate_up", &self.gate_up), ("down", &self.down)]
    }

    pub(super) fn freeze(&mut self) {
        self.gate_up.freeze();
        self.down.freeze();
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self { gate_up: self.gate_up.shallow_clone(), down: self.down.shallow_clone() }
    }
}
