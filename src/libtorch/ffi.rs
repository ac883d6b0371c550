//! The C interface of `shim/shim.h`, and how its messages become [`Error`]s. `tests/it/shim.rs` compares the
//! declarations of the two files.

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::Tensor;
use torch_sys::C_tensor;

use super::Error;

/// A kind of device, as in `shim/numbers.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum DeviceType {
    Cpu,
    Cuda,
}

/// A floating-point dtype, as in `shim/numbers.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Dtype {
    Float,
    BFloat16,
    Half,
}

pub type Recompute =
    unsafe extern "C" fn(closure: *mut c_void, input: *mut C_tensor, output: *mut *mut C_tensor) -> *mut c_char;
pub type Drop = unsafe extern "C" fn(closure: *mut c_void);

unsafe extern "C" {
    pub fn bbt_free_message(text: *mut c_char);
    pub fn bbt_autocast_enter(device: DeviceType, dtype: Dtype) -> *mut c_char;
    pub fn bbt_autocast_exit(device: DeviceType) -> *mut c_char;
    pub fn bbt_autocast_dtype(device: DeviceType, dtype: *mut Dtype) -> *mut c_char;
    pub fn bbt_recompute_in_backward(
        call: Recompute,
        drop: Drop,
        closure: *mut c_void,
        input: *const C_tensor,
        output: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub fn bbt_mark_written(tensors: *const *const C_tensor, n: usize) -> *mut c_char;
    pub fn bbt_is_grad_enabled() -> c_int;
    pub fn bbt_tensor_version(tensor: *const C_tensor, version: *mut i64) -> *mut c_char;
    pub fn bbt_cuda_graph_begin(device: c_int, graph: *mut *mut c_void) -> *mut c_char;
    pub fn bbt_cuda_graph_end(graph: *mut c_void) -> *mut c_char;
    pub fn bbt_cuda_graph_replay(graph: *mut c_void) -> *mut c_char;
    pub fn bbt_cuda_graph_free(graph: *mut c_void);
    pub fn bbt_host_copy_start(tensor: *const C_tensor, copy: *mut *mut c_void) -> *mut c_char;
    pub fn bbt_host_copy_wait(copy: *mut c_void, tensor: *mut *mut C_tensor) -> *mut c_char;
    pub fn bbt_host_copy_free(copy: *mut c_void);
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
    pub fn bbt_foreach_norms(tensors: *const *const C_tensor, n: usize, norms: *mut *mut C_tensor) -> *mut c_char;
    pub fn bbt_foreach_mul(tensors: *const *const C_tensor, n: usize, factor: *const C_tensor) -> *mut c_char;
    pub fn bbt_amp_unscale(
        grads: *const *const C_tensor,
        n: usize,
        found_inf: *const C_tensor,
        inverse_scale: *const C_tensor,
    ) -> *mut c_char;
    pub fn bbt_set_grad(tensor: *const C_tensor, grad: *const C_tensor) -> *mut c_char;
    pub fn bbt_store_new(
        host: *const c_char,
        port: u16,
        is_server: c_int,
        timeout_ms: i64,
        prefix: *const c_char,
        store: *mut *mut c_void,
        actual_port: *mut u16,
    ) -> *mut c_char;
    pub fn bbt_store_free(store: *mut c_void);
    pub fn bbt_store_set(store: *mut c_void, key: *const c_char, value: *const u8, n: usize) -> *mut c_char;
    pub fn bbt_store_get(
        store: *mut c_void,
        key: *const c_char,
        timeout_ms: i64,
        value: *mut *mut u8,
        n: *mut usize,
    ) -> *mut c_char;
    pub fn bbt_store_add(store: *mut c_void, key: *const c_char, amount: i64, sum: *mut i64) -> *mut c_char;
    pub fn bbt_store_check(store: *mut c_void, key: *const c_char, present: *mut c_int) -> *mut c_char;
    pub fn bbt_process_group_new(
        store: *mut c_void,
        rank: c_int,
        size: c_int,
        nccl: c_int,
        cuda_device: c_int,
        timeout_ms: i64,
        group: *mut *mut c_void,
    ) -> *mut c_char;
    pub fn bbt_process_group_shutdown(group: *mut c_void) -> *mut c_char;
    pub fn bbt_process_group_free(group: *mut c_void);
    pub fn bbt_all_reduce(group: *mut c_void, tensor: *const C_tensor, max: c_int) -> *mut c_char;
    pub fn bbt_broadcast(group: *mut c_void, tensors: *const *const C_tensor, n: usize, root: c_int) -> *mut c_char;
    pub fn bbt_all_gather(group: *mut c_void, output: *const C_tensor, input: *const C_tensor) -> *mut c_char;
    pub fn bbt_reduce_scatter(group: *mut c_void, output: *const C_tensor, input: *const C_tensor) -> *mut c_char;
    pub fn bbt_barrier(group: *mut c_void) -> *mut c_char;
    pub fn bbt_reducer_new(
        group: *mut c_void,
        params: *const *const C_tensor,
        n: usize,
        bucket_bytes: i64,
        reducer: *mut *mut c_void,
    ) -> *mut c_char;
    pub fn bbt_reducer_free(reducer: *mut c_void);
    pub fn bbt_reducer_rebuild_buckets(reducer: *mut c_void) -> *mut c_char;
    pub fn bbt_reducer_prepare_for_forward(reducer: *mut c_void) -> *mut c_char;
    pub fn bbt_reducer_prepare_for_backward(reducer: *mut c_void) -> *mut c_char;
    pub fn bbt_reducer_measure_every(reducer: *mut c_void, steps: c_int) -> *mut c_char;
    pub fn bbt_reducer_times(
        reducer: *mut c_void,
        forward: *mut i64,
        backward: *mut i64,
        communication: *mut i64,
        overlap: *mut i64,
    ) -> *mut c_char;
    pub fn bbt_cuda_memory(index: c_int, free: *mut u64, total: *mut u64, peak: *mut u64) -> *mut c_char;
}

/// The result of a shim function that returned `message`: null is success.
pub fn check(message: *mut c_char) -> Result<(), Error> {
    self::message(message).map_or(Ok(()), |text| Err(Error::new(text)))
}

/// Takes a text that the shim allocated, and frees it; none where the pointer is null.
pub fn message(text: *mut c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: a non-null message is a NUL-terminated string that the shim allocated for us; it is
    // copied before it is freed, and freed once.
    unsafe {
        let copy = CStr::from_ptr(text).to_string_lossy().into_owned();
        bbt_free_message(text);
        Some(copy)
    }
}

/// The raw pointers of a list of tensors, valid while the tensors are borrowed.
pub fn pointers<T: std::borrow::Borrow<Tensor>>(tensors: &[T]) -> Vec<*const C_tensor> {
    tensors.iter().map(|t| t.borrow().as_ptr()).collect()
}
