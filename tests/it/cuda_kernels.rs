//! The CUDA kernels without a GPU: NVRTC compiles them for the GPUs that are common, an emulation (`cuda/`) runs them
//! against libtorch's operators, and a driver that computes nothing checks how they are launched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use crate::common::has_cuda_libtorch;
use bbt::kernels::compile_cuda_kernels;

/// The only file in `folder`.
fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.into_iter().next().unwrap()
}

/// That `file` is the machine code of kernels.
fn is_machine_code(file: &Path) -> bool {
    let code = fs::read(file).unwrap();
    code.starts_with(b"\x7fELF") && code.len() > 10_000
}

// `launches_are_what_a_driver_takes` compiles for sm_80 and sm_90. Two at once, as ranks of one machine come.
#[test]
fn kernels_compile() {
    if !has_cuda_libtorch() {
        return;
    }
    let compile = |architecture: &str| {
        let cache = tempfile::tempdir().unwrap();
        let bytes = compile_cuda_kernels(architecture, cache.path()).expect("kernels that compile");
        let file = only_file(cache.path());
        // The code and its hash.
        assert_eq!(fs::metadata(&file).unwrap().len(), bytes as u64 + 16, "{architecture}");
        assert!(is_machine_code(&file), "{architecture}: {bytes} bytes");
    };
    std::thread::scope(|scope| {
        for architecture in ["sm_89", "sm_100"] {
            scope.spawn(move || compile(architecture));
        }
    });
}

#[test]
fn a_gpu_that_nvrtc_does_not_know_is_named() {
    if !has_cuda_libtorch() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let error = compile_cuda_kernels("sm_12345", cache.path()).unwrap_err().to_string();
    assert!(error.contains("sm_12345"), "{error}");
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
}

/// `CXX`, which may be several words (`ccache g++`), as cargo's build scripts take it.
pub fn compiler() -> Command {
    let words = std::env::var("CXX").unwrap_or("c++".into());
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or("c++"));
    command.args(words);
    command
}

/// Compiles C++ `sources` of the repository, each with its flags, and links them to `program`.
fn build(program: &Path, sources: &[(&str, &[&str])], flags: &[&str]) {
    let object = |i: usize| program.with_extension(format!("{i}.o"));
    let compile = |(i, (source, own)): (usize, &(&str, &[&str]))| {
        compiler()
            .args(["-std=c++17", "-c", concat!("-D_GLIBCXX_USE_CXX11_ABI=", env!("BBT_TORCH_ABI"))])
            .args(["-isystem", env!("BBT_TORCH_INCLUDE")])
            .args(["-isystem", concat!(env!("BBT_TORCH_INCLUDE"), "/torch/csrc/api/include"), "-I", env!("OUT_DIR")])
            .args(flags)
            .args(*own)
            .arg("-o")
            .arg(object(i))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(source))
            .spawn()
            .expect("a C++ compiler")
    };
    let compilers: Vec<Child> = sources.iter().enumerate().map(compile).collect();
    for (mut compiler, (source, _)) in compilers.into_iter().zip(sources) {
        assert!(compiler.wait().unwrap().success(), "{source} does not compile");
    }
    let lib = env!("BBT_TORCH_LIB");
    let mut linker = compiler();
    linker.args((0..sources.len()).map(object)).args(flags).arg("-o").arg(program);
    if !flags.contains(&"-shared") {
        linker.args([&format!("-L{lib}"), "-ltorch_cpu", "-lc10", "-ldl", "-pthread", &format!("-Wl,-rpath,{lib}")]);
    }
    assert!(linker.status().unwrap().success(), "{} does not link", program.display());
}

/// Runs `program`, which says what is wrong.
fn run(program: &mut Command) {
    let done = program.env("OMP_NUM_THREADS", "1").output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{}\n{text}{errors}", done.status);
    println!("{text}");
}

