//! Many ranks, each a process of its own, over Gloo: under torchrun, and by the bare variables.

use std::ffi::OsStr;
use std::net::TcpListener;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::common::cli::{Done, Running, Workspace};
use crate::common::{assert_same_checkpoint, can_run, free_port, has_cuda_libtorch, shell_can};
use bbt::checkpoint::{Value, torch_file};
use bbt::config::{ActQuant, Config, Decay, DeviceSpec, ModelConfig, OptimizerName, Order, Precision, WeightQuant};
use bbt::launch::RankEnv;
use bbt::training::{Start, Trainer, Verdict, setup_ddp};
use tch::Tensor;

/// Weights and activations in full precision: without rounding to codes, sums in another order stay as close
/// as fp32 rounding makes them.
const SMOOTH: &str = "--set quant.weight=none --set quant.act=none";

/// Moments of 8 bits of the embedding and of what is as large: matrices of 128 × 32.
const EIGHT_BITS: &str = "--set optim.name=adamw8bit --set model.d_ff=128";

/// One rank by torchrun's variables, without a launcher: rank 0 holds the store.
fn rank(ws: &Workspace, line: &str, rank: usize, world: usize, port: u16) -> Command {
    let mut command = ws.command(&line.split_whitespace().map(OsStr::new).collect::<Vec<_>>());
    command
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("WORLD_SIZE", world.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string());
    command
}

fn start(ws: &Workspace, line: &str, world: usize) -> Vec<Running> {
    let port = free_port();
    (0..world).map(|r| Running::start(rank(ws, line, r, world, port))).collect()
}

/// `world` ranks without a launcher, which takes a second to start; all must succeed.
fn ranks(ws: &Workspace, world: usize, line: &str) {
    let done: Vec<Done> = start(ws, line, world).into_iter().map(Running::wait).collect();
    assert!(done.iter().all(|d| d.status == Some(0)), "{world} ranks of bbt {line}: {done:?}");
}

fn torchrun_command(ws: &Workspace, world: usize, flags: &str, line: &str) -> Command {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let installed = root.join(".libtorch/bin/torchrun");
    let mut command = ws.shell(&format!(
        "exec {} --no-python --nproc-per-node={world} --master-port={} {flags} bbt {line}",
        if installed.exists() { installed.display().to_string() } else { "torchrun".into() },
        free_port()
    ));
    if installed.exists() {
        command.env("PYTHONPATH", root.join(".libtorch"));
    }
    command
}

/// `bbt` under PyTorch's own launcher.
fn torchrun(ws: &Workspace, world: usize, line: &str) -> Done {
    let done = Running::start(torchrun_command(ws, world, "", line)).wait();
    assert_eq!(done.status, Some(0), "torchrun … bbt {line}: {}", done.stderr);
    done
}

/// Largest difference of losses, step by step.
fn difference(ws: &Workspace, a: &str, b: &str) -> f64 {
    let (a, b) = (ws.losses(&format!("{a}/metrics.jsonl")), ws.losses(&format!("{b}/metrics.jsonl")));
    assert!(a.keys().eq(b.keys()), "{a:?} {b:?}");
    a.values().zip(b.values()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// Largest difference of the gradient's norm, step by step, relative to it. Clipping and Adam hide a factor on the
/// gradient from everything else.
fn norm_difference(ws: &Workspace, a: &str, b: &str) -> f64 {
    let norms = |run: &str| -> Vec<f64> {
        let rows = ws.rows(&format!("{run}/metrics.jsonl"));
        rows.iter().filter_map(|row| row["grad_norm"].as_f64()).collect()
    };
    let (a, b) = (norms(a), norms(b));
    assert!(!a.is_empty() && a.len() == b.len(), "{a:?} {b:?}");
    a.iter().zip(&b).map(|(a, b)| (b / a - 1.0).abs()).fold(0.0, f64::max)
}

/// Largest difference of weights and of AdamW's moments, relative to the largest value of each tensor.
fn state_difference(ws: &Workspace, a: &str, b: &str) -> f64 {
    let read = |run: &str| torch_file::read(&ws.path(run).join("ckpt.pt")).expect("reads");
    fn tensors(value: &Value, key: String, out: &mut Vec<(String, Vec<f32>)>) {
        if let Value::Tensor(data) = value {
            let bytes = data.contiguous_bytes();
            out.push((key, bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()));
            return;
        }
        for (k, v) in value.entries() {
            let name = k.as_str().map_or_else(|| format!("{:?}", k.as_i64()), String::from);
            tensors(v, format!("{key}.{name}"), out);
        }
    }
    let all = |run: &str| {
        let (value, mut out) = (read(run), vec![]);
        for part in ["model", "opt"] {
            tensors(value.get(part).expect(part), part.into(), &mut out);
        }
        out
    };
    let (a, b) = (all(a), all(b));
    assert_eq!(a.len(), b.len());
    let mut worst = 0f32;
    for ((k, x), (l, y)) in a.iter().zip(&b) {
        assert_eq!((k, x.len()), (l, y.len()));
        let scale = x.iter().fold(1e-12f32, |m, v| m.max(v.abs()));
        worst = x.iter().zip(y).fold(worst, |w, (x, y)| w.max((x - y).abs() / scale));
    }
    f64::from(worst)
}

// --- equality -------------------------------------------------------------------------------------

#[test]
fn ranks_train_as_one_would_on_their_joint_batch() {
    let ws = Workspace::new();
    let flags = format!(
        "train --config tiny.yaml --steps 12 --set data.val=text.bin --set train.eval_every=6 \
         --set train.eval_bytes=3000 --set train.grad_accum=2 {SMOOTH}"
    );
    ws.ok(&format!("{flags} --batch-size 4 --out one"));
    for (name, world, batch, more) in [
        ("two", 2, 2, ""),
        ("four", 4, 1, ""),
        ("checkpointed", 2, 2, "--set train.checkpointing=true"),
        ("buckets", 2, 2, "--set ddp.bucket_cap_mb=1"),
        ("sharded", 2, 2, "--set ddp.zero_stage=1"),
        ("sharded4", 4, 1, "--set ddp.zero_stage=1 --set train.checkpointing=true"),
    ] {
        torchrun(&ws, world, &format!("{flags} --batch-size {batch} --out {name} --ddp {more}"));
        assert!(difference(&ws, "one", name) < 2e-6, "{name}: {}", difference(&ws, "one", name));
        assert!(state_difference(&ws, "one", name) < 1e-4, "{name}: {}", state_difference(&ws, "one", name));
        assert!(norm_difference(&ws, "one", name) < 1e-4, "{name}: {}", norm_difference(&ws, "one", name));
        let validations = |run: &str| -> Vec<f64> {
            let rows = ws.rows(&format!("{run}/metrics.jsonl"));
            rows.iter().filter_map(|row| row["val_loss"].as_f64()).collect()
        };
        let (a, b) = (validations("one"), validations(name));
        assert_eq!((a.len(), b.len()), (2, 2));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 2e-6), "{name}: {a:?} {b:?}");
        let bytes = |run: &str| ws.rows(&format!("{run}/metrics.jsonl")).last().expect("a row")["bytes"].clone();
        assert_eq!(bytes("one"), bytes(name));
    }
}

