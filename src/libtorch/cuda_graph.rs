//! CUDA graphs: work that is recorded once, as by `torch.cuda.graph`, and then launched as a whole.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Error, ffi};

/// A recording of what was launched on a CUDA device.
#[derive(Debug)]
pub struct CudaGraph(*mut c_void);

// SAFETY: the shim's object may be used by any thread, and is used by one at a time.
unsafe impl Send for CudaGraph {}

impl CudaGraph {
    /// Records what `work` launches on CUDA device `device`, without running it: each [`CudaGraph::replay`] fills the
    /// tensors that `work` returns. All that `work` reads and writes must stay at its address, and `work` must not wait
    /// for the device.
    ///
    /// # Errors
    /// There is no such device; `work` fails or panics; CUDA cannot record an operation. The device is then unchanged.
    pub fn capture<T>(device: usize, work: impl FnOnce() -> Result<T, Error>) -> Result<(Self, T), Error> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: room for one pointer, which is ours to free.
        ffi::check(unsafe { ffi::bbt_cuda_graph_begin(device as c_int, &mut graph) })?;
        // Dropping it, also after an error, ends a recording that is still under way.
        let graph = Self(graph);
        let made =
            catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Error::from_panic(panic.as_ref())))?;
        // SAFETY: the shim's live object, which is recording.
        ffi::check(unsafe { ffi::bbt_cuda_graph_end(graph.0) })?;
        Ok((graph, made))
    }

    /// Launches the recording behind the work that the device already has.
    ///
    /// # Errors
    /// CUDA's own error.
    pub fn replay(&self) -> Result<(), Error> {
        // SAFETY: the shim's live object, whose recording has ended.
        ffi::check(unsafe { ffi::bbt_cuda_graph_replay(self.0) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, freed once.
        unsafe { ffi::bbt_cuda_graph_free(self.0) }
    }
}
