//! The bytes of a tensor, for writing it to a file without a copy.

use tch::{Device, Tensor};

/// A contiguous CPU tensor as its bytes, kept alive by this handle.
struct CpuBytes {
    tensor: Tensor,
    len: usize,
}

// SAFETY: the bytes are only read, and the handle's own reference keeps the storage alive. libtorch's reference counts
// are atomic. Writing to the storage meanwhile would be a race: callers change no parameter while they save the model.
unsafe impl Sync for CpuBytes {}

impl AsRef<[u8]> for CpuBytes {
    fn as_ref(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: a contiguous CPU tensor's data pointer addresses numel * element size bytes, alive as
        // long as `self.tensor` is.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast_const().cast(), self.len) }
    }
}

/// The bytes of `tensor` in row-major order, native (little) endian: no copy where it already lies
/// contiguous on the CPU. The tensor must not be written to while the bytes are in use.
pub fn cpu_bytes(tensor: &Tensor) -> impl AsRef<[u8]> + Send + Sync + 'static {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    CpuBytes { tensor, len }
}