#[test]
fn losses_by_class_of_byte_are_those_of_all_ranks() {
    let ws = Workspace::new();
    let flags = format!("train --config tiny.yaml --steps 3 --log-byte-class-loss {SMOOTH}");
    ws.ok(&format!("{flags} --batch-size 2 --out one"));
    for zero in [0, 1] {
        ranks(&ws, 2, &format!("{flags} --batch-size 1 --out two{zero} --set ddp.zero_stage={zero}"));
        let (one, two) = (ws.rows("one/metrics.jsonl"), ws.rows(&format!("two{zero}/metrics.jsonl")));
        assert_eq!((one.len(), two.len()), (3, 3));
        for (one, two) in one.iter().zip(&two) {
            for key in ["ws_loss", "nonws_loss"] {
                let [one, two] = [one, two].map(|row| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}")));
                assert!((one - two).abs() < 1e-5, "{key}: {one} {two}");
            }
        }
    }
}

#[test]
fn gradients_are_averaged_over_ranks_and_micro_batches_and_not_summed() {
    let ws = Workspace::new();
    // Nothing that hides their size: no clipping, and an eps beside which the second moment is small.
    let flags = format!(
        "train --config tiny.yaml --lr 1 --set optim.grad_clip=0 --set optim.eps=1 --set train.log_every=1 {SMOOTH}"
    );
    ws.ok(&format!("{flags} --batch-size 8 --out one"));
    let same = |out: &str| {
        assert!(norm_difference(&ws, "one", out) < 1e-4, "{out}: {}", norm_difference(&ws, "one", out));
        assert!(state_difference(&ws, "one", out) < 1e-4, "{out}: {}", state_difference(&ws, "one", out));
        assert!(difference(&ws, "one", out) < 1e-5, "{out}: {}", difference(&ws, "one", out));
        let bytes = |run: &str| ws.rows(&format!("{run}/metrics.jsonl")).last().expect("a row")["bytes_seen"].clone();
        assert_eq!(bytes("one"), bytes(out), "{out}");
    };
    ws.ok(&format!("{flags} --batch-size 2 --set train.grad_accum=4 --out accumulated"));
    same("accumulated");
    let flags = format!("{flags} --set train.grad_accum=2");
    for (world, zero) in [(2, 0), (4, 0), (2, 1), (4, 1)] {
        let out = format!("ranks{world}-{zero}");
        ranks(&ws, world, &format!("{flags} --batch-size {} --out {out} --set ddp.zero_stage={zero}", 4 / world));
        same(&out);
    }
}

#[test]
fn every_precision_trains_with_quantization_on() {
    let ws = Workspace::new();
    let flags = "train --config tiny.yaml --set train.grad_accum=2";
    for precision in ["fp32", "bf16", "fp16"] {
        let flags = format!("{flags} --set train.precision={precision}");
        ws.ok(&format!("{flags} --batch-size 4 --out one-{precision}"));
        for zero in [0, 1] {
            let out = format!("two-{precision}-{zero}");
            torchrun(&ws, 2, &format!("{flags} --batch-size 2 --out {out} --set ddp.zero_stage={zero}"));
            // The first step alone, from the same weights: roundings that turn make another run of those behind it.
            let [one, two] = [format!("one-{precision}"), out].map(|run| ws.losses(&format!("{run}/metrics.jsonl")));
            let found = (one[&0] - two[&0]).abs();
            assert!(found < if precision == "fp32" { 3e-3 } else { 2e-2 }, "{precision} {zero}: {found}");
            assert!(two.len() == 6 && two[&5] < two[&0], "{precision} {zero}: {two:?}");
        }
    }
}

#[test]
fn evaluation_by_ranks_is_exact() {
    let ws = Workspace::new();
    let flags = "train --config tiny.yaml --steps 1 --lr 1e-30 --set data.val=text.bin --set train.eval_every=1";
    ws.ok(&format!("{flags} --batch-size 2 --out one"));
    torchrun(&ws, 2, &format!("{flags} --batch-size 1 --out two"));
    torchrun(&ws, 3, &format!("{flags} --batch-size 1 --out three"));
    let loss = |run: &str| ws.rows(&format!("{run}/metrics.jsonl")).last().expect("a row")["val_loss"].clone();
    assert!(loss("one").is_f64());
    assert_eq!(loss("one"), loss("two"), "to the last bit");
    assert_eq!(loss("one"), loss("three"), "to the last bit");
}

#[test]
fn a_checkpoint_goes_on_at_any_world_size() {
    let ws = Workspace::new();
    let flags = format!("train --config tiny.yaml --steps 12 {SMOOTH}");
    ws.ok(&format!("{flags} --batch-size 4 --out whole"));
    for zero in [0, 1] {
        let half = format!("half{zero}");
        let ddp = format!("--set ddp.zero_stage={zero}");
        torchrun(&ws, 2, &format!("{flags} --batch-size 2 --out {half} --set train.stop_at=6 {ddp}"));
        for (world, batch) in [(1, 4), (2, 2), (4, 1)] {
            let out = format!("resumed{zero}-{world}");
            let line = format!("{flags} --batch-size {batch} --out {out} --resume {half}/ckpt.pt {ddp}");
            torchrun(&ws, world, &line);
            let (whole, resumed) = (ws.losses("whole/metrics.jsonl"), ws.losses(&format!("{out}/metrics.jsonl")));
            assert!(resumed.keys().copied().eq(6..12), "{resumed:?}");
            for (step, loss) in resumed {
                // Another window would be off by tenths.
                assert!((loss - whole[&step]).abs() < 1e-5, "{out}: step {step}: {loss} {}", whole[&step]);
            }
        }
        // And without ranks at all.
        ws.ok(&format!("{flags} --batch-size 4 --out alone{zero} --resume {half}/ckpt.pt"));
        let alone = ws.losses(&format!("alone{zero}/metrics.jsonl"));
        assert!((alone[&11] - ws.losses("whole/metrics.jsonl")[&11]).abs() < 1e-5);
    }
}

