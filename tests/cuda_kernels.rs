//! The CUDA kernels without a GPU: NVRTC compiles them for every kind of GPU that libtorch serves, and an emulation
//! (`cuda/`) runs them, with the code that launches them, against libtorch's operators.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bbt::libtorch::compile_cuda_kernels;

/// The only file in `folder`.
fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.into_iter().next().unwrap()
}

// As `this_build_has_nccl` in distributed.rs: the tests want the libtorch with CUDA that `make libtorch` installs.
#[test]
fn kernels_compile_for_every_gpu() {
    for architecture in ["sm_80", "sm_89", "sm_90", "sm_100"] {
        let cache = tempfile::tempdir().unwrap();
        let bytes = compile_cuda_kernels(architecture, cache.path()).expect("kernels that compile");
        let file = fs::read(only_file(cache.path())).unwrap();
        assert!(file.starts_with(b"\x7fELF") && bytes > 10_000, "{architecture}: {bytes} bytes");
    }
}

#[test]
fn a_gpu_that_nvrtc_does_not_know_is_named() {
    let cache = tempfile::tempdir().unwrap();
    let error = compile_cuda_kernels("sm_12345", cache.path()).unwrap_err().to_string();
    assert!(error.contains("sm_12345"), "{error}");
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}

#[test]
fn the_cache_saves_time_and_costs_no_trust() {
    let cache = tempfile::tempdir().unwrap();
    let folder = cache.path().join("not/there/yet");
    // Ranks of one machine come at once.
    let ranks: Vec<_> = (0..2)
        .map(|_| {
            let folder = folder.clone();
            std::thread::spawn(move || compile_cuda_kernels("sm_90", &folder).unwrap())
        })
        .collect();
    let bytes: Vec<usize> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    assert!(bytes.iter().all(|&b| b == bytes[0]), "{bytes:?}");
    let path = only_file(&folder);
    let whole = fs::read(&path).unwrap();

    // Found: the file is not written again.
    let written = fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(compile_cuda_kernels("sm_90", &folder).unwrap(), bytes[0]);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);

    // Torn, changed: compiled again, and whole afterwards.
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    for bad in [&whole[..whole.len() / 2], &changed] {
        fs::write(&path, bad).unwrap();
        assert_eq!(compile_cuda_kernels("sm_90", &folder).unwrap(), bytes[0]);
        assert_eq!(fs::read(only_file(&folder)).unwrap(), whole);
    }

    // A folder that cannot be: under a file.
    assert_eq!(compile_cuda_kernels("sm_90", &path.join("folder")).unwrap(), bytes[0]);
}

/// Starts the C++ compiler on `source`, which is relative to the repository.
fn compile(source: &str, object: &Path, flags: &[&str]) -> Child {
    Command::new(std::env::var_os("CXX").unwrap_or("c++".into()))
        .args(["-std=c++17", "-c", concat!("-D_GLIBCXX_USE_CXX11_ABI=", env!("BBT_TORCH_ABI"))])
        .args(["-isystem", env!("BBT_TORCH_INCLUDE")])
        .args(flags)
        .arg("-o")
        .arg(object)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(source))
        .stdin(Stdio::null())
        .spawn()
        .expect("a C++ compiler")
}

#[test]
fn emulated_kernels_are_the_formulas() {
    let folder = tempfile::tempdir().unwrap();
    // A misaligned pack, or an index beyond an array of the kernel, ends the program.
    let checked: &[&str] =
        &["-O1", "-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"];
    let sources = [
        ("tests/cuda/emulation.cpp", checked),
        ("tests/cuda/run.cpp", &["-O0"]),
        ("src/libtorch/shim/fused_cuda.cpp", &["-O0"]),
    ];
    let objects: Vec<PathBuf> = (0..sources.len()).map(|i| folder.path().join(format!("{i}.o"))).collect();
    let compilers: Vec<Child> =
        sources.iter().zip(&objects).map(|((source, flags), object)| compile(source, object, flags)).collect();
    for (mut compiler, (source, _)) in compilers.into_iter().zip(&sources) {
        assert!(compiler.wait().unwrap().success(), "{source} does not compile");
    }
    let program = folder.path().join("run");
    let lib = env!("BBT_TORCH_LIB");
    let linked = Command::new(std::env::var_os("CXX").unwrap_or("c++".into()))
        .args(&objects)
        .args([&format!("-L{lib}"), "-ltorch_cpu", "-lc10", &format!("-Wl,-rpath,{lib}"), "-o"])
        .arg(&program)
        .status()
        .unwrap();
    assert!(linked.success());
    let run = Command::new(&program).env("OMP_NUM_THREADS", "1").output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    println!("{text}");
    assert!(run.status.success(), "{}\n{text}{errors}", run.status);
}
