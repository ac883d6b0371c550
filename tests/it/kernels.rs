//! `quant.kernel`: the fused kernels train as the reference does, and a run may change from one to the other.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use bbt::config::{Config, ModelConfig, Precision, QuantKernel, TrainConfig};
use bbt::training::metrics::{TrainObserver, TrainRow, ValRow};
use bbt::training::{RunDir, Start, Trainer};
use walkdir::WalkDir;

/// Losses of the logged steps, and the last validation's bits per byte.
#[derive(Default)]
struct Losses {
    train: Vec<f64>,
    held_out: f64,
}

impl TrainObserver for Losses {
    fn on_step(&mut self, row: &TrainRow) {
        self.train.push(row.loss);
    }

    fn on_validation(&mut self, row: &ValRow) {
        self.held_out = row.val_bits_per_byte;
    }
}

/// The Rust files under a directory of the repository, one after the other in one file: some are shorter than a window.
fn sources(under: &str, dir: &Path) -> String {
    let files = WalkDir::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(under)).sort_by_file_name().into_iter();
    let files =
        files.map(|entry| entry.unwrap().into_path()).filter(|path| path.extension().is_some_and(|e| e == "rs"));
    let text: Vec<u8> = files.flat_map(|path| fs::read(path).unwrap()).collect();
    let path = dir.join(format!("{}.bin", under.replace('/', "-")));
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn config(dir: &Path, kernel: QuantKernel, precision: Precision) -> Config {
    let mut config = Config::default();
    config.model = ModelConfig { n_layer: 2, d_model: 96, n_head: 3, d_ff: 256, ..config.model };
    config.quant.kernel = kernel;
    config.data.train = sources("src", dir);
    config.data.val = Some(sources("tests/it", dir));
    config.data.seq_len = Some(128);
    (config.optim.lr, config.optim.warmup_frac) = (1e-3, 0.1);
    config.train = TrainConfig {
        steps: 300,
        batch_size: 4,
        precision,
        log_every: 1,
        save_every: 0,
        eval_every: 300,
        eval_bytes: Some(65536),
        checkpointing: true,
        out: dir.join(format!("{kernel:?}{precision:?}")),
        ..config.train
    };
    config
}

fn train(config: Config, start: Start) -> Losses {
    RunDir::new(&config.train.out).ensure().unwrap();
    let mut losses = Losses::default();
    Trainer::new(config, start).unwrap().train(&mut losses, &AtomicBool::new(false)).unwrap();
    losses
}

/// A rounding that falls the other way soon makes another run of it, which ends better or worse by chance: by 0.08 %
/// (standard deviation over five starts with the learning rate changed by a millionth).
#[test]
fn fused_and_reference_learn_the_same() {
    const STARTS: u64 = 2;
    for precision in [Precision::Fp32, Precision::Bf16] {
        let mut held_out = [0.0; 2];
        for seed in 0..STARTS {
            let dir = tempfile::tempdir().unwrap();
            // One start for both: the random generator is the process's, not the seed's alone.
            let mut first = config(dir.path(), QuantKernel::Reference, precision);
            (first.train.steps, first.train.seed, first.train.out) = (1, seed, dir.path().join("start"));
            first.data.val = None;
            train(first, Start::Fresh);
            let start = Start::Init(dir.path().join("start/ckpt.pt"));
            let [reference, fused] = [QuantKernel::Reference, QuantKernel::Fused]
                .map(|kernel| train(config(dir.path(), kernel, precision), start.clone()));
            let (first, other) = (reference.train[0], fused.train[0]);
            assert!((first - other).abs() < 5e-3 * first, "{first} {other}");
            println!("{precision:?} {seed}: reference {:.4}, fused {:.4}", reference.held_out, fused.held_out);
            held_out[0] += reference.held_out / STARTS as f64;
            held_out[1] += fused.held_out / STARTS as f64;
        }
        let [reference, fused] = held_out;
        println!("{precision:?}: reference {reference:.4}, fused {fused:.4} bits per byte");
        // That something was learned at all: 8 is knowing nothing.
        assert!(reference < 5.0, "{reference}");
        assert!((fused / reference - 1.0).abs() < 5e-3, "{precision:?}: reference {reference}, fused {fused}");
    }
}

/// After the change comes the step that would have come without it, and the run goes on.
#[test]
fn a_run_may_change_its_kernel() {
    for (precision, bound) in [(Precision::Fp32, 3e-3), (Precision::Bf16, 2e-2)] {
        let dir = tempfile::tempdir().unwrap();
        let part = |from: &str, name: &str, kernel, stop_at| {
            let mut config = config(dir.path(), kernel, precision);
            (config.train.steps, config.train.stop_at) = (20, Some(stop_at));
            config.train.out = dir.path().join(name);
            let start = match from {
                "" => Start::Fresh,
                from => Start::Resume { path: dir.path().join(from).join("ckpt.pt"), optimizer_state: true },
            };
            train(config, start).train
        };
        let (reference, fused) = (QuantKernel::Reference, QuantKernel::Fused);
        let mut losses = part("", "begun", reference, 5);
        for (from, name, was, becomes, stop_at) in [
            ("begun", "fused", reference, fused, 10),
            ("fused", "reference again", fused, reference, 15),
            ("reference again", "fused again", reference, QuantKernel::Auto, 20),
        ] {
            let unchanged = part(from, &format!("{name}, unchanged"), was, stop_at - 4);
            let changed = part(from, name, becomes, stop_at);
            let apart = (changed[0] - unchanged[0]).abs();
            println!("{precision:?}, {name}: {apart:.1e} apart");
            assert!(apart < bound, "{precision:?}, {name}: {changed:?} {unchanged:?}");
            losses.extend(changed);
        }
        assert!(losses.len() == 20 && losses[19] < losses[0] - 1.0, "it does not learn: {losses:?}");
    }
}
