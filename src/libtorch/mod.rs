//! What libtorch has and tch does not bind, safe on the Rust side.
//!
//! `build.rs` compiles the C++ of `shim/`, whose interface is plain C: no C++ type and no exception crosses it, and a
//! call that fails returns its message. `unsafe` code that touches libtorch is in this folder and in `kernels/`.

mod autocast;
mod c10d;
mod cuda_graph;
mod error;
mod exit;
pub(crate) mod ffi;
mod foreach;
mod generator;
mod grad;
mod host_copy;
mod memory;
mod recompute;
mod storage;

pub use autocast::{Autocast, AutocastDtype, autocast_kind};
pub use c10d::{Backend, ProcessGroup, ReduceOp, Reducer, ReducerTimes, Store};
pub use cuda_graph::CudaGraph;
pub use error::Error;
pub(crate) use error::or_panic;
pub use exit::exit_at_once;
pub use foreach::{AdamWStep, amp_unscale, foreach_mul, foreach_norms, fused_adamw};
pub use generator::drawing_alone;
pub use grad::{is_grad_enabled, mark_written, set_grad, tensor_version};
pub use host_copy::HostCopy;
pub use memory::{CudaMemory, HostMemory, cuda_memory, host_memory};
pub use recompute::recompute_in_backward;
pub use storage::cpu_bytes;
