//! Copies from a device to the host that neither of them waits for.

use std::ffi::c_void;

use tch::Tensor;

use super::{Error, ffi};

/// A tensor on its way to the host. Device and host go on working meanwhile.
#[derive(Debug)]
pub struct HostCopy(*mut c_void);

// SAFETY: the shim's object is a tensor and an event, both of which any thread may use, and it is used by one at a
// time.
unsafe impl Send for HostCopy {}

impl HostCopy {
    /// Starts to copy `tensor`, with the value that it has after the work that the device was given so far. A tensor on
    /// the CPU is not copied, and must not be written to until [`HostCopy::wait`].
    ///
    /// # Errors
    /// libtorch's own error.
    pub fn start(tensor: &Tensor) -> Result<Self, Error> {
        let mut copy = std::ptr::null_mut();
        // SAFETY: a live tensor, and room for one pointer, which is ours to free.
        ffi::check(unsafe { ffi::bbt_host_copy_start(tensor.as_ptr(), &mut copy) })?;
        Ok(Self(copy))
    }

    /// Waits for the copy, and returns it: on the CPU, with the tensor's shape and dtype.
    ///
    /// # Errors
    /// The error with which the device failed meanwhile.
    pub fn wait(&self) -> Result<Tensor, Error> {
        let mut tensor = std::ptr::null_mut();
        // SAFETY: the shim's live object, and room for a pointer to a new tensor, which we own.
        unsafe {
            ffi::check(ffi::bbt_host_copy_wait(self.0, &mut tensor))?;
            Ok(Tensor::from_ptr(tensor))
        }
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        // SAFETY: made by `start`, freed once.
        unsafe { ffi::bbt_host_copy_free(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrives_is_what_was_sent() {
        let tensor = Tensor::from_slice(&[1.5f64, -2.0]);
        let copy = HostCopy::start(&tensor).unwrap();
        assert_eq!(Vec::<f64>::try_from(copy.wait().unwrap()).unwrap(), [1.5, -2.0]);
        let cuda = tch::Device::cuda_if_available();
        let copy = HostCopy::start(&tensor.to_device(cuda)).unwrap();
        assert_eq!(Vec::<f64>::try_from(copy.wait().unwrap()).unwrap(), [1.5, -2.0]);
    }
}
