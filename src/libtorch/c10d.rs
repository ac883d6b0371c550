//! PyTorch's distributed engine, c10d: the store through which ranks find each other, process groups (NCCL, Gloo) and
//! the Reducer of `DistributedDataParallel`.
//!
//! A [`Reducer`] holds its [`ProcessGroup`], and that its [`Store`], so they may be dropped in any order.

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

/// An object of the shim, which `free` drops once.
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

/// A key-value store that all ranks share (`c10d::TCPStore`): one process serves it, the others connect.
#[derive(Debug)]
pub struct Store {
    handle: Handle,
    port: u16,
}

// SAFETY: a TCPStore does one operation at a time, under its own lock; a PrefixStore only changes the key.
unsafe impl Sync for Store {}

impl Store {
    /// Serves a store at `host`:`port`, or at any free port for 0. `host` is this machine's name or address for the
    /// others.
    ///
    /// # Errors
    /// The port is in use, or `host` is not this machine.
    pub fn serve(host: &str, port: u16, timeout: Duration) -> Result<Self, Error> {
        Self::within(host, port, true, timeout, "")
    }

    /// Connects to the store at `host`:`port`, waiting up to `timeout` for it. `prefix` is put before every key.
    ///
    /// # Errors
    /// Nobody answers at this address.
    pub fn connect(host: &str, port: u16, timeout: Duration, prefix: &str) -> Result<Self, Error> {
        Self::within(host, port, false, timeout, prefix)
    }

    /// [`Store::new`] with a limit of `timeout`. c10d's own timeout does not cover the handshake: it would wait for
    /// ever for a server that accepts connections and sends nothing. The waiting thread is left behind in that case.
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

    /// The port that the store is at.
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
    /// Nobody set it in time, or the store is gone.
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

/// The backend for tensors on a CUDA device. Tensors on the CPU always use Gloo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// TCP through host memory.
    Gloo,
    /// NVIDIA's collectives.
    Nccl,
}

/// The ranks of a run and their collectives, which every rank must call in the same order. A collective runs on the
/// tensor's device, and blocks the caller, or on CUDA the current stream, until it is done.
#[derive(Debug)]
pub struct ProcessGroup {
    handle: Handle,
}

/// How a collective combines the ranks' values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

impl ProcessGroup {
    /// Joins the group as `rank` of `size`, waiting up to `timeout` for the others; each collective has the same limit.
    /// `device` is that of this rank's model.
    ///
    /// # Errors
    /// A rank is missing; this build or machine lacks the backend.
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

    /// Copies rank `root`'s `tensors` into those of every rank, which have the same dtypes and shapes.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<(), Error> {
        // c10d refuses an empty list. If it is empty, it is so on every rank.
        if tensors.is_empty() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let list = ffi::pointers(tensors);
        // SAFETY: a live group and list of live tensors.
        ffi::check(unsafe { ffi::bbt_broadcast(self.handle.raw, list.as_ptr(), list.len(), root as c_int) })
    }

    /// Concatenates the `input`s of all ranks, in the order of ranks, into `output` on every rank: `[n]` → `[size ·
    /// n]`.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<(), Error> {
        // SAFETY: a live group and two live tensors.
        ffi::check(unsafe { ffi::bbt_all_gather(self.handle.raw, output.as_ptr(), input.as_ptr()) })
    }

    /// Sums the `input`s of all ranks, and stores each rank's part in its `output`: `[size · n]` → `[n]`.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`].
    pub fn reduce_scatter(&self, output: &Tensor, input: &Tensor) -> Result<(), Error> {
        // SAFETY: a live group and two live tensors.
        ffi::check(unsafe { ffi::bbt_reduce_scatter(self.handle.raw, output.as_ptr(), input.as_ptr()) })
    }

    /// Returns when every rank has called this.
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
        // SAFETY: a live group, freed right after. This ends its threads and connections. An error is ignored: a
        // connection may have been closed by another rank already.
        let _ = ffi::check(unsafe { ffi::bbt_process_group_shutdown(self.handle.raw) });
    }
}

/// c10d's Reducer: hooks on the parameters' gradients, which average them over ranks bucket by bucket while backward
/// still runs. The gradients become views of the buckets.
#[derive(Debug)]
pub struct Reducer {
    handle: Handle,
}

/// Average times of the measured steps, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReducerTimes {
    /// The forward pass of the micro-batch whose gradients are averaged.
    pub forward: f64,
    /// Its backward pass, without the wait for the end of communication.
    pub backward: f64,
    /// Communication, from the start of the first bucket to the end of the last.
    pub communication: f64,
    /// The part of `communication` during which backward still ran.
    pub overlap: f64,
}

impl Reducer {
    /// Adds hooks to `params`, which are in PyTorch's order and on one device. A bucket holds up to `bucket_bytes`.
    ///
    /// # Errors
    /// libtorch's own error.
    pub fn new(group: &ProcessGroup, params: &[Tensor], bucket_bytes: i64) -> Result<Self, Error> {
        let list = ffi::pointers(params);
        let mut raw = ptr::null_mut();
        // SAFETY: a live group and list of live tensors, of which the reducer keeps handles of its own.
        ffi::check(unsafe {
            ffi::bbt_reducer_new(group.handle.raw, list.as_ptr(), list.len(), bucket_bytes, &mut raw)
        })?;
        Ok(Self { handle: Handle { raw, free: ffi::bbt_reducer_free } })
    }

    /// To be called before each forward pass whose gradients are to be averaged.
    ///
    /// # Errors
    /// The previous reduction did not finish.
    pub fn prepare_for_forward(&self) -> Result<(), Error> {
        // SAFETY: a live reducer, as in the calls below.
        ffi::check(unsafe { ffi::bbt_reducer_prepare_for_forward(self.handle.raw) })
    }

    /// To be called between that forward pass and its backward pass. A backward pass without it only accumulates.
    ///
    /// # Errors
    /// libtorch's own error.
    pub fn prepare_for_backward(&self) -> Result<(), Error> {
        // SAFETY: see above.
        ffi::check(unsafe { ffi::bbt_reducer_prepare_for_backward(self.handle.raw) })
    }

    /// To be called after the first backward pass, on every rank: puts the buckets in the order in which gradients
    /// came.
    ///
    /// # Errors
    /// libtorch's own error.
    pub fn rebuild_buckets(&self) -> Result<(), Error> {
        // SAFETY: see above.
        ffi::check(unsafe { ffi::bbt_reducer_rebuild_buckets(self.handle.raw) })
    }

    /// Measures one of every `steps` steps from now on, and each of the first ten.
    ///
    /// # Errors
    /// libtorch's own error.
    pub fn measure_every(&self, steps: u32) -> Result<(), Error> {
        // SAFETY: see above.
        ffi::check(unsafe { ffi::bbt_reducer_measure_every(self.handle.raw, steps.max(1) as c_int) })
    }

    /// The averages over the steps that were measured.
    ///
    /// # Errors
    /// libtorch's own error.
    pub fn times(&self) -> Result<ReducerTimes, Error> {
        let mut ns = [0i64; 4];
        let [forward, backward, communication, overlap] = &mut ns;
        // SAFETY: see above; room for four numbers.
        ffi::check(unsafe { ffi::bbt_reducer_times(self.handle.raw, forward, backward, communication, overlap) })?;
        let [forward, backward, communication, overlap] = ns.map(|t| t as f64 * 1e-9);
        Ok(ReducerTimes { forward, backward, communication, overlap })
    }
}