#[test]
fn at_the_same_world_size_a_resumed_run_is_bit_identical() {
    let ws = Workspace::new();
    // Quantization that comes in: the two parts begin with different kernels.
    let gradually = "--set quant.start_frac=0.4 --set optim.schedule=two_stage";
    let sharded = "--set ddp.zero_stage=1 --set optim.decay=matrices --set quant.start_frac=0.9";
    for (world, more) in [(2, "--set train.precision=bf16"), (4, ""), (5, gradually), (3, sharded)] {
        let flags = format!("train --config tiny.yaml --batch-size 1 --set train.grad_accum=2 --no-ckpt {more}");
        let (whole, parts) = (format!("whole{world}"), format!("parts{world}"));
        torchrun(&ws, world, &format!("{flags} --out {whole}"));
        torchrun(&ws, world, &format!("{flags} --out {parts} --set train.stop_at=3"));
        torchrun(&ws, world, &format!("{flags} --out {parts} --resume auto"));
        assert_eq!(difference(&ws, &whole, &parts), 0.0);
        let read = |run: &str| torch_file::read(&ws.path(run).join("ckpt.pt")).expect("reads");
        assert_same_checkpoint(&read(&whole), &read(&parts), "");
    }
}

#[test]
fn sharded_moments_are_those_of_one_process_to_the_last_bit() {
    let ws = Workspace::new();
    // The largest gradients are clipped.
    let flags = "train --config tiny.yaml --set optim.grad_clip=0.5";
    let read = |run: &str| torch_file::read(&ws.path(run).join("ckpt.pt")).expect("reads");
    let same = |a: &str, b: &str| {
        assert_eq!(difference(&ws, a, b), 0.0, "{a} {b}");
        for key in ["model", "opt"] {
            let of = |run: &str| read(run).get(key).expect(key).clone();
            assert_same_checkpoint(&of(a), &of(b), &format!("{a} {b} {key}"));
        }
    };
    for (name, optim) in [("adamw", "--set model.d_ff=128"), ("adamw8bit", EIGHT_BITS)] {
        let flags = format!("{flags} {optim}");
        ws.ok(&format!("{flags} --batch-size 2 --out {name}"));
        let sharded = "--ddp --set ddp.zero_stage=1";
        ranks(&ws, 1, &format!("{flags} --batch-size 2 --out {name}-one {sharded}"));
        same(name, &format!("{name}-one"));
        // Two addends have one sum; the norm of all, by which is clipped, is added up in another order.
        let flags = format!("{flags} --batch-size 1 --set optim.grad_clip=0");
        ranks(&ws, 2, &format!("{flags} --out {name}-whole --ddp"));
        ranks(&ws, 2, &format!("{flags} --out {name}-two {sharded}"));
        same(&format!("{name}-whole"), &format!("{name}-two"));
        // What other ranks, or none, take over of it.
        for (world, zero) in [(3, 1), (1, 0)] {
            let out = format!("{name}-taken-by-{world}");
            let line = format!("{flags} --out {out} --resume {name}-two/ckpt-00000004.pt --set train.stop_at=4");
            ranks(&ws, world, &format!("{line} --ddp --set ddp.zero_stage={zero}"));
            let opt = |path: &str| torch_file::read(&ws.path(path)).expect("reads").get("opt").expect("opt").clone();
            let (given, taken) = (opt(&format!("{name}-two/ckpt-00000004.pt")), opt(&format!("{out}/ckpt.pt")));
            assert_same_checkpoint(&given, &taken, &out);
        }
    }
}

#[test]
fn a_resumed_run_of_sharded_moments_of_8_bits_is_bit_identical() {
    let ws = Workspace::new();
    for (world, precision) in [(3, "fp32"), (2, "bf16")] {
        let flags = format!(
            "train --config tiny.yaml --batch-size 1 --set train.grad_accum=2 --set train.precision={precision} \
             {EIGHT_BITS} --set ddp.zero_stage=1"
        );
        let (whole, parts) = (format!("whole-{precision}"), format!("parts-{precision}"));
        ranks(&ws, world, &format!("{flags} --out {whole}"));
        ranks(&ws, world, &format!("{flags} --out {parts} --set train.stop_at=3"));
        ranks(&ws, world, &format!("{flags} --out {parts} --resume auto"));
        assert_eq!(difference(&ws, &whole, &parts), 0.0);
        let read = |run: &str| torch_file::read(&ws.path(run).join("ckpt.pt")).expect("reads");
        assert_same_checkpoint(&read(&whole), &read(&parts), "");
    }
}

#[test]
fn moments_of_8_bits_go_from_two_ranks_to_three_to_one() {
    let ws = Workspace::new();
    let flags = format!("train --config tiny.yaml --steps 12 {EIGHT_BITS} {SMOOTH}");
    ws.ok(&format!("{flags} --batch-size 6 --out whole"));
    let whole = ws.losses("whole/metrics.jsonl");
    let sharded = "--set ddp.zero_stage=1";
    ranks(&ws, 2, &format!("{flags} --batch-size 3 --out run {sharded} --set train.stop_at=4"));
    ranks(&ws, 3, &format!("{flags} --batch-size 2 --out run {sharded} --set train.stop_at=8 --resume auto"));
    ws.ok(&format!("{flags} --batch-size 6 --out run --resume auto"));
    let run = ws.losses("run/metrics.jsonl");
    assert!(run.keys().eq(whole.keys()), "{run:?}");
    for (step, loss) in run {
        // Where a moment lies between two codes, the order of a sum decides.
        assert!((loss - whole[&step]).abs() < 1e-4, "step {step}: {loss} {}", whole[&step]);
    }
}

#[test]
fn a_rank_that_has_no_part_of_the_parameters_takes_part() {
    let ws = Workspace::new();
    // Twelve blocks: three each for four of five ranks.
    let model = "--set model.d_model=2 --set model.n_head=1 --set model.d_ff=4 --set model.n_layer=1";
    let more = "--set optim.decay=matrices --set train.internals_every=1 --set train.precision=fp16 --steps 8";
    for name in ["adamw", "adamw8bit"] {
        let flags = format!("train --config tiny.yaml {model} {more} --set optim.name={name} {SMOOTH}");
        ws.ok(&format!("{flags} --batch-size 5 --out {name}"));
        let sharded = format!("{flags} --batch-size 1 --out {name}5 --set ddp.zero_stage=1");
        ranks(&ws, 5, &format!("{sharded} --set train.stop_at=4"));
        ranks(&ws, 5, &format!("{sharded} --resume auto"));
        // In half precision sums in another order round differently.
        assert!(difference(&ws, name, &format!("{name}5")) < 2e-2, "{}", difference(&ws, name, &format!("{name}5")));
    }
}

