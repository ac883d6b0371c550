//! For the tests of kernels: random inputs, and how far a result is from what is expected.
//!
//! Inputs are drawn anew each time; a test that fails prints the `BBT_TEST_SEED` that draws them again. libtorch has
//! one generator for the whole process, which tests that run side by side would share.

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
    // Shown if the test fails.
    println!("{VARIABLE}={seed} draws these inputs again");
    StdRng::seed_from_u64(seed)
}

/// Begins a test: from here on its inputs depend on the seed alone, not on the tests that ran before on this thread.
pub fn seed() {
    GENERATOR.with_borrow_mut(|random| *random = generator());
}

fn draw(size: &[i64], one: impl Fn(&mut StdRng) -> f64) -> Tensor {
    let n = size.iter().product::<i64>();
    let values: Vec<f32> = GENERATOR.with_borrow_mut(|random| (0..n).map(|_| one(random) as f32).collect());
    Tensor::from_slice(&values).view(size)
}

/// Normally distributed, with mean 0 and variance 1: fp32.
pub fn randn(size: &[i64]) -> Tensor {
    // The Box-Muller transform.
    draw(size, |random| {
        let (u, v): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    })
}

/// Uniformly distributed from 0 to 1: fp32.
pub fn rand(size: &[i64]) -> Tensor {
    draw(size, |random| random.random())
}

/// Integers from `low` up to, but not including, `high`: int64.
pub fn integers(low: i64, high: i64, size: &[i64]) -> Tensor {
    draw(size, |random| random.random_range(low..high) as f64).to_kind(Kind::Int64)
}

/// The dtypes that the fused kernels take.
pub const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// A copy of `x` that gets a gradient.
pub fn leaf(x: &Tensor) -> Tensor {
    x.detach().copy().set_requires_grad(true)
}

/// The largest difference, relative to the largest expected value.
pub fn error(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.size(), expected.size());
    if expected.numel() == 0 {
        return 0.0;
    }
    let expected = expected.to_kind(Kind::Double);
    let largest = expected.abs().max().double_value(&[]).max(1e-30);
    let error = (actual.to_kind(Kind::Double) - expected).abs().max().double_value(&[]) / largest;
    assert!(!error.is_nan());
    error
}

/// How large an [`error`] may be where sums and results are rounded to `kind`.
pub fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Float => 1e-5,
        _ => 1e-2,
    }
}
