//! Checks the libtorch that torch-sys found, compiles our C++ against it, and makes the binary find it at run time.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// The libtorch that tch 0.24 binds.
const TORCH_VERSION: &str = "2.11.0";

/// What libtorch has and tch does not bind, and bbt's own kernels as operations on tensors.
const SHIMS: [&str; 2] = ["src/libtorch/shim", "src/kernels/shim"];
const CPU_KERNELS: &str = "src/kernels/cpu";
const CUDA_KERNELS: &str = "src/kernels/cuda";

/// The compiler's flags for the CPU kernels on x86-64, by the ending of a file's name.
const X86_64: [(&str, &[&str]); 6] = [
    ("_avx2", &["-mavx2", "-mfma"]),
    ("_avxvnni", &["-mavx2", "-mfma", "-mavxvnni"]),
    ("_avx512", &["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]),
    ("_avx512vnni", &["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512vnni"]),
    ("_avx512vbmi", &["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512vbmi"]),
    ("_avx512bf16", &["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512bf16"]),
];

fn main() {
    for path in SHIMS.into_iter().chain([CPU_KERNELS, CUDA_KERNELS, "build.rs"]) {
        println!("cargo:rerun-if-changed={path}");
    }
    // torch-sys passes the folder it links from to the packages that depend on it directly.
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys names its lib folder"));
    let root = lib.parent().expect("the lib folder has a parent");
    let version = check_version(root);
    println!("cargo:rustc-env=BBT_TORCH_VERSION={version}");
    println!("cargo:rustc-env=BBT_TORCH_LIB={}", lib.display());

    let include = match env::var("LIBTORCH_INCLUDE") {
        Ok(dir) => PathBuf::from(dir).join("include"),
        Err(_) => root.join("include"),
    };
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    // For the tests that compile C++ of their own.
    println!("cargo:rustc-env=BBT_TORCH_INCLUDE={}", include.display());
    println!("cargo:rustc-env=BBT_TORCH_ABI={abi}");
    let mut build = cc::Build::new();
    let cuda = lib.join("libtorch_cuda.so").exists();
    match nccl_includes(root) {
        Some(includes) if cuda => {
            build.define("BBT_NCCL", None);
            includes.iter().for_each(|folder| system_include(&mut build, folder));
        }
        None if cuda => println!(
            "cargo:warning=NCCL's and CUDA's headers are not beside libtorch: this bbt trains on one GPU only. `make libtorch` installs them; for your own PyTorch: pip install nvidia-cuda-crt==13.0.* nvidia-cuda-cccl==13.0.*"
        ),
        _ => {}
    }
    build
        .cpp(true)
        .std("c++17")
        .pic(true)
        // First: names of gloo, whose headers libtorch does not ship.
        .include(format!("{}/gloo_names", SHIMS[0]))
        .include(embed_cuda_kernels())
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        // at::parallel_for is a template around OpenMP.
        .flag("-fopenmp")
        .files(SHIMS.into_iter().flat_map(sources));
    system_include(&mut build, &include);
    system_include(&mut build, &include.join("torch/csrc/api/include"));
    warn(&mut build);
    build.compile("bbt_shim");
    compile_cpu_kernels();

    println!("cargo:rustc-link-search=native={}", lib.display());
    for library in ["torch", "torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={library}");
    }
    // The OpenMP that libtorch runs on: under another name it would be a second one, with threads of its own.
    match openmp(&lib) {
        Some(name) => println!("cargo:rustc-link-lib=dylib:+verbatim={name}"),
        None => println!("cargo:rustc-link-lib=gomp"),
    }
    // The linker would drop libtorch_cuda where nothing names its symbols: it registers itself when loaded.
    if cuda {
        println!("cargo:rustc-link-lib=torch_cuda");
        println!("cargo:rustc-link-lib=c10_cuda");
        println!("cargo:rustc-link-arg=-Wl,--no-as-needed,-ltorch_cuda,--as-needed");
    }
    // As RPATH, which counts before LD_LIBRARY_PATH: a RUNPATH would give way to another PyTorch's libtorch there.
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{}", lib.display());
}

/// Includes others' headers from `folder` without their warnings.
fn system_include(build: &mut cc::Build, folder: &Path) {
    build.flag("-isystem").flag(folder.to_str().expect("a path in UTF-8"));
}

/// Turns warnings on for our own C++. They are errors only where `BBT_WERROR` is set, as in `.ci/run`: a new warning of
/// another compiler must not keep a user from building.
fn warn(build: &mut cc::Build) {
    println!("cargo:rerun-if-env-changed=BBT_WERROR");
    build.warnings(true).extra_warnings(true).flag("-Wmissing-declarations");
    build.warnings_into_errors(env::var_os("BBT_WERROR").is_some());
}

/// The folders with the headers of NCCL and CUDA that PyPI's packages put beside the wheel's `torch`.
fn nccl_includes(root: &Path) -> Option<[PathBuf; 2]> {
    let nvidia = root.parent()?.join("nvidia");
    let (nccl, cuda) = (nvidia.join("nccl/include"), nvidia.join("cu13/include"));
    let cuda_headers = ["cuda_runtime_api.h", "crt/host_defines.h", "nv/target"];
    let mut needed = cuda_headers.map(|header| cuda.join(header)).to_vec();
    needed.push(nccl.join("nccl.h"));
    needed.iter().for_each(|header| println!("cargo:rerun-if-changed={}", header.display()));
    needed.iter().all(|header| header.exists()).then_some([nccl, cuda])
}

/// The C++ files of `folder`.
fn sources(folder: &str) -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = fs::read_dir(folder)
        .expect("a folder of sources")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cpp"))
        .collect();
    sources.sort();
    sources
}