/// A misaligned pack, or an index beyond an array of the kernel, ends the program.
const CHECKED: [&str; 3] =
    ["-O1", "-fsanitize=alignment,bounds,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"];

#[test]
fn emulated_kernels_are_the_formulas() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("kernels");
    let sources: [(&str, &[&str]); 2] = [("tests/cuda/emulation.cpp", &CHECKED), ("tests/cuda/run.cpp", &[])];
    build(&program, &sources, &[]);
    run(&mut Command::new(program));
}

// Neither side may fuse a product and a sum, so that their bits can be compared.
#[test]
fn adamw8bit_is_the_cpus_and_bitsandbytes_gets_what_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("adamw8bit");
    let checked = [&CHECKED[..], &["-ffp-contract=off"]].concat();
    let mut sources: Vec<(&str, &[&str])> = vec![
        ("tests/cuda/emulation.cpp", &checked),
        ("tests/cuda/adamw8bit.cpp", &[]),
        ("src/kernels/shim/adamw8bit.cpp", &[]),
        ("src/kernels/shim/adamw8bit_cuda.cpp", &[]),
        ("src/kernels/shim/bitsandbytes.cpp", &[]),
        ("src/kernels/cpu/adamw8bit_portable.cpp", &["-O2", "-ffp-contract=off"]),
        ("src/kernels/cpu/adamw8bit_lookup.cpp", &[]),
    ];
    // The shim names them.
    if cfg!(target_arch = "x86_64") {
        sources.push(("src/kernels/cpu/adamw8bit_avx2.cpp", &["-mavx2", "-mfma"]));
        sources.push(("src/kernels/cpu/adamw8bit_avx512.cpp", &["-mavx512f", "-mavx512bw", "-mfma"]));
        let bytes = &["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vbmi", "-mfma"];
        sources.push(("src/kernels/cpu/adamw8bit_avx512vbmi.cpp", bytes));
    }
    build(&program, &sources, &[]);
    let library = |name: &str, flags: &[&str]| {
        let library = folder.path().join(name);
        build(&library, &[("tests/cuda/bitsandbytes.cpp", flags)], &["-shared", "-fPIC"]);
        library
    };
    let library_of = |path: &Path| {
        let mut program = Command::new(&program);
        program.env("BBT_BITSANDBYTES", path).current_dir(folder.path());
        program
    };
    let bitsandbytes = library("libbitsandbytes_cuda130.so", &[]);
    run(&mut library_of(&bitsandbytes));

    // Which kernel is found, and what is said of a library that cannot be.
    let other = library("other.so", &["-DOTHER_ARGUMENTS"]);
    for (path, parts) in [
        (&bitsandbytes, ["path /", "libbitsandbytes_cuda130.so why - error -"]),
        (&"libbitsandbytes_cuda130.so".into(), ["path /", "libbitsandbytes_cuda130.so why - error -"]),
        (&"none".into(), ["path - why BBT_BITSANDBYTES is none", "error -"]),
        (&"".into(), ["path - why this libtorch is built without CUDA", "error -"]),
        (&"absent.so".into(), ["path - why - error BBT_BITSANDBYTES=absent.so: there is no /", "`none` to do without"]),
        (&other, ["is not that of bitsandbytes 0.50: it has no _Z29adam_8bit", "`none` to do without"]),
    ] as [(&PathBuf, [&str; 2]); 6]
    {
        let said = library_of(path).arg("which").output().unwrap();
        let said = String::from_utf8_lossy(&said.stdout);
        assert!(parts.iter().all(|part| said.contains(part)), "{}: {said}", path.display());
    }
}

