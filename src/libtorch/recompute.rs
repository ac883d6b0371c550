//! Activation checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), as
//! `torch.utils.checkpoint` does it: a second forward in place of the memory for activations.

use std::ffi::{CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;
use torch_sys::C_tensor;

use super::error::panic_text;
use super::{Error, ffi};

type Closure = Box<dyn Fn(&Tensor) -> Tensor + Send>;

/// Computes `f(input)` and keeps only `input`; backward computes `f(input)` once more, with gradients, and
/// differentiates that. Gradients reach both `input` and the parameters that `f` owns.
///
/// `f` must compute the same each time. When it runs again, autocast is in the state that it is in here.
/// `input` must require a gradient, or `f`'s parameters would get none.
///
/// # Errors
/// `input` requires no gradient; `f` panics.
pub fn recompute_in_backward(f: impl Fn(&Tensor) -> Tensor + Send + 'static, input: &Tensor) -> Result<Tensor, Error> {
    if !input.requires_grad() {
        return Err(Error::Other("activation checkpointing needs an input that requires a gradient".into()));
    }
    let closure: *mut Closure = Box::into_raw(Box::new(Box::new(f)));
    let mut output = std::ptr::null_mut();
    // SAFETY: `call` and `drop_closure` take the pointer for what it is, a boxed Closure; the shim owns
    // it from here on, also when it fails, and drops it once. It is called by one thread at a time
    // (forward here, then the autograd engine), for which Send suffices.
    unsafe {
        ffi::check(ffi::bbt_recompute_in_backward(call, drop_closure, closure.cast(), input.as_ptr(), &mut output))?;
        Ok(Tensor::from_ptr(output))
    }
}

/// Runs the closure for C++: a panic becomes a message, since it must not unwind through C++.
unsafe extern "C" fn call(closure: *mut c_void, input: *mut C_tensor, output: *mut *mut C_tensor) -> *mut c_char {
    let result = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the pointers are those of recompute_in_backward's shim call: a live Closure, a live
        // input tensor that is cloned here, and room for one output pointer.
        unsafe {
            let f = &*closure.cast::<Closure>();
            let input = Tensor::clone_from_ptr(input);
            let result = f(&input);
            // The shim takes over the tensor behind the pointer: it must outlive our handle.
            let mut handle = std::mem::ManuallyDrop::new(result);
            *output = handle.as_mut_ptr();
        }
    }));
    match result {
        Ok(()) => std::ptr::null_mut(),
        Err(panic) => {
            let text = CString::new(panic_text(panic.as_ref()).replace('\0', " ")).unwrap_or_default();
            // SAFETY: strdup allocates with malloc, which the shim frees with free.
            unsafe { strdup(text.as_ptr()) }
        }
    }
}

unsafe extern "C" fn drop_closure(closure: *mut c_void) {
    // SAFETY: the box made by recompute_in_backward, dropped once by the shim.
    drop(unsafe { Box::from_raw(closure.cast::<Closure>()) });
}

unsafe extern "C" {
    fn strdup(text: *const c_char) -> *mut c_char;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn gradients_equal_those_without_recomputation() {
        tch::manual_seed(1);
        let w = Tensor::randn([8, 8], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let x = Tensor::randn([4, 8], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let f = |w: &Tensor, x: &Tensor| x.matmul(w).tanh().matmul(w);
        f(&w, &x).pow_tensor_scalar(2).sum(Kind::Double).backward();
        let (gw, gx) = (w.grad().copy(), x.grad().copy());
        let (mut w, mut x) = (w, x);
        w.zero_grad();
        x.zero_grad();
        let owned = w.shallow_clone();
        let y = recompute_in_backward(move |x| f(&owned, x), &x).unwrap();
        y.pow_tensor_scalar(2).sum(Kind::Double).backward();
        assert!(w.grad().equal(&gw) && x.grad().equal(&gx));
    }

    #[test]
    fn the_closure_lives_as_long_as_the_graph_and_no_longer() {
        let alive = std::sync::Arc::new(());
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let held = alive.clone();
        let y = recompute_in_backward(
            move |x| {
                let _ = &held;
                x * 2.0
            },
            &x,
        )
        .unwrap();
        assert_eq!(std::sync::Arc::strong_count(&alive), 2);
        drop(y);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1);
    }

    #[test]
    fn a_panic_inside_is_an_error_outside() {
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let error = recompute_in_backward(|_| panic!("no luck"), &x).unwrap_err();
        assert!(error.to_string().contains("no luck"), "{error}");
    }
}