/// Compiles each kernel for its instruction set, optimized in every profile: a slow kernel is of no use.
fn compile_cpu_kernels() {
    let x86_64 = env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64");
    let mut objects = Vec::new();
    for source in sources(CPU_KERNELS) {
        let name = source.file_stem().expect("a file's name").to_string_lossy().into_owned();
        let flags = X86_64.iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, flags)| *flags);
        if flags.is_some() && !x86_64 {
            continue;
        }
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").pic(true).opt_level(3).flag("-ffp-contract=fast");
        warn(&mut build);
        for flag in flags.unwrap_or_default() {
            build.flag(flag);
        }
        objects.extend(build.file(&source).compile_intermediates());
    }
    cc::Build::new().objects(objects).compile("bbt_cpu_kernels");
}

/// Writes the sources of the CUDA kernels, which are compiled on the machine that has the GPU, as entries of
/// nvrtc.cpp's table. Returns the folder to include it from.
fn embed_cuda_kernels() -> PathBuf {
    let mut files: Vec<PathBuf> = fs::read_dir(CUDA_KERNELS)
        .expect("a folder of kernels")
        .map(|e| e.expect("a readable folder").path())
        .collect();
    files.sort();
    let mut table = String::new();
    for file in files {
        let name = file.file_name().expect("a file's name").to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).expect("a source");
        table += &format!("{{\"{name}\", R\"bbt({text})bbt\"}},\n");
    }
    let folder = PathBuf::from(env::var("OUT_DIR").expect("cargo names the folder"));
    fs::write(folder.join("cuda_sources.inc"), table).expect("a writable folder");
    folder
}

/// The OpenMP library that libtorch brings along.
fn openmp(lib: &Path) -> Option<String> {
    let names = fs::read_dir(lib).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.into_iter().find(|name| name.starts_with("libgomp") && name.contains(".so"))
}

/// The version of libtorch. If it is missing or another one, stops the build and says what to do.
fn check_version(root: &Path) -> String {
    let version = wheel_version(root).or_else(|| zip_version(root));
    match version {
        None => panic!(
            "no libtorch found in {}: run `make libtorch`, or set LIBTORCH to a libtorch {TORCH_VERSION}",
            root.display()
        ),
        Some(v) if v.split('+').next() != Some(TORCH_VERSION) => panic!(
            "libtorch {v} found in {}, but bbt needs {TORCH_VERSION}: run `make libtorch`, or set LIBTORCH to a libtorch {TORCH_VERSION}",
            root.display()
        ),
        Some(version) => version,
    }
}

/// `__version__` of a Python wheel's `torch/version.py`.
fn wheel_version(root: &Path) -> Option<String> {
    let path = root.join("version.py");
    println!("cargo:rerun-if-changed={}", path.display());
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with("__version__"))?;
    Some(line.split(['\'', '"']).nth(1)?.to_string())
}

/// The `build-version` file of a libtorch archive.
fn zip_version(root: &Path) -> Option<String> {
    let text = fs::read_to_string(root.join("build-version")).ok()?;
    Some(text.trim().to_string())
}
