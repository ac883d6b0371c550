//! From what a configuration says of devices and precision to what libtorch takes.

use tch::{Cuda, Device};

use crate::config::{DeviceSpec, Precision};
use crate::libtorch::{Autocast, AutocastDtype, Error};

/// A device that was asked for and is not there.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// libtorch sees no CUDA device.
    #[error(
        "device {0} was asked for, but libtorch sees no CUDA device here: use `cpu` or `auto`; `bbt doctor` says what is missing"
    )]
    NoCuda(DeviceSpec),
    /// There are fewer CUDA devices.
    #[error("device {asked} was asked for, but there are only {count} CUDA devices, numbered from 0")]
    NoSuchCuda {
        /// The device asked for.
        asked: DeviceSpec,
        /// How many there are.
        count: i64,
    },
}

/// The libtorch device for `spec`.
///
/// # Errors
/// CUDA asked for where it, or that device, is absent.
pub fn device(spec: DeviceSpec) -> Result<Device, DeviceError> {
    match spec {
        DeviceSpec::Auto => Ok(Device::cuda_if_available()),
        DeviceSpec::Cpu => Ok(Device::Cpu),
        DeviceSpec::Cuda(_) if !Cuda::is_available() => Err(DeviceError::NoCuda(spec)),
        DeviceSpec::Cuda(index) if index as i64 >= Cuda::device_count() => {
            Err(DeviceError::NoSuchCuda { asked: spec, count: Cuda::device_count() })
        }
        DeviceSpec::Cuda(index) => Ok(Device::Cuda(index)),
    }
}

/// Runs `f` under the autocast that `precision` asks for.
///
/// # Errors
/// A device without autocast.
pub fn autocast<T>(device: Device, precision: Precision, f: impl FnOnce() -> T) -> Result<T, Error> {
    let dtype = match precision {
        Precision::Fp32 => return Ok(f()),
        Precision::Bf16 => AutocastDtype::BFloat16,
        Precision::Fp16 => AutocastDtype::Half,
    };
    let _region = Autocast::enter(device, dtype)?;
    Ok(f())
}
