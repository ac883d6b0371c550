//! Checks the libtorch that torch-sys found, compiles the C++ shim against it, and makes the binary
//! find it at run time.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// The libtorch that tch 0.24 binds.
const TORCH_VERSION: &str = "2.11.0";

const SHIM: &str = "src/libtorch/shim";

fn main() {
    println!("cargo:rerun-if-changed={SHIM}");
    println!("cargo:rerun-if-changed=build.rs");
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
    let mut sources: Vec<PathBuf> = fs::read_dir(SHIM)
        .expect("the shim's sources")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cpp"))
        .collect();
    sources.sort();
    let mut build = cc::Build::new();
    let cuda = lib.join("libtorch_cuda.so").exists();
    match nccl_includes(root) {
        Some(includes) if cuda => {
            build.define("BBT_NCCL", None).includes(includes);
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
        .include(format!("{SHIM}/gloo_names"))
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        // libtorch's own headers warn.
        .warnings(false)
        .files(&sources)
        .compile("bbt_shim");

    println!("cargo:rustc-link-search=native={}", lib.display());
    for library in ["torch", "torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={library}");
    }
    // The linker would drop libtorch_cuda where nothing names its symbols: it registers itself when loaded.
    if cuda {
        println!("cargo:rustc-link-lib=torch_cuda");
        println!("cargo:rustc-link-lib=c10_cuda");
        println!("cargo:rustc-link-arg=-Wl,--no-as-needed,-ltorch_cuda,--as-needed");
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
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

/// The version of libtorch; stops the build with the remedy where it is missing or another one.
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
