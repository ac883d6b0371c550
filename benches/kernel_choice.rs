//! What `quant.kernel: auto` could choose between: a layer by the fused kernels and by libtorch's operators, in turns,
//! at the shapes of configs/ and at few tokens: `cargo bench --bench kernel_choice`.
//!
//! Prints a table of milliseconds, medians, and of fused ÷ reference. `BBT_CPU_KERNELS` chooses the kernels; to compare
//! a lesser CPU's, lower libtorch's, too (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS).

use std::time::Instant;

use bbt::config::{Precision, QuantConfig, QuantKernel};
use bbt::quantization::{BitLinear, Input};
use bbt::utils::device::autocast;
use tch::{Device, Kind, Tensor, nn};

/// Turns that each takes, after one to warm up; the quick ones take more.
const TURNS: usize = 7;
const QUICK_TURNS: usize = 41;

/// Widths of a layer's input and of its outputs together.
const LAYERS: [(&str, i64, i64); 6] = [
    ("tiny, mlp in", 384, 2048),
    ("tiny, mlp out", 1024, 384),
    ("small, mlp in", 768, 4096),
    ("small, mlp out", 2048, 768),
    ("base, attention", 1536, 1536),
    ("base, mlp in", 1536, 8192),
];

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2] * 1e3
}

/// Milliseconds of a forward, and of a forward with its backward, by each of two layers in turns.
fn time(layers: [&BitLinear; 2], x: &Tensor, norm: &Tensor, precision: Precision) -> [[f64; 2]; 2] {
    let forward = |layer| {
        let run = || {
            let [y] = BitLinear::forward_each([layer], Input::RmsNorm { x, weight: norm, eps: 1e-6 });
            y
        };
        autocast(Device::Cpu, precision, run).expect("autocast on the CPU")
    };
    let turns = if x.size()[0] < 256 { QUICK_TURNS } else { TURNS };
    [false, true].map(|training| {
        let mut times = [vec![], vec![]];
        for turn in 0..=turns {
            for (layer, times) in layers.into_iter().zip(&mut times) {
                let began = Instant::now();
                match training {
                    true => forward(layer).sum(Kind::Float).backward(),
                    false => drop(tch::no_grad(|| forward(layer))),
                }
                if turn > 0 {
                    times.push(began.elapsed().as_secs_f64());
                }
            }
        }
        times.map(median)
    })
}

fn main() {
    println!("| layer | dtype | tokens | forward: fused, ms | reference | ÷ | with backward: fused | reference | ÷ |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (name, inputs, outputs) in LAYERS {
        for precision in [Precision::Fp32, Precision::Bf16] {
            for tokens in [1, 4, 16, 64, 256, 2048] {
                let vs = nn::VarStore::new(Device::Cpu);
                let [fused, reference] =
                    [("a", QuantKernel::Fused), ("b", QuantKernel::Reference)].map(|(name, kernel)| {
                        let quant = QuantConfig { kernel, ..QuantConfig::default() };
                        BitLinear::new(vs.root() / name, inputs, outputs, false, &quant)
                    });
                let new = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
                let (x, norm) = (new(&[tokens, inputs]), new(&[inputs]));
                let [[f, r], [ft, rt]] = time([&fused, &reference], &x, &norm, precision);
                let dtype = format!("{precision:?}").to_lowercase();
                println!(
                    "| {name}, {inputs} → {outputs} | {dtype} | {tokens} | {f:.2} | {r:.2} | {:.2} | {ft:.2} | {rt:.2} | {:.2} |",
                    f / r,
                    ft / rt
                );
            }
        }
    }
}