#[test]
fn launches_are_what_a_driver_takes() {
    let folder = tempfile::tempdir().unwrap();
    build(&folder.path().join("libcuda.so.1"), &[("tests/cuda/driver.cpp", &[])], &["-shared", "-fPIC"]);
    let program = folder.path().join("launch");
    let sources: [(&str, &[&str]); 3] = [
        ("tests/cuda/launch.cpp", &[]),
        ("src/kernels/shim/cuda_launch.cpp", &[]),
        ("src/kernels/shim/nvrtc.cpp", &[]),
    ];
    build(&program, &sources, &[]);
    let cache = folder.path().join("cache");
    run(Command::new(program).env("LD_LIBRARY_PATH", folder.path()).env("XDG_CACHE_HOME", &cache));
    // One file for each of the two GPUs.
    let mut files: Vec<PathBuf> = fs::read_dir(cache.join("bbt")).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 2, "{files:?}");
    for (file, architecture) in files.iter().zip(["sm_80", "sm_90"]) {
        assert!(file.to_str().unwrap().contains(architecture) && is_machine_code(file), "{files:?}");
    }
}

/// The file in which the NVRTC of `cuda/nvrtc.cpp` counts.
const COUNT: &str = "FAKE_NVRTC_COUNT";

// With an NVRTC that counts, in a process of its own: the real one takes seconds each time.
#[test]
fn the_cache_saves_time_and_costs_no_trust() {
    let folder = tempfile::tempdir().unwrap();
    build(&folder.path().join("libnvrtc.so.13"), &[("tests/cuda/nvrtc.cpp", &[])], &["-shared", "-fPIC"]);
    let mut test = Command::new(std::env::current_exe().unwrap());
    test.args(["--ignored", "--exact", "cuda_kernels::with_an_nvrtc_that_counts"]);
    run(test.env("LD_LIBRARY_PATH", folder.path()).env(COUNT, folder.path().join("count")));
    assert!(compiled(&folder.path().join("count")) > 0, "the test in the other process ran");
}

/// How often NVRTC compiled.
fn compiled(count: &Path) -> u64 {
    fs::metadata(count).map_or(0, |file| file.len())
}

#[test]
#[ignore = "a part of the_cache_saves_time_and_costs_no_trust, which runs it with another NVRTC"]
fn with_an_nvrtc_that_counts() {
    let Some(count) = std::env::var_os(COUNT).map(PathBuf::from) else { return };
    let cache = tempfile::tempdir().unwrap();
    let folder = cache.path().join("not/there/yet");
    // Ranks of one machine come at once.
    let ranks: Vec<_> = (0..8)
        .map(|_| {
            let folder = folder.clone();
            std::thread::spawn(move || compile_cuda_kernels("sm_90", &folder).unwrap())
        })
        .collect();
    let bytes: Vec<usize> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    assert!(bytes.iter().all(|&b| b == bytes[0]), "{bytes:?}");
    let path = only_file(&folder);
    let whole = fs::read(&path).unwrap();
    let mut before = compiled(&count);
    assert!((1..=8).contains(&before), "{before} times compiled");

    // Found: neither compiled nor written again.
    let written = fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(compile_cuda_kernels("sm_90", &folder).unwrap(), bytes[0]);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written);
    assert_eq!(compiled(&count), before);

    // Torn, changed: compiled again, and whole afterwards.
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    for bad in [&whole[..0], &whole[..7], &whole[..whole.len() / 2], &changed] {
        fs::write(&path, bad).unwrap();
        assert_eq!(compile_cuda_kernels("sm_90", &folder).unwrap(), bytes[0]);
        assert_eq!(fs::read(only_file(&folder)).unwrap(), whole);
        before += 1;
        assert_eq!(compiled(&count), before);
    }

    // Another GPU's kernels are other ones.
    compile_cuda_kernels("sm_80", &folder).unwrap();
    assert_eq!((fs::read_dir(&folder).unwrap().count(), compiled(&count)), (2, before + 1));

    // A folder that cannot be: under a file.
    assert_eq!(compile_cuda_kernels("sm_90", &path.join("folder")).unwrap(), bytes[0]);
    assert_eq!(compiled(&count), before + 2);
}
