//! What the integration tests share: golden data, the binary, Python.
#![allow(dead_code)] // each test program uses its part

pub mod cli;

use std::collections::HashMap;
use std::io::Write;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;

use bbt::checkpoint::Value;
use bbt::config::{ActQuant, Attention, ModelConfig, QuantConfig, QuantKernel, Ste};
use bbt::models::BitByteLM;
use tch::{Device, Tensor, nn};

/// 16,800 bytes to train on, in which no window of 16 bytes or more comes twice: another place in them has another loss.
pub fn text() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text.bin")
}

/// A folder of golden data: numbers written by the PyTorch original.
pub struct Golden {
    pub dir: PathBuf,
    pub meta: serde_json::Value,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    pub fn open(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let meta = std::fs::read(dir.join("meta.json")).expect("meta.json");
        let meta = serde_json::from_slice(&meta).expect("meta.json is JSON");
        // tch's own reader of safetensors: independent of ours.
        let tensors = Tensor::read_safetensors(dir.join("golden.safetensors")).expect("golden.safetensors");
        Self { dir, meta, tensors: tensors.into_iter().collect() }
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no golden tensor {name}"))
    }

    /// All tensors whose name starts with `prefix`, by the rest of their name.
    pub fn with_prefix(&self, prefix: &str) -> HashMap<String, Tensor> {
        let named = self.tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?, t)));
        named.map(|(name, t)| (name.to_string(), t.shallow_clone())).collect()
    }

    pub fn model_config(&self) -> ModelConfig {
        let config = &self.meta["config"];
        let get = |key: &str| config[key].as_i64().expect(key);
        ModelConfig {
            n_layer: get("n_layer"),
            d_model: get("d_model"),
            n_head: get("n_head"),
            n_kv_head: config["n_kv_head"].as_i64(),
            d_ff: get("d_ff"),
            // The original's: another kernel's rounding makes activations fall on other codes.
            attention: Attention::Sdpa,
            ..ModelConfig::default()
        }
    }

    pub fn quant_config(&self, ste: Ste) -> QuantConfig {
        let act = if self.meta["config"]["act_quant"] == true { ActQuant::Int8 } else { ActQuant::None };
        // As attention above.
        QuantConfig { ste, act, kernel: QuantKernel::Reference, ..QuantConfig::default() }
    }
}

/// The two straight-through estimators with their names in the golden data.
pub const STES: [(&str, Ste); 2] = [("identity", Ste::Identity), ("clipped", Ste::Clipped)];

/// Largest difference relative to the largest value expected.
pub fn relative_difference(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.size(), expected.size());
    let largest = expected.abs().max().double_value(&[]).max(1e-30);
    (actual - expected).abs().max().double_value(&[]) / largest
}

/// A model on the CPU with the given weights, by PyTorch's names.
pub fn model_with(
    config: &ModelConfig,
    quant: &QuantConfig,
    weights: &HashMap<String, Tensor>,
) -> (nn::VarStore, BitByteLM) {
    let vs = nn::VarStore::new(Device::Cpu);
    let model = BitByteLM::new(&vs.root(), config, quant);
    let _no_grad = tch::no_grad_guard();
    for (name, mut variable) in vs.variables() {
        variable.copy_(weights.get(&name).unwrap_or_else(|| panic!("no weight {name}")));
    }
    drop(_no_grad);
    (vs, model)
}

/// A port for a store that is still to be served. The kernel gives it to nobody else, because it lies below those that it
/// hands out by itself (`net.ipv4.ip_local_port_range`), and neither does another test: a local socket with the port in its
/// name, held until this program ends, says that it is taken.
pub fn free_port() -> u16 {
    static HELD: Mutex<Vec<UnixListener>> = Mutex::new(vec![]);
    let mut held = HELD.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for port in 20_000..32_000 {
        let name = SocketAddr::from_abstract_name(format!("bbt-test-port-{port}")).expect("a name");
        let Ok(claim) = UnixListener::bind_addr(&name) else { continue };
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            held.push(claim);
            return port;
        }
    }
    panic!("no port is free");
}

/// Python with the torch that the tests check against. `BBT_PYTHON` names another interpreter;
/// LIBTORCH_USE_PYTORCH says that it has torch itself.
pub fn python_command(args: &[&std::ffi::OsStr]) -> std::process::Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = std::process::Command::new(std::env::var_os("BBT_PYTHON").unwrap_or_else(|| "python3".into()));
    command.args(args);
    let packages = [".libtorch", ".python-test"].map(|dir| root.join(dir));
    command.env("PYTHONPATH", std::env::join_paths(packages.iter().filter(|p| p.exists())).expect("a path list"));
    // libtorch sums in an order that depends on it. No test changes it, so it is the same in all.
    command.env("OMP_NUM_THREADS", tch::get_num_threads().to_string());
    command
}

/// Whether a test may run that needs `what`, of which `has_it` says whether it is here. Where it is not the test says so,
/// on the terminal and not in what libtest keeps of passing tests, and in CI (`CI=true`) it fails.
pub fn can_run(what: &str, has_it: bool) -> bool {
    if !has_it {
        let name = std::thread::current().name().unwrap_or("a test").to_string();
        let message = format!("{name}: not run: this needs {what}");
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{message}");
        let _ = writeln!(std::io::stderr(), "{message}");
    }
    has_it
}

/// Whether `command` succeeds in a shell.
pub fn shell_can(command: &str) -> bool {
    let mut shell = std::process::Command::new("bash");
    shell.args(["-c", command]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    shell.status().is_ok_and(|status| status.success())
}

/// Whether this program is linked to a libtorch with CUDA, which runs on machines without a GPU, too.
pub fn has_cuda_libtorch() -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    can_run("a libtorch with CUDA (`make libtorch` without CPU=1)", maps.contains("/libtorch_cuda.so"))
}

/// Runs that Python; panics, with its words, where it fails.
pub fn python(args: &[&std::ffi::OsStr]) -> String {
    let mut command = python_command(args);
    let output = command.output().unwrap_or_else(|e| panic!("{}: {e}", command.get_program().display()));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "Python with torch is needed (`make libtorch` installs it): {stderr}");
    String::from_utf8(output.stdout).expect("UTF-8 from Python")
}

/// Everything in two checkpoints, down to the bits of each tensor, but for the directory's name.
pub fn assert_same_checkpoint(a: &Value, b: &Value, key: &str) {
    match (a, b) {
        (Value::Tensor(a), Value::Tensor(b)) => {
            assert_eq!((a.dtype(), &a.shape), (b.dtype(), &b.shape), "{key}");
            assert!(a.contiguous_bytes() == b.contiguous_bytes(), "{key} differs");
        }
        (Value::Str(_), Value::Str(_)) if key.ends_with(".config") || key.ends_with(".out") => {}
        (Value::Str(a), Value::Str(b)) => assert_eq!(a, b, "{key}"),
        _ => {
            let (x, y) = (a.entries(), b.entries());
            assert_eq!((x.len(), a.elements().len()), (y.len(), b.elements().len()), "{key}");
            for ((k, x), (l, y)) in x.iter().zip(y) {
                assert_eq!(k, l, "{key}");
                assert_same_checkpoint(x, y, &format!("{key}.{}", k.as_str().unwrap_or("?")));
            }
            for (x, y) in a.elements().iter().zip(b.elements()) {
                assert_same_checkpoint(x, y, key);
            }
            if x.is_empty() && a.elements().is_empty() {
                assert_eq!(a, b, "{key}");
            }
        }
    }
}
