//! The CUDA kernels (`cuda/`), which libtorch's NVRTC compiles on the machine that runs them, when a GPU first uses
//! them; and the driver's name of a GPU.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::ffi;
use crate::libtorch::Error;

/// Compiles the CUDA kernels for `architecture` (`sm_90` is compute capability 9.0), or finds them in the folder
/// `cache`, which it creates. No GPU is needed. Returns the size of their machine code in bytes.
///
/// # Errors
/// NVRTC is missing (a libtorch without CUDA) or does not know the architecture; a kernel does not compile. A cache
/// that cannot be read or written is not an error.
pub fn compile_cuda_kernels(architecture: &str, cache: &Path) -> Result<usize, Error> {
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|error| Error::new(error.to_string()));
    let (architecture, cache) = (text(architecture.as_bytes())?, text(cache.as_os_str().as_bytes())?);
    let mut bytes = 0;
    // SAFETY: two NUL-terminated strings that live through the call, and a place for one number.
    ffi::check(unsafe { ffi::bbt_cuda_kernels(architecture.as_ptr(), cache.as_ptr(), &mut bytes) })?;
    Ok(bytes)
}

/// The driver's name of CUDA device `index`, such as `NVIDIA H100 80GB HBM3`.
///
/// # Errors
/// There is no driver or no such device.
pub fn cuda_name(index: usize) -> Result<String, Error> {
    let mut name = [0; 256];
    let index = i32::try_from(index).map_err(|_| Error::Other(format!("no CUDA device {index}")))?;
    // SAFETY: room for as many bytes as are said; the call writes a NUL-terminated string.
    ffi::check(unsafe { ffi::bbt_cuda_name(index, name.as_mut_ptr().cast(), name.len() as i32) })?;
    let name = CStr::from_bytes_until_nul(&name).map_err(|error| Error::new(error.to_string()))?;
    Ok(name.to_string_lossy().into_owned())
}
