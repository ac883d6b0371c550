//! Autograd's bookkeeping: gradients, version counters, and whether operations are recorded.

use tch::Tensor;

use super::{Error, ffi};

/// Makes `grad` the gradient of `tensor`, with the same shape and dtype: backward then adds to it in place. An
/// undefined tensor ([`Tensor::new`]) removes the gradient.
///
/// # Errors
/// The two do not fit.
pub fn set_grad(tensor: &Tensor, grad: &Tensor) -> Result<(), Error> {
    // SAFETY: two live tensors; libtorch checks that they fit.
    ffi::check(unsafe { ffi::bbt_set_grad(tensor.as_ptr(), grad.as_ptr()) })
}

/// How often `tensor`, or one that it is a view of, was written to in place: Python's `tensor._version`.
///
/// # Errors
/// The tensor has no version counter.
pub fn tensor_version(tensor: &Tensor) -> Result<i64, Error> {
    let mut version = 0;
    // SAFETY: a live tensor, and room for a number.
    ffi::check(unsafe { ffi::bbt_tensor_version(tensor.as_ptr(), &mut version) })?;
    Ok(version)
}

/// Counts one more write to each of `tensors`, for code that wrote into their memory behind libtorch's back.
///
/// # Errors
/// The tensor has no version counter.
pub fn mark_written(tensors: &[Tensor]) -> Result<(), Error> {
    let list = ffi::pointers(tensors);
    // SAFETY: a list of live tensors.
    ffi::check(unsafe { ffi::bbt_mark_written(list.as_ptr(), list.len()) })
}

/// Whether operations on this thread are recorded for backward.
pub fn is_grad_enabled() -> bool {
    // SAFETY: reads a property of the thread.
    unsafe { ffi::bbt_is_grad_enabled() != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn writes_are_counted() {
        let mut tensor = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let first = tensor_version(&tensor).unwrap();
        let _ = tensor.fill_(1.0);
        let second = tensor_version(&tensor).unwrap();
        assert!(second > first);
        mark_written(&[tensor.shallow_clone()]).unwrap();
        assert!(tensor_version(&tensor).unwrap() > second);
    }

    #[test]
    fn a_guard_turns_recording_off() {
        assert!(is_grad_enabled());
        let _guard = tch::no_grad_guard();
        assert!(!is_grad_enabled());
    }
}