#[test]
fn the_same_parameters_decay_however_they_are_dealt_out() {
    let ws = Workspace::new();
    // So much decay that a parameter without it, or with it twice, would show.
    let flags = format!("train --config tiny.yaml --steps 8 --wd 5 --set optim.schedule=two_stage {SMOOTH}");
    ws.ok(&format!("{flags} --batch-size 6 --out all"));
    let flags = format!("{flags} --set optim.decay=matrices");
    ws.ok(&format!("{flags} --batch-size 6 --out one"));
    assert!(difference(&ws, "one", "all") > 1e-3, "{}", difference(&ws, "one", "all"));
    for (world, zero) in [(2, 0), (2, 1), (3, 1)] {
        let out = format!("ranks{world}-{zero}");
        torchrun(&ws, world, &format!("{flags} --batch-size {} --out {out} --set ddp.zero_stage={zero}", 6 / world));
        assert!(difference(&ws, "one", &out) < 2e-6, "{out}: {}", difference(&ws, "one", &out));
        assert!(state_difference(&ws, "one", &out) < 1e-4, "{out}: {}", state_difference(&ws, "one", &out));
    }
}

#[test]
fn every_rank_starts_from_the_weights_of_rank_zero() {
    let ws = Workspace::new();
    // The checkpoint is only where rank 0 runs.
    let port = free_port();
    let other = Workspace::new();
    std::fs::remove_file(other.path("golden.pt")).expect("removes");
    let flags = format!(
        "train --data text.bin --batch-size 1 --seq-len 16 --steps 4 --device cpu --save-every 0 \
         --set train.precision=fp32 --init golden.pt --log-every 1 --out run {SMOOTH}"
    );
    let one = Running::start(rank(&other, &flags, 1, 2, port));
    let zero = Running::start(rank(&ws, &flags, 0, 2, port)).wait();
    assert_eq!((zero.status, one.wait().status), (Some(0), Some(0)), "{}", zero.stderr);
    assert!(!other.path("run").exists(), "only rank 0 writes");
    ws.ok(&flags.replace("--batch-size 1", "--batch-size 2").replace("--out run", "--out alone"));
    assert!(difference(&ws, "run", "alone") < 1e-5);
}

// --- deciding together ----------------------------------------------------------------------------

/// Rank `r` of two in this process.
fn of_two(r: usize, port: u16) -> RankEnv {
    RankEnv {
        rank: r,
        local_rank: r,
        world_size: 2,
        local_world_size: 2,
        master_addr: "127.0.0.1".into(),
        master_port: port,
        agent_store: false,
        restart_count: 0,
    }
}

/// A configuration that needs no files but the bytes of `ws`.
fn small_config(ws: &Workspace) -> Config {
    let mut config = Config {
        model: ModelConfig { n_layer: 2, d_model: 32, n_head: 2, d_ff: 64, ..ModelConfig::default() },
        ..Config::default()
    };
    config.quant.weight = WeightQuant::None;
    config.quant.act = ActQuant::None;
    config.data.train = ws.path("text.bin").to_str().expect("UTF-8").into();
    config.data.seq_len = Some(16);
    config.data.order = Order::Sequential;
    config.train.steps = 4;
    config.train.batch_size = 1;
    config.train.device = DeviceSpec::Cpu;
    config
}

/// A rank in a thread, which differs from the others in what `change` does to its trainer.
fn in_thread(
    r: usize,
    port: u16,
    config: Config,
    change: impl FnOnce(&mut Trainer) + Send + 'static,
) -> std::thread::JoinHandle<(Vec<f64>, u64, u64)> {
    std::thread::spawn(move || {
        let ddp = Rc::new(setup_ddp(of_two(r, port), Duration::from_secs(60), Arc::new(|_| {})).expect("connects"));
        let mut trainer = Trainer::distributed(config, Start::Fresh, ddp.clone()).expect("a trainer");
        change(&mut trainer);
        trainer.train(&mut (), &AtomicBool::new(false)).expect("trains");
        ddp.done();
        let norm = |p: &Tensor| p.norm().double_value(&[]);
        let weights = trainer.var_store().trainable_variables().iter().map(norm).collect();
        (weights, trainer.progress().skipped, trainer.progress().completed)
    })
}

#[test]
fn a_nan_on_one_rank_makes_all_skip_the_step() {
    let ws = Workspace::new();
    for (zero, precision) in [(0, Precision::Fp32), (1, Precision::Fp32), (0, Precision::Fp16), (1, Precision::Fp16)] {
        let mut config = small_config(&ws);
        config.train.precision = precision;
        config.train.out = ws.path(format!("nan{zero}{precision:?}"));
        config.ddp.zero_stage = zero;
        let port = free_port();
        let healthy = in_thread(0, port, config.clone(), |_| {});
        let sick = in_thread(1, port, config.clone(), |trainer| {
            // The logit of byte 0, and so the loss, on this rank only.
            let _no_grad = tch::no_grad_guard();
            let _ = trainer.var_store().variables()["tok_emb.weight"].get(0).fill_(f64::NAN);
        });
        let (weights, skipped, completed) = healthy.join().expect("rank 0");
        let (_, skipped_there, _) = sick.join().expect("rank 1");
        // Sharded, the first step gives the rank the embedding of rank 0 again, which keeps that part.
        let expected = if zero == 1 { 1 } else { 4 };
        assert_eq!((skipped, skipped_there, completed), (expected, expected, 4), "zero {zero} {precision:?}");
        assert!(weights.iter().all(|w| w.is_finite()), "the healthy rank's weights are as they were");
    }
}

#[test]
fn a_step_that_one_rank_cannot_take_changes_no_weight_of_the_others() {
    let ws = Workspace::new();
    for zero in [0, 1] {
        let mut config = small_config(&ws);
        // So much decay that a step of it alone would show.
        (config.optim.lr, config.optim.weight_decay, config.optim.warmup_frac) = (0.1, 0.5, 0.0);
        config.optim.decay = Decay::Matrices;
        (config.train.stop_at, config.train.out) = (Some(1), ws.path(format!("step{zero}")));
        config.ddp.zero_stage = zero;
        let port = free_port();
        let (tell, told) = std::sync::mpsc::channel();
        let healthy = in_thread(0, port, config.clone(), move |trainer| {
            let weights = trainer.var_store().trainable_variables();
            tell.send(weights.iter().map(|p| p.norm().double_value(&[])).collect::<Vec<f64>>()).expect("a listener");
        });
        let sick = in_thread(1, port, config, |trainer| {
            let _no_grad = tch::no_grad_guard();
            let _ = trainer.var_store().variables()["tok_emb.weight"].get(0).fill_(f64::NAN);
        });
        let (after, skipped, _) = healthy.join().expect("rank 0");
        sick.join().expect("rank 1");
        assert_eq!(skipped, 1, "zero {zero}");
        assert_eq!(told.recv().expect("rank 0's weights"), after, "zero {zero}");
    }
}

