//! One optimizer step over 100 million parameters, AdamW8bit's beside libtorch's fused AdamW's: `cargo bench --bench
//! adamw`. Says how many bytes of state each keeps, too.
//!
//! `BBT_CPU_KERNELS` chooses the kernels, `OMP_NUM_THREADS` the threads.

use std::time::Duration;

use bbt::config::{OptimConfig, OptimizerName};
use bbt::utils::optim::Optimizer;
use criterion::{Criterion, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("AdamW, 100M parameters");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(10));
    for (label, name) in [("fp32", OptimizerName::AdamW), ("8 bits", OptimizerName::AdamW8bit)] {
        let tensors = |f: fn() -> Tensor| -> Vec<Tensor> { (0..25).map(|_| f()).collect() };
        let params = tensors(|| Tensor::randn([2000, 2000], CPU));
        let grads = tensors(|| Tensor::randn([2000, 2000], CPU));
        let mut optimizer = Optimizer::new(params, &OptimConfig { name, ..OptimConfig::default() });
        let go = Tensor::zeros([], CPU);
        let bytes = optimizer.state.tensors().iter().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum::<usize>();
        eprintln!("{label}: {bytes} bytes of state");
        group.bench_function(label, |bench| {
            bench.iter(|| optimizer.step(&grads, 1e-3, 0.1, &go).expect("tensors that fit"));
        });
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
