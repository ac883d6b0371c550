//! Ternary weights and int8 activations with straight-through estimators
//! (BitNet b1.58, Ma et al. 2024, arXiv 2402.17764), and the linear layer made of them.

mod act_quant;
mod bitlinear;
mod input;
mod ternary_quant;

pub use act_quant::{act_quant, act_quant_per_token, act_quant_through_scale};
pub use bitlinear::BitLinear;
pub use input::{Input, rms_norm};
pub use ternary_quant::{TernaryQuantSTE, ternary_quant};