#[test]
fn each_of_two_ranks_keeps_half_of_the_optimizers_state() {
    let ws = Workspace::new();
    let bytes = |config: &Config| {
        let (tell, told) = std::sync::mpsc::channel();
        let port = free_port();
        let ranks = [0, 1].map(|r| {
            let tell = tell.clone();
            in_thread(r, port, config.clone(), move |trainer| tell.send(trainer.optimizer_bytes()).expect("a listener"))
        });
        ranks.into_iter().for_each(|rank| drop(rank.join().expect("a rank")));
        [told.recv().expect("a rank"), told.recv().expect("a rank")].map(|bytes| bytes as f64)
    };
    for name in [OptimizerName::AdamW, OptimizerName::AdamW8bit] {
        let mut config = small_config(&ws);
        config.model.d_ff = 128;
        config.optim.name = name;
        config.train.out = ws.path(format!("{name:?}"));
        let whole = bytes(&config);
        config.ddp.zero_stage = 1;
        let parts = bytes(&config);
        let per_parameter = whole[0] / config.model.parameters() as f64;
        // Some matrices of this model are too small for 8 bits.
        let expected = if name == OptimizerName::AdamW { 8.0..8.1 } else { 2.0..5.0 };
        assert!(whole[0] == whole[1] && expected.contains(&per_parameter), "{name:?}: {per_parameter}");
        for part in parts {
            assert!((part / whole[0] - 0.5).abs() < 0.15, "{name:?}: {parts:?} of {whole:?}");
        }
        let both = parts[0] + parts[1];
        assert!((both / whole[0] - 1.0).abs() < 0.01, "{name:?}: {parts:?} of {whole:?}");
    }
}

#[test]
fn a_failure_is_reported_before_a_closed_connection_tells_of_it() {
    let ws = Workspace::new();
    let port = free_port();
    let ranks = [0, 1].map(|r| {
        let mut config = small_config(&ws);
        config.train.out = ws.path("run");
        std::thread::spawn(move || {
            let ddp = setup_ddp(of_two(r, port), Duration::from_secs(60), Arc::new(|_| {})).expect("connects");
            let ddp = Rc::new(ddp);
            let mut trainer = Trainer::distributed(config, Start::Fresh, ddp.clone()).expect("a trainer");
            if r == 0 {
                // What an error does on its way up.
                drop(trainer);
                std::thread::sleep(Duration::from_secs(2));
                assert_eq!(ddp.fail("the disk is full".into(), false), Verdict::Tell("the disk is full".into()));
            } else {
                trainer.train(&mut (), &AtomicBool::new(false)).expect_err("rank 0 is gone");
            }
            Instant::now()
        })
    });
    let [reported, noticed] = ranks.map(|rank| rank.join().expect("a rank"));
    assert!(reported < noticed, "{:?}", reported - noticed);
}

#[test]
fn a_signal_to_one_rank_stops_all_after_the_same_step() {
    let ws = Workspace::new();
    let flags = "train --config tiny.yaml --steps 100000 --set train.save_every=0";
    for (victim, signal) in [(1, "INT"), (0, "TERM")] {
        let out = format!("run{victim}");
        let mut ranks = start(&ws, &format!("{flags} --out {out}"), 3);
        ranks[0].until("logged", |_| logged(&ws, &out) > 3);
        ranks[victim].signal(signal);
        let done: Vec<Done> = ranks.into_iter().map(Running::wait).collect();
        assert!(done.iter().all(|d| d.status == Some(0)), "{done:?}");
        let steps = ws.numbered(&out, "ckpt");
        assert_eq!(steps.len(), 1, "one checkpoint, by rank 0");
        assert!(done[0].stderr.contains(&format!("stopped after step {} of", steps[0])), "{}", done[0].stderr);
        // The others may only have told that they waited for rank 0's start.
        let others = done[1].stderr.lines().chain(done[2].stderr.lines());
        assert!(others.into_iter().all(|line| line.contains("waiting for the store")), "{done:?}");
        // Where it stopped it goes on.
        torchrun(&ws, 3, &format!("{flags} --out {out} --resume auto --set train.stop_at={}", steps[0] + 3));
        assert_eq!(logged(&ws, &out) as u64, steps[0] + 3);
    }
}

fn logged(ws: &Workspace, out: &str) -> usize {
    let text = std::fs::read_to_string(ws.path(out).join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter(|line| line.contains("\"loss\"")).count()
}

// --- losing ranks ---------------------------------------------------------------------------------

/// Rank `victim` of three gets `signal` in mid-run; what the others say, which they must before the deadline of `wait`.
fn lose(victim: usize, signal: &str) -> Vec<Done> {
    let ws = Workspace::new();
    let line = "train --config tiny.yaml --steps 1000000 --set train.save_every=0 --set ddp.timeout=3";
    let mut ranks = start(&ws, line, 3);
    ranks[0].until("logged", |_| logged(&ws, "run") > 3);
    ranks[victim].signal(signal);
    let lost = ranks.remove(victim);
    let done = ranks.into_iter().map(Running::wait).collect();
    drop(lost);
    done
}

#[test]
fn a_rank_that_dies_or_hangs_is_named_by_one_of_the_others() {
    for signal in ["KILL", "STOP"] {
        let done = lose(1, signal);
        assert!(done.iter().all(|d| d.status == Some(1)), "{signal}: {done:?}");
        let telling: Vec<&str> =
            done.iter().flat_map(|d| d.stderr.lines()).filter(|line| line.starts_with("bbt: ")).collect();
        let [message] = telling[..] else { panic!("{signal}: one message: {done:?}") };
        assert!(message.contains("rank 1 (process "), "{signal}: {message}");
        assert!(message.contains("does not answer"), "{signal}: {message}");
    }
}

#[test]
fn losing_the_rank_that_holds_the_store_is_noticed() {
    for signal in ["KILL", "STOP"] {
        for rank in lose(0, signal) {
            assert_eq!(rank.status, Some(1), "{signal}: {}", rank.stderr);
            assert!(rank.stderr.contains("the store, held by rank 0 at 127.0.0.1:"), "{signal}: {}", rank.stderr);
        }
    }
}

#[test]
fn killed_while_saving_leaves_the_last_checkpoint_whole() {
    let ws = Workspace::new();
    let line = "train --config tiny.yaml --steps 1000000 --set train.save_every=1 --set ddp.timeout=3";
    let mut ranks = start(&ws, line, 2);
    ranks[0].until("saved", |_| ws.path("run").exists() && ws.numbered("run", "ckpt").len() > 1);
    // With a save every step most moments are within one; the temporary file says so.
    ranks[0].until("saving", |_| ws.names("run").iter().any(|name| name.contains("tmp")));
    ranks[0].kill();
    assert_eq!(ranks.remove(1).wait().status, Some(1));
    let newest = ws.numbered("run", "ckpt").pop().expect("a checkpoint");
    torch_file::read(&ws.path(format!("run/ckpt-{newest:08}.pt"))).expect("is whole");
    let line = line.replace("--steps 1000000", "--steps 1000000 --resume auto");
    torchrun(&ws, 2, &format!("{line} --set train.stop_at={}", newest + 2));
}

#[test]
fn torchrun_restarts_from_the_newest_checkpoint() {
    let ws = Workspace::new();
    let line = "train --config tiny.yaml --steps 1000000 --set train.save_every=5 --set ddp.timeout=5";
    let mut run = Running::start(torchrun_command(&ws, 2, "--max-restarts=1", line));
    run.until("saved", |_| ws.path("run").exists() && ws.numbered("run", "ckpt").iter().any(|&s| s > 5));
    kill(pid_of(&run, 0), "KILL");
    run.until("restarted", |run| run.stderr().contains("resuming from"));
    let resumed = run.stderr();
    let line = resumed.lines().find(|line| line.starts_with("resuming from")).expect("says so").to_string();
    let step: u64 = line.split(" at step ").nth(1).and_then(|s| s.split(' ').next()?.parse().ok()).expect("a step");
    assert!(step >= 5 && step.is_multiple_of(5), "{line}");
    let before = logged(&ws, "run");
    run.until("went on", |_| logged(&ws, "run") > before + 3);
    run.signal("INT");
    run.wait();
    // Each step is logged once, whatever was done twice.
    let steps: Vec<u64> = ws.losses("run/metrics.jsonl").into_keys().collect();
    assert!(steps.iter().copied().eq(0..steps.len() as u64), "{steps:?}");
}

#[test]
fn a_full_disk_on_rank_zero_ends_all_with_its_message() {
    let ws = Workspace::new();
    let port = free_port();
    let line = "train --config tiny.yaml --set train.save_every=2";
    let with_limit = |r: usize| {
        let mut command = ws.shell(&format!("trap '' XFSZ; ulimit -f 64; exec bbt {line}"));
        command
            .env("RANK", r.to_string())
            .env("WORLD_SIZE", "2")
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string());
        Running::start(command)
    };
    let (zero, one) = (with_limit(0), with_limit(1));
    let (zero, one) = (zero.wait(), one.wait());
    assert_eq!((zero.status, one.status), (Some(1), Some(1)), "{} {}", zero.stderr, one.stderr);
    assert!(zero.stderr.contains("ckpt-00000002.pt"), "{}", zero.stderr);
    assert!(!one.stderr.contains("bbt:"), "one message: {}", one.stderr);
}

