//! torch's own distributed engine, c10d: the store by which ranks find each other, process groups (NCCL, Gloo)
//! and the Reducer of `DistributedDataParallel`.
//!
//! Teardown goes the way back: a [`Reducer`] before its [`ProcessGroup`], that before its [`Store`]; each
//! holds what it needs, so dropping them in any order is sound.

use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use tch::{Device, Tensor};

use super::{Error, ffi};

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

fn c_string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Other(format!("`{text}` holds a NUL byte")))
}

/// A handle of the shim, dropped once by `free`.
#[derive(Debug)]
struct Handle {
    raw: *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
}

// SAFETY: the objects behind handles are reference-counted with atomic counts and may be used and dropped from
// any thread.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim with `free` as its counterpart, and is dropped here only.
        unsafe { (self.free)(self.raw) }
    }
}

/// A key-value store that all ranks share (`c10d::TCPStore`): one process holds it, the others connect.
#[derive(Debug)]
pub struct Store {
    handle: Handle,
    port: u16,
}

// SAFETY: a TCPStore does one operation at a time under its own lock, a PrefixStore only adds to the key.
unsafe impl Sync for Store {}

impl Store {
    /// Holds a store at `host`:`port`; port 0 is any free one. `host` is this machine, as the others see it.
    ///
    /// # Errors
    /// The port is in use, or `host` is not this machine.
    pub fn serve(host: &str, port: u16, timeout: Duration) -> Result<Self, Error> {
        Self::within(host, port, true, timeout, "")
    }

    /// Connects to the store at `host`:`port`, waiting for it up to `timeout`. Keys are put behind `prefix`.
    ///
    /// # Errors
    /// Nobody answers there.
    pub fn connect(host: &str, port: u16, timeout: Duration, prefix: &str) -> Result<Self, Error> {
        Self::within(host, port, false, timeout, prefix)
    }

    /// [`Store::new`], given up after `timeout`. c10d's own timeout bounds the connection, but not the answer to its
    /// greeting: it would wait for ever for somebody who accepts connections and says nothing. The thread that waits
    /// is then left behind.
    fn within(host: &str, port: u16, server: bool, timeout: Duration, prefix: &str) -> Result<Self, Error> {
        let (tell, told) = mpsc::channel();
        let (own_host, own_prefix) = (host.to_string(), prefix.to_string());
        let make = move || drop(tell.send(Self::new(&own_host, port, server, timeout, &own_prefix)));
        thread::Builder::new()
            .name("store".into())
            .spawn(make)
            .map_err(|error| Error::new(format!("cannot start a thread: {error}")))?;
        told.recv_timeout(timeout).unwrap_or_else(|error| {
            Err(Error::new(match error {
                RecvTimeoutError::Timeout => format!("nothing came of it in {} s", timeout.as_secs()),
                RecvTimeoutError::Disconnected => "the connection failed".to_string(),
            }))
        })
    }

    fn new(host: &str, port: u16, server: bool, timeout: Duration, prefix: &str) -> Result<Self, Error> {
        let (host, prefix) = (c_string(host)?, c_string(prefix)?);
        let (mut raw, mut actual) = (ptr::null_mut(), 0);
        // SAFETY: two live strings and room for what comes back.
        ffi::check(unsafe {
            ffi::bbt_store_new(
                host.as_ptr(),
                port,
                c_int::from(server),
                millis(timeout),
                prefix.as_ptr(),
                &mut raw,
                &mut actual,
            )
        })?;
        Ok(Self { handle: Handle { raw, free: ffi::bbt_store_free }, port: actual })
    }

