//! Random inputs for the tests of kernels: drawn anew each time, and again by `BBT_TEST_SEED`, which a test that fails
//! has printed. libtorch's own generator is the whole process's, and tests run side by side.

use std::cell::RefCell;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tch::{Kind, Tensor};

const VARIABLE: &str = "BBT_TEST_SEED";

thread_local! {
    static GENERATOR: RefCell<StdRng> = RefCell::new(generator());
}

fn generator() -> StdRng {
    let seed = match std::env::var(VARIABLE) {
        Ok(seed) => seed.parse().expect("BBT_TEST_SEED is a number"),
        Err(_) => rand::random(),
    };
    // Shown where the test fails.
    println!("{VARIABLE}={seed} draws these inputs again");
    StdRng::seed_from_u64(seed)
}

/// Begins a test: what it draws from here on depends on the seed alone, not on what ran before on its thread.
pub fn seed() {
    GENERATOR.with_borrow_mut(|random| *random = generator());
}

fn draw(size: &[i64], one: impl Fn(&mut StdRng) -> f64) -> Tensor {
    let n = size.iter().product::<i64>();
    let values: Vec<f32> = GENERATOR.with_borrow_mut(|random| (0..n).map(|_| one(random) as f32).collect());
    Tensor::from_slice(&values).view(size)
}

/// From the normal distribution of mean 0 and variance 1: fp32.
pub fn randn(size: &[i64]) -> Tensor {
    // Box and Muller's.
    draw(size, |random| {
        let (u, v): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    })
}

/// Evenly from 0 to 1: fp32.
pub fn rand(size: &[i64]) -> Tensor {
    draw(size, |random| random.random())
}

/// Integers from `low` to below `high`: int64.
pub fn integers(low: i64, high: i64, size: &[i64]) -> Tensor {
    draw(size, |random| random.random_range(low..high) as f64).to_kind(Kind::Int64)
}
