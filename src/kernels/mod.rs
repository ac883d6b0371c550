//! bbt's own kernels, for what libtorch computes slowly or not at all: BitLinear layers over integer products,
//! attention and AdamW with 8-bit moments on the CPU, and what surrounds the integer products on CUDA.
//!
//! `cpu/` is C++ that knows neither tensors nor threads, compiled once per instruction set; `cuda/` is compiled by
//! NVRTC on the machine that runs it. `shim/` makes autograd functions of them, behind a C interface like
//! `libtorch/shim/`'s.

mod adamw8bit;
mod attention;
mod bit_linear;
mod bitsandbytes;
mod cpu_features;
mod cross_entropy;
mod cuda_kernels;
mod ffi;
mod rope;
#[cfg(test)]
mod testing;

use tch::Kind;

pub use adamw8bit::{BLOCK, CodeBook, Moment8bit, adamw8bit, blocks};
pub use attention::causal_attention;
pub use bit_linear::{Prologue, TernaryWeight, bit_linear};
pub use bitsandbytes::AdamW8bitKernel;
pub use cpu_features::CpuFeatures;
pub use cross_entropy::cross_entropy_mean;
pub use cuda_kernels::{compile_cuda_kernels, cuda_name};
pub use rope::rope;

use crate::libtorch::Error;

/// An error unless all `kinds` are dtypes that the kernels of `what` compute in.
fn check_kinds(what: &str, kinds: impl IntoIterator<Item = Kind>) -> Result<(), Error> {
    match kinds.into_iter().find(|kind| !matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half)) {
        Some(kind) => Err(Error::Other(format!("{what}: dtype {kind:?} is none of Float, BFloat16 and Half"))),
        None => Ok(()),
    }
}
