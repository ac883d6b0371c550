//! The C interface of `shim/kernels.h`. `tests/it/shim.rs` compares the declarations of the two files.

use std::ffi::{CStr, c_char, c_int};

use torch_sys::C_tensor;

use super::cpu_features::CpuFeatures;
pub use crate::libtorch::ffi::{Dtype, check, message, pointers};

/// What is computed of a layer's input before it is quantized, as in `shim/numbers.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Prologue {
    None,
    RmsNorm,
    SwiGlu,
}

/// What there are several CPU kernels for, as in `shim/numbers.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum CpuOperation {
    Int8Product,
    Rows,
    AttentionFloat,
    AttentionBFloat16,
    AdamW8bit,
}

unsafe extern "C" {
    pub fn bbt_cpu_kernel(features: u32, operation: CpuOperation) -> *const c_char;
    pub fn bbt_causal_attention(
        features: u32,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub fn bbt_ternary_weight(
        features: u32,
        w: *const C_tensor,
        codes: *mut *mut C_tensor,
        gamma: *mut *mut C_tensor,
        packed: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub fn bbt_bit_linear(
        features: u32,
        x: *const C_tensor,
        prologue: Prologue,
        norm_weight: *const C_tensor,
        eps: f64,
        weights: *const *const C_tensor,
        outs: *const i64,
        n: usize,
        clipped: c_int,
        dtype: Dtype,
        outputs: *mut *mut C_tensor,
        scales: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub fn bbt_rope(
        features: u32,
        x: *const C_tensor,
        cos: *const C_tensor,
        sin: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub fn bbt_cross_entropy_mean(
        features: u32,
        logits: *const C_tensor,
        targets: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub fn bbt_adamw8bit(
        features: u32,
        params: *const *const C_tensor,
        grads: *const *const C_tensor,
        codes1: *const *const C_tensor,
        absmax1: *const *const C_tensor,
        codes2: *const *const C_tensor,
        absmax2: *const *const C_tensor,
        steps: *const *const C_tensor,
        n: usize,
        book1: *const *const C_tensor,
        book2: *const *const C_tensor,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        found_inf: *const C_tensor,
    ) -> *mut c_char;
    pub fn bbt_bitsandbytes(path: *mut *mut c_char, why: *mut *mut c_char) -> *mut c_char;
    pub fn bbt_cuda_name(index: c_int, name: *mut c_char, size: c_int) -> *mut c_char;
    pub fn bbt_cuda_kernels(architecture: *const c_char, cache: *const c_char, bytes: *mut usize) -> *mut c_char;
}

/// The name of the kernels that `operation` takes on a CPU with `features`.
pub fn cpu_kernel(features: CpuFeatures, operation: CpuOperation) -> &'static str {
    // SAFETY: plain numbers; the function only looks at its tables, and returns a string of the program's own.
    let name = unsafe { CStr::from_ptr(bbt_cpu_kernel(features.bits(), operation)) };
    name.to_str().unwrap_or_default()
}
