//! How much memory there is and how much was used: the host's from `/proc`, CUDA's from the caching
//! allocator.

use std::fs;

use super::{Error, ffi};
use crate::cgroup;

/// Memory of the host, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct HostMemory {
    /// What this process could still take without swapping: of the machine (`MemAvailable`), and of what its container
    /// may have.
    pub available: u64,
    /// What the container may have in all, where that is what leaves the least.
    pub container: Option<u64>,
    /// The most this process has had resident so far (`VmHWM`).
    pub peak: u64,
}

/// Memory of a CUDA device, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct CudaMemory {
    /// Free on the device now, for any process.
    pub free: u64,
    /// What the device has.
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
/// libtorch's own, where the device is absent.
pub fn cuda_memory(index: usize) -> Result<CudaMemory, Error> {
    let mut memory = CudaMemory { free: 0, total: 0, peak: 0 };
    let index = i32::try_from(index).map_err(|_| Error::Other(format!("no CUDA device {index}")))?;
    // SAFETY: three places for one number each.
    ffi::check(unsafe { ffi::bbt_cuda_memory(index, &mut memory.free, &mut memory.total, &mut memory.peak) })?;
    Ok(memory)
}
