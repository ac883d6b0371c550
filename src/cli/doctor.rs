//! `bbt doctor`.

use std::io::Write;
use std::path::Path;

use crate::cgroup;
use crate::kernels::{AdamW8bitKernel, CpuFeatures};
use crate::libtorch::{cuda_memory, host_memory};

/// Say what this machine offers: libtorch, CUDA, threads, memory, and what is missing
///
/// Example:
///   bbt doctor
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {}

pub fn run(_: Args) -> anyhow::Result<()> {
    let mut out = super::stdout();
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    writeln!(out, "bbt        {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "libtorch   {} in {}", env!("BBT_TORCH_VERSION"), env!("BBT_TORCH_LIB"))?;
    super::set_threads(None);
    let limited = cgroup::limits().cpus.map(|cpus| format!("; the container may use {cpus:.1} CPUs"));
    writeln!(out, "threads    {} for computing{}", tch::get_num_threads(), limited.unwrap_or_default())?;
    let memory = host_memory();
    let limited = memory.container.map(|limit| format!(" of the {} that the container may use", gib(limit)));
    writeln!(out, "memory     {} free{}", gib(memory.available), limited.unwrap_or_default())?;
    writeln!(out, "cpu        {}", CpuFeatures::detected())?;
    let features = CpuFeatures::chosen()?;
    let kernels: Vec<_> = features.kernels().iter().map(|(what, kernel)| format!("{what} {kernel}")).collect();
    writeln!(out, "kernels    {}", kernels.join(", "))?;
    if tch::Cuda::is_available() {
        for index in 0..tch::Cuda::device_count() {
            match cuda_memory(index as usize) {
                Ok(memory) => writeln!(out, "cuda:{index}     {} free of {}", gib(memory.free), gib(memory.total))?,
                Err(error) => writeln!(out, "cuda:{index}     {error}")?,
            }
        }
        writeln!(out, "cudnn      {}", if tch::Cuda::cudnn_is_available() { "yes" } else { "no" })?;
    } else {
        writeln!(out, "cuda       none: {}", why_no_cuda())?;
    }
    match AdamW8bitKernel::find() {
        Ok(AdamW8bitKernel::Bitsandbytes(path)) => {
            writeln!(out, "adamw8bit  on a GPU by bitsandbytes' {}", path.display())?
        }
        Ok(AdamW8bitKernel::Own(why)) => writeln!(out, "adamw8bit  on a GPU by bbt's own kernel: {why}")?,
        Err(error) => writeln!(out, "adamw8bit  not on a GPU: {}", error.text())?,
    }
    Ok(())
}

fn why_no_cuda() -> String {
    let library = Path::new(env!("BBT_TORCH_LIB")).join("libtorch_cuda.so");
    if !library.exists() {
        return "this libtorch is built without CUDA; `make libtorch` installs one with it".into();
    }
    if !Path::new("/dev/nvidiactl").exists() {
        return "no NVIDIA driver is loaded here; training runs on the CPU".into();
    }
    "libtorch finds no usable device: check `nvidia-smi` and CUDA_VISIBLE_DEVICES".into()
}
