//! BitLinear layers with what precedes them, forward and backward, beside the chains of libtorch's operators that they
//! replace, in bf16 (under autocast there): `cargo bench --bench bit_linear`.
//!
//! `BBT_CPU_KERNELS` chooses the kernels, `OMP_NUM_THREADS` the threads.

use std::hint::black_box;
use std::time::Duration;

use bbt::kernels::{Prologue, TernaryWeight, bit_linear, cross_entropy_mean, rope};
use bbt::libtorch::{Autocast, AutocastDtype};
use bbt::quantization::{TernaryQuantSTE, act_quant_per_token};
use bbt::{config::Ste, training::loss::cross_entropy};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

/// Tokens.
const N: i64 = 2048;
const EPS: f64 = 1e-6;

fn randn(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind).set_requires_grad(true)
}

fn time(group: &mut BenchmarkGroup<WallTime>, name: &str, leaves: &[&Tensor], f: impl Fn() -> Vec<Tensor>) {
    let _region = Autocast::enter(Device::Cpu, AutocastDtype::BFloat16).expect("autocast on the CPU");
    group.bench_function(format!("{name} forward"), |bench| bench.iter(|| tch::no_grad(|| black_box(f()))));
    let outputs = f();
    let gradients: Vec<_> = outputs.iter().map(|y| y.detach().ones_like()).collect();
    group.bench_function(format!("{name} forward+backward"), |bench| {
        bench.iter(|| {
            // Giving the outputs their gradients takes its time, too, the same for both.
            let sum: Tensor = f().iter().zip(&gradients).map(|(y, dy)| (y * dy).sum(Kind::Float)).sum();
            Tensor::run_backward(&[sum], leaves, false, false)
        });
    });
}

#[derive(Clone, Copy)]
enum Before {
    Norm,
    Gate,
}

/// The width of a layer's input, those of its outputs, and what precedes it.
const LAYERS: [(&str, i64, &[i64], Before); 4] = [
    ("RMSNorm 384 -> 3 x 384", 384, &[384, 384, 384], Before::Norm),
    ("RMSNorm 384 -> 2048", 384, &[2048], Before::Norm),
    ("SwiGLU 1024 -> 384", 1024, &[384], Before::Gate),
    ("RMSNorm 1024 -> 1024", 1024, &[1024], Before::Norm),
];

fn layers(c: &mut Criterion) {
    for (name, inner, outs, before) in LAYERS {
        let mut group = settings(c, name);
        let x = match before {
            Before::Norm => randn(&[N, inner], Kind::Float),
            Before::Gate => randn(&[N, 2 * inner], Kind::BFloat16),
        };
        let norm = Tensor::ones([inner], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let weights: Vec<_> = outs.iter().map(|&out| randn(&[out, inner], Kind::Float)).collect();
        let mut leaves: Vec<_> = [&x].into_iter().chain(&weights).collect();
        if let Before::Norm = before {
            leaves.push(&norm);
        }
        // As in a step of several microbatches.
        let ternary: Vec<_> = weights.iter().map(|w| TernaryWeight::new(w).expect("a weight")).collect();
        let pairs: Vec<_> = weights.iter().map(Some).zip(&ternary).collect();
        time(&mut group, "bbt", &leaves, || {
            let prologue = match before {
                Before::Norm => Prologue::RmsNorm { weight: &norm, eps: EPS },
                Before::Gate => Prologue::SwiGlu,
            };
            bit_linear(&x, prologue, &pairs, false, Kind::BFloat16).expect("tensors that fit").0
        });
        time(&mut group, "libtorch", &leaves, || {
            let h = match before {
                Before::Norm => x.rms_norm([inner], Some(&norm), EPS),
                Before::Gate => {
                    let halves = x.chunk(2, -1);
                    halves[0].silu() * &halves[1]
                }
            };
            let linear =
                |w| act_quant_per_token(&h).linear(&TernaryQuantSTE { ste: Ste::Identity }.forward(w), None::<&Tensor>);
            weights.iter().map(linear).collect()
        });
    }
}

fn quantized_weight(c: &mut Criterion) {
    let mut group = settings(c, "ternary weight 1024 x 384");
    let w = randn(&[1024, 384], Kind::Float);
    group.bench_function("bbt", |bench| bench.iter(|| TernaryWeight::new(&w)));
}

fn positions(c: &mut Criterion) {
    let mut group = settings(c, "rope 4 x 512 x 6 x 64");
    let (x, cos, sin) =
        (randn(&[4, 512, 6, 64], Kind::BFloat16), randn(&[512, 32], Kind::Float), randn(&[512, 32], Kind::Float));
    let (cos, sin) = (cos.detach(), sin.detach());
    time(&mut group, "bbt", &[&x], || vec![rope(&x, &cos, &sin).expect("tensors that fit")]);
    time(&mut group, "libtorch", &[&x], || {
        let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        vec![Tensor::cat(&[a * &cos - b * &sin, a * &sin + b * &cos], -1).to_kind(Kind::BFloat16)]
    });
}

fn loss(c: &mut Criterion) {
    let mut group = settings(c, "cross-entropy 2048 x 256");
    let (logits, targets) = (randn(&[N, 256], Kind::BFloat16), Tensor::randint(256, [N], (Kind::Int64, Device::Cpu)));
    time(&mut group, "bbt", &[&logits], || vec![cross_entropy_mean(&logits, &targets).expect("tensors that fit")]);
    time(&mut group, "libtorch", &[&logits], || vec![cross_entropy(&logits, &targets)]);
}

fn settings<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

criterion_group!(benches, layers, quantized_weight, positions, loss);
criterion_main!(benches);