    /// The port it is at.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets `key`.
    ///
    /// # Errors
    /// The store is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let key = c_string(key)?;
        // SAFETY: a live store, string and slice.
        ffi::check(unsafe { ffi::bbt_store_set(self.handle.raw, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// The value of `key`, waiting up to `timeout` until somebody has set it.
    ///
    /// # Errors
    /// Nobody did, or the store is gone.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, Error> {
        let key = c_string(key)?;
        let (mut value, mut n) = (ptr::null_mut(), 0);
        // SAFETY: a live store and string. On success the shim has stored n bytes that malloc gave, which are
        // copied and freed here.
        unsafe {
            ffi::check(ffi::bbt_store_get(self.handle.raw, key.as_ptr(), millis(timeout), &mut value, &mut n))?;
            let bytes = std::slice::from_raw_parts(value, n).to_vec();
            libc::free(value.cast());
            Ok(bytes)
        }
    }

    /// Adds `amount` to the counter `key`, which begins at 0; returns its new value.
    ///
    /// # Errors
    /// The store is gone.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let key = c_string(key)?;
        let mut sum = 0;
        // SAFETY: a live store and string, and room for the sum.
        ffi::check(unsafe { ffi::bbt_store_add(self.handle.raw, key.as_ptr(), amount, &mut sum) })?;
        Ok(sum)
    }

    /// Whether somebody has set `key`.
    ///
    /// # Errors
    /// The store is gone.
    pub fn contains(&self, key: &str) -> Result<bool, Error> {
        let key = c_string(key)?;
        let mut present = 0;
        // SAFETY: a live store and string, and room for the answer.
        ffi::check(unsafe { ffi::bbt_store_check(self.handle.raw, key.as_ptr(), &mut present) })?;
        Ok(present != 0)
    }
}

/// Which engine carries tensors of a CUDA device between ranks. Those of the CPU go by Gloo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// TCP through host memory.
    Gloo,
    /// NVIDIA's collectives.
    Nccl,
}

/// The ranks of a run, and the collectives among them. Every rank must call the same ones in the same order.
/// They run on the device of the tensor, and block (on CUDA: the current stream) until done.
#[derive(Debug)]
pub struct ProcessGroup {
    handle: Handle,
}

/// How values of ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

impl ProcessGroup {
    /// Joins the group as `rank` of `size`; waits for the others up to `timeout`, which also bounds each
    /// collective. `device` is where this rank's model lives.
    ///
    /// # Errors
    /// A rank is missing, or this build or machine lacks the backend.
    pub fn new(
        store: &Store,
        rank: usize,
        size: usize,
        backend: Backend,
        device: Device,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let cuda = match device {
            Device::Cuda(index) => index as c_int,
            _ => -1,
        };
        let mut raw = ptr::null_mut();
        // SAFETY: a live store, which the group holds on to, and room for the handle.
        ffi::check(unsafe {
            ffi::bbt_process_group_new(
                store.handle.raw,
                rank as c_int,
                size as c_int,
                c_int::from(backend == Backend::Nccl),
                cuda,
                millis(timeout),
                &mut raw,
            )
        })?;
        Ok(Self { handle: Handle { raw, free: ffi::bbt_process_group_free } })
    }

    /// Replaces `tensor` on every rank by the sum, or the largest, over ranks.
    ///
    /// # Errors
    /// A rank is gone or does not come within the timeout.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<(), Error> {
        // SAFETY: a live group and tensor.
        ffi::check(unsafe { ffi::bbt_all_reduce(self.handle.raw, tensor.as_ptr(), c_int::from(op == ReduceOp::Max)) })
    }

    /// Copies rank `root`'s `tensors` into those of every rank, which are of the same kinds and shapes.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<(), Error> {
        // c10d refuses an empty list. It is empty on every rank.
        if tensors.is_empty() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let list = ffi::pointers(tensors);
        // SAFETY: a live group and list of live tensors.
        ffi::check(unsafe { ffi::bbt_broadcast(self.handle.raw, list.as_ptr(), list.len(), root as c_int) })
    }

    /// Lays the `input`s of all ranks, in their order, into `output` on every rank: `[n]` → `[size · n]`.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<(), Error> {
        // SAFETY: a live group and two live tensors.
        ffi::check(unsafe { ffi::bbt_all_gather(self.handle.raw, output.as_ptr(), input.as_ptr()) })
    }

    /// Sums the `input`s of all ranks and gives each its part: `[size · n]` → `[n]`.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<(), Error> {
        // SAFETY: a live group and two live tensors.
        ffi::check(unsafe { ffi::bbt_reduce_scatter(self.handle.raw, output.as_ptr(), input.as_ptr()) })
    }

    /// Returns once every rank is here.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn barrier(&self) -> Result<(), Error> {
        // SAFETY: a live group.
        ffi::check(unsafe { ffi::bbt_barrier(self.handle.raw) })
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: a live group, freed right after. Its threads and connections end here; what that fails with
        // (a connection that another rank has closed already) concerns nobody any more.
        let _ = ffi::check(unsafe { ffi::bbt_process_group_shutdown(self.handle.raw) });
    }
}