// --- what users get wrong -------------------------------------------------------------------------

/// Two ranks, of which the second is started with other words and variables; what they say together.
fn differing(ws: &Workspace, first: &str, second: &str) -> String {
    let port = free_port();
    let (one, zero) = (Running::start(rank(ws, second, 1, 2, port)), Running::start(rank(ws, first, 0, 2, port)));
    let (zero, one) = (zero.wait(), one.wait());
    assert!(zero.status != Some(0) && one.status != Some(0), "{} {}", zero.stderr, one.stderr);
    let said = format!("{}{}", zero.stderr, one.stderr);
    let messages = said.lines().filter(|line| line.starts_with("bbt: ")).count();
    assert_eq!(messages, 1, "one message: {said}");
    assert!(!ws.path("run").exists(), "nothing is written");
    said
}

#[test]
fn ranks_that_mean_different_runs_are_told_at_the_start() {
    let ws = Workspace::new();
    ws.write("other.bin", "Something else altogether. ".repeat(200));
    let line = "train --config tiny.yaml";
    for (first, second, words) in [
        (line.into(), format!("{line} --lr 1e-4"), vec!["rank 1", "optim.lr 0.0001", "rank 0 has 0.003"]),
        (line.into(), format!("{line} --n-layer 3"), vec!["rank 1", "model.n_layer 3", "rank 0 has 2"]),
        (format!("{line} --seq-len 8"), line.into(), vec!["rank 1", "data.seq_len 16", "rank 0 has 8"]),
        (line.into(), format!("{line} --data other.bin"), vec!["rank 1", "data.train"]),
        // What fails on every rank is said once.
        (format!("{line} --lr=-1"), format!("{line} --lr=-1"), vec!["optim.lr"]),
        (format!("{line} --data none.bin"), format!("{line} --data none.bin"), vec!["none.bin"]),
        // What fails on one rank only, too.
        (line.into(), format!("{line} --data none.bin"), vec!["rank 1: ", "none.bin"]),
        (format!("{line} --resume no.pt"), format!("{line} --resume no.pt"), vec!["no.pt"]),
        (
            format!("{line} --set ddp.backend=nccl"),
            format!("{line} --set ddp.backend=nccl"),
            vec!["ddp.backend", "nccl works between GPUs", "gloo"],
        ),
    ] {
        let said = differing(&ws, &first, &second);
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    }
}

#[test]
fn variables_that_make_no_sense_are_named() {
    let ws = Workspace::new();
    let line = "train --config tiny.yaml --ddp";
    let alone = ws.bbt(line);
    assert_eq!(alone.status, Some(2));
    assert!(alone.stderr.contains("WORLD_SIZE is not set") && alone.stderr.contains("torchrun"), "{}", alone.stderr);
    for (name, value, words) in [
        ("RANK", Some("2"), vec!["RANK=2", "WORLD_SIZE=2"]),
        ("RANK", Some("x"), vec!["RANK=x", "whole number"]),
        ("RANK", None, vec!["RANK is not set"]),
        ("WORLD_SIZE", Some("0"), vec!["WORLD_SIZE=0"]),
        ("MASTER_ADDR", None, vec!["MASTER_ADDR is not set"]),
        ("MASTER_PORT", Some("70000"), vec!["MASTER_PORT=70000", "65535"]),
    ] {
        let mut command = rank(&ws, line, 0, 2, 1);
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
        let done = Running::start(command).wait();
        assert_eq!(done.status, Some(2), "{name}: {}", done.stderr);
        assert!(words.iter().all(|word| done.stderr.contains(word)), "{words:?}: {}", done.stderr);
    }
}

#[test]
fn a_port_in_use_and_a_master_that_is_not_there_are_told_in_bounded_time() {
    let ws = Workspace::new();
    let taken = TcpListener::bind(("0.0.0.0", 0)).expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let line = "train --config tiny.yaml --set ddp.timeout=3";
    let done = Running::start(rank(&ws, line, 0, 2, port)).wait();
    assert_eq!(done.status, Some(1));
    assert!(done.stderr.contains(&format!("MASTER_PORT={port}")), "{}", done.stderr);
    assert!(done.stderr.contains("address already in use"), "{}", done.stderr);
    drop(taken);

    let done = Running::start(rank(&ws, line, 1, 2, free_port())).wait();
    assert_eq!(done.status, Some(1));
    assert!(done.stderr.contains("no answer from the store at 127.0.0.1:"), "{}", done.stderr);

    // A rank that is never started.
    let done = Running::start(rank(&ws, line, 0, 2, free_port())).wait();
    assert!(done.stderr.contains("rank 1 did not come within 3 s"), "{}", done.stderr);
}

