//! Autocast on CPU and CUDA, as `torch.autocast(device, dtype)`.

use tch::{Device, Kind};

use super::{Error, ffi};

/// The precision in which autocast computes matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutocastDtype {
    /// float16
    Half,
    /// bfloat16
    BFloat16,
}

/// The dtype in which autocast computes products for `device` on this thread, float16 or bfloat16; none while it is
/// off.
pub fn autocast_kind(device: Device) -> Option<Kind> {
    let mut dtype = ffi::Dtype::Float;
    // SAFETY: a place for a dtype, to which the shim writes one.
    let asked = kind_of(device).and_then(|device| ffi::check(unsafe { ffi::bbt_autocast_dtype(device, &mut dtype) }));
    match (asked, dtype) {
        (Ok(()), ffi::Dtype::Half) => Some(Kind::Half),
        (Ok(()), ffi::Dtype::BFloat16) => Some(Kind::BFloat16),
        _ => None,
    }
}

fn kind_of(device: Device) -> Result<ffi::DeviceType, Error> {
    match device {
        Device::Cpu => Ok(ffi::DeviceType::Cpu),
        Device::Cuda(_) => Ok(ffi::DeviceType::Cuda),
        other => Err(Error::Other(format!("no autocast on device {other:?}"))),
    }
}

/// A region in which autocast is on, from [`Autocast::enter`] until this is dropped. Regions do not nest, and belong to
/// the thread that entered them.
pub struct Autocast {
    device: ffi::DeviceType,
    // Autocast is a property of a thread: this must not leave it.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Autocast {
    /// Turns autocast on for operations on `device`.
    ///
    /// # Errors
    /// A device that is neither CPU nor CUDA, or libtorch's own error.
    pub fn enter(device: Device, dtype: AutocastDtype) -> Result<Self, Error> {
        let device = kind_of(device)?;
        let dtype = match dtype {
            AutocastDtype::Half => ffi::Dtype::Half,
            AutocastDtype::BFloat16 => ffi::Dtype::BFloat16,
        };
        // SAFETY: plain numbers.
        ffi::check(unsafe { ffi::bbt_autocast_enter(device, dtype) })?;
        Ok(Self { device, _thread: std::marker::PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: a plain number. The call only sets thread-local state: there is no error to report.
        let _ = ffi::check(unsafe { ffi::bbt_autocast_exit(self.device) });
    }
}
