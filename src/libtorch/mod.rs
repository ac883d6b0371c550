//! The wall: what libtorch has and tch does not bind, safe on the Rust side.
//!
//! A C++ shim (`shim/`) with a plain C interface is compiled by `build.rs`. No C++ type and no
//! exception crosses it: a failing call returns its message. All of the crate's `unsafe` that
//! touches libtorch is in this folder.

mod adamw8bit;
mod attention;
mod autocast;
mod bitsandbytes;
mod cpu_kernels;
mod cuda_graph;
mod cuda_kernels;
mod distributed;
mod error;
mod exit;
mod ffi;
mod foreach;
mod fused;
mod generator;
mod grad;
mod host_copy;
mod memory;
#[cfg(test)]
mod random;
mod recompute;
mod storage;

pub use adamw8bit::{BLOCK, CodeBook, Moment8bit, adamw8bit, blocks};
pub use attention::causal_attention;
pub use autocast::{Autocast, AutocastDtype, autocast_kind};
pub use bitsandbytes::AdamW8bitKernel;
pub use cpu_kernels::CpuKernels;
pub use cuda_graph::CudaGraph;
pub use cuda_kernels::{compile_cuda_kernels, cuda_name};
pub use distributed::{Backend, ProcessGroup, ReduceOp, Reducer, ReducerTimes, Store};
pub use error::Error;
pub(crate) use error::or_panic;
pub use exit::exit_at_once;
pub use foreach::{AdamWStep, amp_unscale, foreach_mul, foreach_norms, fused_adamw};
pub use fused::{Prologue, TernaryWeight, bit_linear, bit_linear_and_scales, cross_entropy_mean, rope};
pub use generator::drawing_alone;
pub use grad::{is_grad_enabled, mark_written, set_grad, tensor_version};
pub use host_copy::HostCopy;
pub use memory::{CudaMemory, HostMemory, cuda_memory, host_memory};
pub use recompute::recompute_in_backward;
pub use storage::cpu_bytes;