#[test]
fn a_silent_stranger_at_the_port_ends_the_wait() {
    let ws = Workspace::new();
    // Takes connections and says nothing.
    let stranger = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = stranger.local_addr().expect("an address").port();
    let done = Running::start(rank(&ws, "train --config tiny.yaml --set ddp.timeout=3", 1, 2, port)).wait();
    assert_eq!(done.status, Some(1), "{}", done.stderr);
    let named =
        format!("bbt: MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: something at 127.0.0.1:{port} takes connections");
    assert!(done.stderr.contains(&named) && done.stderr.contains("within 3 s"), "{}", done.stderr);
    // Nor does a launcher wait for ever where node 0's port is somebody else's.
    let store = bbt::libtorch::Store::connect("127.0.0.1", port, Duration::from_secs(1), "");
    assert!(store.is_err());
}

#[test]
fn a_host_that_nobody_knows_is_named_first() {
    let ws = Workspace::new();
    let mut command = rank(&ws, "train --config tiny.yaml --set ddp.timeout=2", 1, 2, 29500);
    command.env("MASTER_ADDR", "no-such-host.invalid");
    let done = Running::start(command).wait();
    assert_eq!(done.status, Some(1), "{}", done.stderr);
    let message = done.stderr.lines().last().expect("a message");
    assert!(message.starts_with("bbt: MASTER_ADDR=no-such-host.invalid: the name does not resolve"), "{}", done.stderr);
    let line = "launch --nnodes 2 --node-rank 0 --master-addr no-such-host.invalid -- train --config tiny.yaml";
    let done = ws.bbt(line);
    assert_eq!(done.status, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("--master-addr no-such-host.invalid: the name does not resolve"), "{}", done.stderr);
}

#[test]
fn a_wrong_interface_is_named() {
    let ws = Workspace::new();
    let port = free_port();
    let line = "train --config tiny.yaml --set ddp.timeout=20";
    let ranks = [1, 0].map(|r| {
        let mut command = rank(&ws, line, r, 2, port);
        command.env("GLOO_SOCKET_IFNAME", "ib0");
        Running::start(command)
    });
    let said: String = ranks.into_iter().map(|rank| rank.wait().stderr).collect();
    assert!(said.contains("GLOO_SOCKET_IFNAME=ib0: no interface ib0 on this machine"), "{said}");
    assert!(said.contains("it has ") && said.contains("lo"), "{said}");
    assert!(!said.contains("all are alive") && !said.contains("firewall"), "{said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("bbt: ")).count(), 1, "one message: {said}");
}

#[test]
fn what_a_launcher_left_in_the_environment() {
    let ws = Workspace::new();
    let run = |variables: &[(&str, &str)], line: &str| {
        let mut command = ws.command(&line.split_whitespace().map(OsStr::new).collect::<Vec<_>>());
        for name in ["MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"] {
            command.env_remove(name);
        }
        Running::start({
            command.envs(variables.iter().copied());
            command
        })
    };
    // The only process of one, or nothing at all, is one process.
    for (index, variables) in [
        &[("RANK", "0"), ("WORLD_SIZE", "1")][..],
        &[("RANK", ""), ("WORLD_SIZE", "")],
        &[("WORLD_SIZE", "8")],
        &[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", ""), ("MASTER_PORT", "")],
    ]
    .into_iter()
    .enumerate()
    {
        let done = run(variables, &format!("train --config tiny.yaml --steps 2 --out run{index}")).wait();
        assert_eq!(done.status, Some(0), "{variables:?}: {}", done.stderr);
    }
    // What says that there are more is named, with what to unset.
    for (variables, words) in [
        (&[("RANK", "0"), ("WORLD_SIZE", "2")][..], ["MASTER_ADDR is not set", "`unset RANK WORLD_SIZE`"]),
        (&[("RANK", "1"), ("WORLD_SIZE", "x")], ["WORLD_SIZE=x: must be", "`unset RANK WORLD_SIZE`"]),
    ] {
        let done = run(variables, "train --config tiny.yaml --out more").wait();
        assert_eq!(done.status, Some(2), "{}", done.stderr);
        assert!(words.iter().all(|word| done.stderr.contains(word)), "{}", done.stderr);
        assert!(!done.stderr.contains("--ddp"), "which was not given: {}", done.stderr);
    }
    // A whole set of variables: rank 0 says at once what it waits for.
    let port = free_port().to_string();
    let whole = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port.as_str())];
    let mut waiting = run(&whole, "train --config tiny.yaml --out waits");
    let said = format!("rank 0 of WORLD_SIZE=2: waiting for the other ranks at 127.0.0.1:{port}");
    waiting.until("says what it waits for", |running| running.stderr().contains(&said));
    assert!(waiting.stderr().contains("up to 600 s (ddp.timeout)"), "{}", waiting.stderr());
    waiting.kill();
    let done = run(&whole, "train --config tiny.yaml --out waits --set ddp.timeout=2").wait();
    assert_eq!(done.status, Some(1), "{}", done.stderr);
    let words = ["rank 1 did not come within 2 s", "WORLD_SIZE=2", "`unset RANK WORLD_SIZE`"];
    assert!(words.iter().all(|word| done.stderr.contains(word)), "{}", done.stderr);
}

#[test]
fn this_build_has_nccl() {
    if !has_cuda_libtorch() {
        return;
    }
    // That it was compiled: without a GPU it then says that there is none.
    let store = bbt::libtorch::Store::serve("127.0.0.1", 0, Duration::from_secs(5)).expect("a store");
    let device = tch::Device::Cuda(0);
    let made =
        bbt::libtorch::ProcessGroup::new(&store, 0, 1, bbt::libtorch::Backend::Nccl, device, Duration::from_secs(5));
    match made {
        Ok(group) => group.barrier().expect("a group of one"),
        Err(error) => assert!(error.to_string().contains("no GPUs found"), "{error}"),
    }
}

// --- bbt launch -----------------------------------------------------------------------------------

fn launch_command(ws: &Workspace, world: usize, line: &str) -> Command {
    let line = format!("launch --nproc-per-node {world} -- {line}");
    ws.command(&line.split_whitespace().map(OsStr::new).collect::<Vec<_>>())
}

#[test]
fn bbt_launch_trains_as_torchrun_does() {
    let ws = Workspace::new();
    let flags = format!("train --config tiny.yaml --steps 8 --batch-size 1 {SMOOTH}");
    for world in [2, 4] {
        torchrun(&ws, world, &format!("{flags} --out torchrun{world}"));
        let done = Running::start(launch_command(&ws, world, &format!("{flags} --ddp --out launch{world}"))).wait();
        assert_eq!(done.status, Some(0), "{}", done.stderr);
        assert!(done.stderr.lines().all(|line| line.starts_with("[rank0]: ")), "only rank 0 speaks: {}", done.stderr);
        assert_eq!(difference(&ws, &format!("torchrun{world}"), &format!("launch{world}")), 0.0);
    }
}

