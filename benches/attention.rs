//! Causal attention, forward and backward, beside libtorch's: `cargo bench --bench attention`.
//!
//! `taskset -c 0 env OMP_NUM_THREADS=1 cargo bench …` measures one core; `BBT_CPU_KERNELS` chooses the kernels.

use std::hint::black_box;
use std::time::Duration;

use bbt::kernels::causal_attention;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

/// B, H, Hkv, T, D.
const SHAPES: [[i64; 5]; 5] =
    [[4, 6, 6, 512, 64], [2, 6, 6, 1024, 64], [1, 6, 2, 2048, 64], [4, 12, 12, 512, 32], [2, 6, 6, 512, 128]];

type Function = fn(&Tensor, &Tensor, &Tensor) -> Tensor;

fn libtorch(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let group = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(q, k, v, None::<Tensor>, 0.0, true, None, group)
}

fn ours(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    causal_attention(q, k, v).expect("tensors that fit")
}

/// Elements per second are floating-point operations: two products in forward, five in backward, each over the
/// lower triangle.
fn attention(c: &mut Criterion) {
    for kind in [Kind::BFloat16, Kind::Float] {
        let mut group = c.benchmark_group(format!("attention {kind:?}"));
        group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
        for [b, h, kv, t, d] in SHAPES {
            let new = |heads| {
                let x = Tensor::randn([b, t, heads, d], (Kind::Float, Device::Cpu)).to_kind(kind).transpose(1, 2);
                x.set_requires_grad(true)
            };
            let (q, k, v, dout) = (new(h), new(kv), new(kv), new(h).detach());
            let product = (b * h * t * (t + 1) * d) as u64;
            let shape = format!("B{b} H{h}/{kv} T{t} D{d}");
            let functions: [(&str, Function); 2] = [("bbt", ours), ("libtorch", libtorch)];
            for (name, f) in functions {
                group.throughput(Throughput::Elements(2 * product));
                group.bench_function(BenchmarkId::new(format!("{name} forward"), &shape), |bench| {
                    bench.iter(|| tch::no_grad(|| black_box(f(&q, &k, &v))));
                });
                group.throughput(Throughput::Elements(7 * product));
                group.bench_function(BenchmarkId::new(format!("{name} forward+backward"), &shape), |bench| {
                    bench.iter(|| {
                        Tensor::run_backward(&[f(&q, &k, &v).multiply(&dout).sum(kind)], &[&q, &k, &v], false, false)
                    });
                });
            }
        }
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
