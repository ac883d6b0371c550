//! Each building block against the values that the PyTorch original computed.

use crate::common::{Golden, relative_difference};
use bbt::config::{ActQuant, Attention, QuantConfig, Ste};
use bbt::models::{Block, RmsNorm, Rope};
use bbt::quantization::{BitLinear, TernaryQuantSTE, act_quant_per_token, ternary_quant};
use tch::{Device, Tensor, nn};

const TOLERANCE: f64 = 1e-5;

fn close(actual: &Tensor, expected: &Tensor) {
    let difference = relative_difference(actual, expected);
    assert!(difference < TOLERANCE, "differs by {difference}");
}

#[test]
fn ternary_weights() {
    let golden = Golden::open("bitbyte_tiny");
    let w = golden.tensor("op.weight");
    // The quantizer itself to the last bit; through the estimator to fp32 rounding.
    assert!(ternary_quant(w).0.equal(golden.tensor("op.ternary.out")));
    for ste in [Ste::Identity, Ste::Clipped] {
        close(&TernaryQuantSTE { ste }.forward(w), golden.tensor("op.ternary.out"));
    }
}

#[test]
fn int8_activations() {
    let golden = Golden::open("bitbyte_tiny");
    assert!(bbt::quantization::act_quant(golden.tensor("op.x")).equal(golden.tensor("op.act_quant.out")));
    close(&act_quant_per_token(golden.tensor("op.x")), golden.tensor("op.act_quant.out"));
}

#[test]
fn bitlinear_with_and_without_bias_and_activation_quantization() {
    let golden = Golden::open("bitbyte_tiny");
    for (act, bias, name) in
        [(ActQuant::Int8, true, "op.bitlinear.out"), (ActQuant::None, false, "op.bitlinear_noact.out")]
    {
        let vs = nn::VarStore::new(Device::Cpu);
        let quant = QuantConfig { act, ..QuantConfig::default() };
        let mut layer = BitLinear::new(vs.root(), 64, 24, bias, &quant);
        let _no_grad = tch::no_grad_guard();
        layer.weight().expect("trained").shallow_clone().copy_(golden.tensor("op.weight"));
        if let Some(bias) = &mut layer.bias {
            bias.copy_(golden.tensor("op.bitlinear.bias"));
        }
        close(&layer.forward(golden.tensor("op.x")), golden.tensor(name));
        layer.freeze();
        close(&layer.forward(golden.tensor("op.x")), golden.tensor(name));
    }
}

#[test]
fn rmsnorm() {
    let golden = Golden::open("bitbyte_tiny");
    let vs = nn::VarStore::new(Device::Cpu);
    let mut norm = RmsNorm::new(vs.root(), 64, 1e-6);
    tch::no_grad(|| norm.weight.copy_(golden.tensor("op.rmsnorm.weight")));
    close(&norm.forward(golden.tensor("op.x")), golden.tensor("op.rmsnorm.out"));
}

#[test]
fn rope_from_any_position() {
    let golden = Golden::open("bitbyte_tiny");
    for (start, name) in [(0, "op.rope.out"), (5, "op.rope.out_from5")] {
        // [B, H, T, D]
        let [x, expected] = ["op.rope.x", name].map(|name| golden.tensor(name).transpose(1, 2));
        for fused in [false, true] {
            close(&Rope::new(16, 10000.0, start, 9, Device::Cpu, fused).apply(&x), &expected);
        }
    }
}

#[test]
fn block_with_either_attention() {
    let golden = Golden::open("bitbyte_tiny");
    for (attention, name) in [
        (Attention::Auto, "op.block.out"),
        (Attention::Sdpa, "op.block.out"),
        (Attention::Math, "op.block.out_math_attention"),
    ] {
        let config = bbt::config::ModelConfig { attention, ..golden.model_config() };
        let vs = nn::VarStore::new(Device::Cpu);
        let block = Block::new(vs.root(), &config, &golden.quant_config(Ste::Identity));
        let weights = golden.with_prefix("op.block.");
        tch::no_grad(|| vs.variables().iter_mut().for_each(|(name, v)| v.copy_(&weights[name])));
        let x = golden.tensor("op.x");
        let rope = Rope::new(16, 10000.0, 0, x.size()[1], Device::Cpu, false);
        close(&block.forward(x, &rope, None), golden.tensor(name));
    }
}
