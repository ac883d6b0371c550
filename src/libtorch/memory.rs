//! How much memory there is and how much was used: of the host by `/proc`, of a CUDA device by the caching allocator.

use std::fs;

use super::{Error, ffi};
use crate::cgroup;

/// Memory of the host, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct HostMemory {
    /// What this process could still take without swapping, by the machine (`MemAvailable`) and by its container's
    /// limit.
    pub available: u64,
    /// The container's limit, if it leaves less than the machine does.
    pub container: Option<u64>,
    /// The most this process has had resident so far (`VmHWM`).
    pub peak: u64,
}

/// Memory of a CUDA device, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct CudaMemory {
    /// Free on the device now, for any process.
    pub free: u64,
    /// In all.
    pub total: u64,
    /// The most that this process's tensors have taken so far.
    pub peak: u64,
}

/// The host's memory; zero where `/proc` does not say.
pub fn host_memory() -> HostMemory {
    let machine = kib("/proc/meminfo", "MemAvailable:");
    let container = cgroup::limits().memory.filter(|group| machine == 0 || group.available < machine);
    HostMemory {
        available: container.map_or(machine, |group| group.available),
        container: container.map(|group| group.limit),
        peak: kib("/proc/self/status", "VmHWM:"),
    }
}

fn kib(path: &str, key: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// The memory of CUDA device `index`.
///
/// # Errors
/// There is no such device.
pub fn cuda_memory(index: usize) -> Result<CudaMemory, Error> {
    let mut memory = CudaMemory { free: 0, total: 0, peak: 0 };
    let index = i32::try_from(index).map_err(|_| Error::Other(format!("no CUDA device {index}")))?;
    // SAFETY: three places for one number each.
    ffi::check(unsafe { ffi::bbt_cuda_memory(index, &mut memory.free, &mut memory.total, &mut memory.peak) })?;
    Ok(memory)
}
