//! What the host launches once, the device repeats by itself: CUDA graphs, as `torch.cuda.graph` records them.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Error, ffi};

/// Work for a CUDA device, recorded.
#[derive(Debug)]
pub struct CudaGraph(*mut c_void);

// SAFETY: the shim's object may be used by any thread, and is used by one at a time.
unsafe impl Send for CudaGraph {}

impl CudaGraph {
    /// Records what `work` launches on the device of number `device`. Nothing of it runs, here or there: what `work`
    /// returns are tensors that [`CudaGraph::replay`] fills, over and over. Whatever it reads and writes must stay where
    /// it is in memory; it must not wait for the device.
    ///
    /// # Errors
    /// No such device; `work`'s own error or panic; what CUDA cannot record. The device is then as it was.
    pub fn capture<T>(device: usize, work: impl FnOnce() -> Result<T, Error>) -> Result<(Self, T), Error> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: room for one pointer, which is ours to free.
        ffi::check(unsafe { ffi::bbt_cuda_graph_begin(device as c_int, &mut graph) })?;
        // From here on dropped in any case, which ends a recording that is still under way.
        let graph = Self(graph);
        let made =
            catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Error::from_panic(panic.as_ref())))?;
        // SAFETY: the shim's live object, which is recording.
        ffi::check(unsafe { ffi::bbt_cuda_graph_end(graph.0) })?;
        Ok((graph, made))
    }

    /// Runs what was recorded, after what the device has been given so far.
    ///
    /// # Errors
    /// CUDA's own.
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
