//! One optimizer step over 100 million parameters, AdamW8bit's beside libtorch's fused AdamW's, and the bytes of state
//! that each keeps: `cargo bench --bench adamw`.
//!
//! They take turns, so that a disturbance of the machine falls on both; medians and quartiles of 40 steps of each.
//! `BBT_CPU_KERNELS` chooses the kernels, `OMP_NUM_THREADS` the threads.

use std::time::Instant;

use bbt::config::{OptimConfig, OptimizerName};
use bbt::utils::optim::Optimizer;
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const WARMUP: usize = 3;
const STEPS: usize = 40;

fn main() {
    let tensors = || -> Vec<Tensor> { (0..25).map(|_| Tensor::randn([2000, 2000], CPU)).collect() };
    let grads = tensors();
    let go = Tensor::zeros([], CPU);
    let contenders = [("AdamW, fp32", OptimizerName::AdamW), ("AdamW8bit", OptimizerName::AdamW8bit)];
    let mut contenders = contenders.map(|(label, name)| {
        (label, Optimizer::new(tensors(), &OptimConfig { name, ..OptimConfig::default() }), vec![])
    });
    for round in 0..WARMUP + STEPS {
        for (_, optimizer, milliseconds) in &mut contenders {
            let begin = Instant::now();
            optimizer.step(&grads, 1e-3, 0.1, &go).expect("tensors that fit");
            if round >= WARMUP {
                milliseconds.push(begin.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    println!("| optimizer | ms per step | quartiles | state, MB |");
    println!("|---|---|---|---|");
    for (label, optimizer, milliseconds) in &mut contenders {
        milliseconds.sort_by(f64::total_cmp);
        let quartile = |k: usize| milliseconds[STEPS * k / 4];
        let state = optimizer.state.tensors();
        let bytes: usize = state.iter().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum();
        let (median, low, high) = (quartile(2), quartile(1), quartile(3));
        println!("| {label} | {median:.1} | {low:.1} … {high:.1} | {:.1} |", bytes as f64 / 1e6);
    }
}