/// The process of a rank that `bbt launch` or torchrun started: its child whose environment says so.
fn pid_of(launcher: &Running, rank: usize) -> u32 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", launcher.pid())).expect("its threads");
    // A child is listed with the thread that started it.
    let children = threads.flatten().map(|thread| std::fs::read_to_string(thread.path().join("children")));
    let children: String = children.map(Result::unwrap_or_default).collect();
    let is = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&b| b == 0).any(|variable| variable == format!("RANK={rank}").as_bytes())
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is).expect("the rank's process")
}

fn kill(pid: u32, signal: &str) {
    let sent = Command::new("bash").args(["-c", &format!("kill -{signal} {pid}")]).status().expect("bash");
    assert!(sent.success(), "kill -{signal} {pid}");
}

#[test]
fn under_bbt_launch_a_lost_rank_ends_all_and_is_named() {
    let line = "train --config tiny.yaml --steps 1000000 --set train.save_every=0 --set ddp.timeout=3";
    for (victim, signal, status, words) in [
        (1, "KILL", 137, vec!["rank 1 (pid ", "was killed by SIGKILL"]),
        (0, "KILL", 137, vec!["rank 0 (pid ", "was killed by SIGKILL"]),
        (1, "STOP", 1, vec!["rank 1 (process ", "does not answer"]),
        // The launcher holds the store, so rank 0 is named as any other.
        (0, "STOP", 1, vec!["rank 0 (process ", "does not answer"]),
    ] {
        let ws = Workspace::new();
        let mut launcher = Running::start(launch_command(&ws, 3, line));
        launcher.until("logged", |_| logged(&ws, "run") > 3);
        let ranks = [0, 1, 2].map(|rank| pid_of(&launcher, rank));
        kill(ranks[victim], signal);
        let done = launcher.wait();
        assert_eq!(done.status, Some(status), "{victim} {signal}: {}", done.stderr);
        let last = done.stderr.rsplit("\nbbt: ").next().unwrap_or_default();
        assert!(words.iter().all(|word| last.contains(word) || done.stderr.contains(word)), "{}", done.stderr);
        assert!(ranks.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()), "all have gone");
    }
}

#[test]
fn ctrl_c_on_bbt_launch_saves() {
    let ws = Workspace::new();
    let line = "train --config tiny.yaml --steps 1000000 --set train.save_every=0";
    let mut launcher = Running::start(launch_command(&ws, 2, line));
    launcher.until("logged", |_| logged(&ws, "run") > 3);
    launcher.signal("INT");
    let done = launcher.wait();
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    assert_eq!(ws.numbered("run", "ckpt").len(), 1);
    assert!(done.stderr.contains("[rank0]: to go on: "), "{}", done.stderr);
}

#[test]
fn bad_flags_are_told_once_by_the_launcher() {
    let ws = Workspace::new();
    let done = Running::start(launch_command(&ws, 4, "train --no-such-flag")).wait();
    assert_eq!((done.status, done.stderr.matches("--no-such-flag").count()), (Some(2), 1), "{}", done.stderr);
    let done = Running::start(launch_command(&ws, 4, "train --config tiny.yaml --set optim.lr=-1")).wait();
    assert_eq!(done.status, Some(2), "{}", done.stderr);
    assert_eq!(done.stderr.lines().filter(|line| line.contains("]: bbt: optim.lr")).count(), 1, "{}", done.stderr);
}

/// Two hosts with addresses of their own, in network namespaces, a `bbt launch` on each; then the link is cut.
const TWO_HOSTS: &str = r#"
set -eu
unshare --net sleep 1000 & a=$!
unshare --net sleep 1000 & b=$!
until [ "$(readlink /proc/$a/ns/net)" != "$(readlink /proc/self/ns/net)" ] &&
      [ "$(readlink /proc/$b/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add va netns $a type veth peer name vb netns $b
on_a() { nsenter --target $a --net "$@"; }
on_b() { nsenter --target $b --net "$@"; }
on_a ip addr add 10.77.0.1/24 dev va; on_a ip link set va up; on_a ip link set lo up
on_b ip addr add 10.77.0.2/24 dev vb; on_b ip link set vb up; on_b ip link set lo up
train() { echo bbt launch --nnodes 2 --node-rank $1 --master-addr 10.77.0.1 --nproc-per-node 1 -- \
  train --config tiny.yaml --set ddp.timeout=4 --set train.save_every=0; }
# Whole, first.
GLOO_SOCKET_IFNAME=va on_a $(train 0) --steps 6 --out whole & one=$!
GLOO_SOCKET_IFNAME=vb on_b $(train 1) --steps 6 --out whole1; wait $one
GLOO_SOCKET_IFNAME=va on_a $(train 0) --steps 1000000 >a.log 2>&1 & one=$!
GLOO_SOCKET_IFNAME=vb on_b $(train 1) --steps 1000000 --out elsewhere >b.log 2>&1 & two=$!
until [ "$(cat run/metrics.jsonl 2>/dev/null | wc -l)" -gt 3 ]; do sleep 0.1; done
on_a ip link set va down
set +e
wait $one; one=$?; wait $two; two=$?
echo "$one $two"
kill $a $b
"#;

#[test]
fn two_hosts_train_and_notice_when_the_link_is_cut() {
    let ws = Workspace::new();
    ws.write("hosts.sh", TWO_HOSTS);
    let namespaces = "unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc";
    let can = shell_can(&format!("PATH=$PATH:/usr/sbin:/sbin; {namespaces} ip link add bbt0 type veth peer name bbt1"));
    if !can_run("`ip` (iproute2) and leave to make namespaces (kernel.unprivileged_userns_clone=1)", can) {
        return;
    }
    let mut command = ws.shell(&format!("{namespaces} bash hosts.sh"));
    command.env("PATH", format!("{}:/usr/sbin:/sbin", command_path(&command)));
    let done = Running::start(command).wait();
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    assert_eq!(ws.losses("whole/metrics.jsonl").len(), 6);
    assert!(!ws.path("whole1").exists() && !ws.path("elsewhere").exists(), "only rank 0 writes");
    let (a, b) = (ws.read("a.log"), ws.read("b.log"));
    let last = done.text().lines().last().map(String::from).unwrap_or_default();
    assert_eq!(last, "1 1", "{a} {b}");
    // Rank 0's host holds the store, and so can say who is lost; the other knows only that it is alone.
    assert!(a.contains("rank 1 (process ") && a.contains("does not answer"), "{a}");
    assert!(b.contains("the store, held by the launcher at 10.77.0.1:29500, is gone"), "{b}");
}

fn command_path(command: &Command) -> String {
    let path = command.get_envs().find(|(name, _)| *name == "PATH").and_then(|(_, value)| value);
    path.unwrap_or_default().to_string_lossy().into_owned()
}
