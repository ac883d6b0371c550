//! The C interface of `shim/shim.h`, and how its messages become [`Error`]s.

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::Tensor;
use torch_sys::C_tensor;

use super::Error;

pub type Recompute =
    unsafe extern "C" fn(closure: *mut c_void, input: *mut C_tensor, output: *mut *mut C_tensor) -> *mut c_char;
pub type Drop = unsafe extern "C" fn(closure: *mut c_void);

unsafe extern "C" {
    pub fn bbt_free_message(text: *mut c_char);
    pub fn bbt_autocast_enter(device: c_int, dtype: c_int) -> *mut c_char;
    pub fn bbt_autocast_exit(device: c_int) -> *mut c_char;
    pub fn bbt_recompute_in_backward(
        call: Recompute,
        drop: Drop,
        closure: *mut c_void,
        input: *const C_tensor,
        output: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub fn bbt_causal_attention(
        isa: c_int,
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub fn bbt_fused_adamw(
        params: *const *const C_tensor,
        grads: *const *const C_tensor,
        exp_avgs: *const *const C_tensor,
        exp_avg_sqs: *const *const C_tensor,
        steps: *const *const C_tensor,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        found_inf: *const C_tensor,
    ) -> *mut c_char;
    pub fn bbt_foreach_norm(tensors: *const *const C_tensor, n: usize, norm: *mut *mut C_tensor) -> *mut c_char;
    pub fn bbt_foreach_mul(tensors: *const *const C_tensor, n: usize, factor: *const C_tensor) -> *mut c_char;
    pub fn bbt_amp_unscale(
        grads: *const *const C_tensor,
        n: usize,
        found_inf: *const C_tensor,
        inverse_scale: *const C_tensor,
    ) -> *mut c_char;
    pub fn bbt_cuda_memory(index: c_int, free: *mut u64, total: *mut u64, peak: *mut u64) -> *mut c_char;
}

/// Turns what a shim function returned into a result.
pub fn check(message: *mut c_char) -> Result<(), Error> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null message is a NUL-terminated string that the shim allocated for us; it is
    // copied before it is freed, and freed once.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        bbt_free_message(message);
        text
    };
    Err(Error(text))
}

/// The raw pointers of a list of tensors, valid while the tensors are borrowed.
pub fn pointers<T: std::borrow::Borrow<Tensor>>(tensors: &[T]) -> Vec<*const C_tensor> {
    tensors.iter().map(|t| t.borrow().as_ptr()).collect()
}