/// c10d's Reducer: hooks on the parameters' gradients that average them over ranks, bucket by bucket, while
/// backward still runs. Gradients become views of the buckets.
#[derive(Debug)]
pub struct Reducer {
    handle: Handle,
}

/// Where the time of the measured steps went, in seconds, on average. Backward is `backward`, of which
/// `overlap` had communication under way; communication took `communication`, from the first bucket to the last.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReducerTimes {
    /// Forward of the synchronising micro-batch.
    pub forward: f64,
    /// Its backward, without waiting for communication to end.
    pub backward: f64,
    /// From the first bucket's start to the last one's end.
    pub communication: f64,
    /// The part of it during which backward still ran.
    pub overlap: f64,
}

impl Reducer {
    /// Hooks for `params`, in PyTorch's order, all on one device. Buckets hold up to `bucket_bytes`.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn new(group: &ProcessGroup, params: &[Tensor], bucket_bytes: i64) -> Result<Self, Error> {
        let list = ffi::pointers(params);
        let mut raw = ptr::null_mut();
        // SAFETY: a live group and list of live tensors, of which the reducer keeps handles of its own.
        ffi::check(unsafe {
            ffi::bbt_reducer_new(group.handle.raw, list.as_ptr(), list.len(), bucket_bytes, &mut raw)
        })?;
        Ok(Self { handle: Handle { raw, free: ffi::bbt_reducer_free } })
    }

    /// Before each forward whose gradients shall be averaged.
    ///
    /// # Errors
    /// The last reduction did not finish.
    pub fn prepare_for_forward(&self) -> Result<(), Error> {
        // SAFETY: a live reducer, as in the calls below.
        ffi::check(unsafe { ffi::bbt_reducer_prepare_for_forward(self.handle.raw) })
    }

    /// Between that forward and its backward. A backward without it only accumulates.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn prepare_for_backward(&self) -> Result<(), Error> {
        // SAFETY: see above.
        ffi::check(unsafe { ffi::bbt_reducer_prepare_for_backward(self.handle.raw) })
    }

    /// After the first backward: puts the buckets in the order in which gradients came. A collective.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn rebuild_buckets(&self) -> Result<(), Error> {
        // SAFETY: see above.
        ffi::check(unsafe { ffi::bbt_reducer_rebuild_buckets(self.handle.raw) })
    }

    /// Measures every so many steps from here on (the first ten always).
    ///
    /// # Errors
    /// libtorch's own.
    pub fn measure_every(&self, steps: u32) -> Result<(), Error> {
        // SAFETY: see above.
        ffi::check(unsafe { ffi::bbt_reducer_measure_every(self.handle.raw, steps.max(1) as c_int) })
    }

    /// What was measured.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn times(&self) -> Result<ReducerTimes, Error> {
        let mut ns = [0i64; 4];
        let [forward, backward, communication, overlap] = &mut ns;
        // SAFETY: see above; room for four numbers.
        ffi::check(unsafe { ffi::bbt_reducer_times(self.handle.raw, forward, backward, communication, overlap) })?;
        let [forward, backward, communication, overlap] = ns.map(|t| t as f64 * 1e-9);
        Ok(ReducerTimes { forward, backward, communication, overlap })
    }
}
