//! The PyTorch original's command lines: each flag does what it did there. What they did was read in its scripts
//! (train_bitbyte.py, train_ar_baseline.py, pack_to_shards.py, demo_generate.py, validate_new.py, eval_one_ckpt.py).

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use crate::common::cli::{Running, Workspace};
use bbt::config::{ActSte, Attention, Config, OptimizerName, Order, Precision, Ste};

fn config(ws: &Workspace, flags: &str) -> Config {
    Config::from_yaml(&ws.ok(&format!("config {flags}")).text()).expect("reads back")
}

fn original() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/original.yaml")).expect("original.yaml")
}

#[test]
fn configs_original_yaml_holds_the_originals_defaults_and_rule() {
    let ws = Workspace::new();
    ws.write("original.yaml", original());
    let c = config(&ws, "--config original.yaml");
    // The defaults of train_bitbyte_new.py's argparse, in its order.
    assert_eq!(c.train.out, Path::new("artifacts/checkpoints/ar/ckpt.pt"));
    assert_eq!((c.train.steps, c.train.log_every, c.train.save_every), (200_000, 50, 2000));
    assert_eq!((c.model.n_layer, c.model.d_model, c.model.n_head, c.model.d_ff), (24, 1536, 12, 4096));
    assert_eq!((c.model.n_kv_head, c.model.attention, c.train.checkpointing), (None, Attention::Math, true));
    assert_eq!((c.optim.lr, c.optim.warmup_frac, c.optim.warmup_steps), (2e-4, 0.03, None));
    assert_eq!((c.optim.weight_decay, c.optim.grad_clip, c.optim.min_lr_factor), (0.1, 1.0, 0.1));
    assert_eq!((c.train.batch_size, c.train.grad_accum), (1, 8));
    assert_eq!(c.data.curriculum(), [(0.0, 2048), (0.2, 4096), (0.5, 8192)]);
    // train_bitbyte.py's --val_every, --val_batches (of one window) and --val_seq_len.
    assert_eq!((c.train.eval_every, c.train.eval_bytes, c.train.eval_seq_len), (0, Some(100 * 2048), Some(2048)));
    // Its rule: autocast to float16, a clipped estimator for weights and none for activations, betas, the data's seed.
    assert_eq!((c.train.precision, c.quant.ste, c.quant.act_ste), (Precision::Fp16, Ste::Clipped, ActSte::None));
    assert_eq!((c.optim.name, c.optim.betas, c.optim.eps), (OptimizerName::AdamW, (0.9, 0.95), 1e-8));
    assert_eq!((c.data.order, c.data.seed), (Order::Random, 1234));
    // Flags go over it.
    let c = config(&ws, "--config original.yaml --lr 1e-3 --seq_len 64 --batch_size 2");
    assert_eq!((c.optim.lr, c.data.curriculum(), c.train.batch_size), (1e-3, vec![(0.0, 64)], 2));
}

#[test]
fn the_readme_names_every_default_that_differs_from_the_originals() {
    let ws = Workspace::new();
    ws.write("original.yaml", original());
    let flat = |flags: &str| {
        let sections: serde_yaml::Value =
            serde_yaml::from_str(&ws.ok(&format!("config {flags}")).text()).expect("YAML");
        let mut flat = std::collections::BTreeMap::new();
        for (section, keys) in sections.as_mapping().expect("sections") {
            for (key, value) in keys.as_mapping().expect("keys") {
                flat.insert(format!("{}.{}", section.as_str().unwrap(), key.as_str().unwrap()), value.clone());
            }
        }
        flat
    };
    let (ours, theirs) = (flat(""), flat("--config original.yaml"));
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("README.md");
    let differing: Vec<_> = ours.keys().filter(|key| ours[*key] != theirs[*key]).collect();
    assert!(differing.len() > 10, "{differing:?}");
    // The length is one or the other key.
    for key in differing.into_iter().filter(|key| *key != "data.seq_len") {
        assert!(readme.contains(&format!("`{key}`")), "{key} is not in README.md");
    }
}

#[test]
fn a_script_with_the_originals_flags_trains_and_validates() {
    let ws = Workspace::new();
    fs::create_dir(ws.path("val")).expect("creates");
    fs::copy(ws.path("text.bin"), ws.path("val/shard_00000.bin")).expect("copies");
    let model = "--n_layer 2 --d_model 32 --n_head 2 --d_ff 64 --no_ckpt --no_sdpa --no_bnb --no_amp";
    let val = "--val_data val --val_every 2 --val_batches 5 --val_seq_len 8";
    let line = format!("train --data text.bin --out out.pt --steps 4 --batch_size 3 --seq_len 16 {model} {val}");
    ws.ok(&format!("{line} --log_every 1 --log_byte_class_loss --grad_accum 2"));
    let log = if ws.path("out.metrics.jsonl").exists() { "out.metrics.jsonl" } else { "metrics.jsonl" };
    let rows = ws.rows(log);
    let vals: Vec<_> = rows.iter().filter(|row| row.get("val_loss").is_some()).collect();
    assert_eq!(vals.iter().map(|row| row["step"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(3)]);
    // 5 batches of 3 windows of 8 bytes, in 16 pieces whose first bytes are not predicted.
    let bytes = vals[0]["bytes"].as_u64().expect("bytes");
    assert!((5 * 3 * 8 - 32..=5 * 3 * 8).contains(&bytes), "{bytes}");

    // The loss is a mean of those of both classes.
    let text = fs::read(ws.path("text.bin")).expect("reads");
    assert!(text.contains(&b' '));
    for row in rows.iter().filter(|row| row.get("loss").is_some()) {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        let (loss, ws_loss, nonws) = (number("loss"), number("ws_loss"), number("nonws_loss"));
        let (least, most) = (ws_loss.min(nonws), ws_loss.max(nonws));
        assert!(least != most && (least - 1e-5..=most + 1e-5).contains(&loss), "{row}");
        assert!((number("ws_bits_per_byte") - ws_loss / std::f64::consts::LN_2).abs() < 1e-9, "{row}");
    }
    // Without the flag there is nothing of it, and the losses are the same.
    let plain = line.replace("out.pt", "plain/ckpt.pt");
    ws.ok(&format!("{plain} --log_every 1 --grad_accum 2"));
    let text = ws.names("plain").into_iter().find(|name| name.ends_with("metrics.jsonl")).expect("a log");
    assert!(!ws.read(&format!("plain/{text}")).contains("ws_loss"));
    assert_eq!(ws.losses(&format!("plain/{text}")), ws.losses(log));
}

#[test]
fn switches_set_what_they_set_there() {
    let ws = Workspace::new();
    let c = config(&ws, "--set optim.name=adamw8bit --no_bnb --no_amp --no_sdpa");
    assert_eq!((c.optim.name, c.train.precision), (OptimizerName::AdamW, Precision::Fp32));
    assert_eq!(c.model.attention, Attention::Math);
    assert_eq!(config(&ws, "--no_sdpa --use_sdpa").model.attention, Attention::Sdpa, "the last one holds");
    let c = config(&ws, "--val_batches 7 --val_seq_len 100 --batch_size 3 --val_data v --val_every 9");
    assert_eq!((c.train.eval_bytes, c.train.eval_seq_len), (Some(2100), Some(100)));
    assert_eq!((c.data.val.as_deref(), c.train.eval_every), (Some("v"), 9));
    assert_eq!(
        config(&ws, "--val_batches 7 --seq_len 10").train.eval_bytes,
        Some(7 * 4 * 10),
        "else training's length"
    );
    assert_eq!(config(&ws, "--val_every 0").train.eval_every, 0);
    let done = ws.bbt("config --val_every 5");
    assert!(
        done.status == Some(2) && done.stderr.contains("--val-every: ") && done.stderr.contains("--val-data"),
        "{done:?}"
    );
}

#[test]
fn a_flag_that_is_given_twice_holds_as_it_is_last() {
    let ws = Workspace::new();
    let c = config(&ws, "--lr 1e-3 --lr=2e-3 --out a --out b --n_layer 3 --n-layer 4 --no_ckpt --no_ckpt");
    assert_eq!((c.optim.lr, c.train.out.to_str(), c.model.n_layer), (2e-3, Some("b"), 4));
    // Of all commands.
    let eval = "--ckpt none.pt --ckpt golden.pt --data none --data text.bin --seq_len 9 --seq_len 48 --json --json";
    let found = ws.ok(&format!("eval {eval} --max_bytes 5 --max_bytes 500 --device cuda --device cpu")).json();
    assert_eq!(found["seq_len"], 48);
    ws.ok("generate --ckpt none --ckpt golden.pt --prompt a --prompt b --max_new_tokens 9 --max_new_tokens 1 --device cpu");
    ws.ok(
        "pack text.bin --out x --out y --shard_size 1 --shard_size 4K --ext none --ext bin --val_frac 9 --val_frac 0.1",
    );
    assert!(!ws.path("x").exists() && ws.path("y/val").exists());
    ws.ok("convert golden.pt out.safetensors --dtype bf16 --dtype fp32");
    ws.ok("plot --schedule none --schedule tiny.yaml --steps 5 --steps 9 --out a.png --out b.png");
    assert!(ws.path("b.png").exists() && !ws.path("a.png").exists());
    // --set is many flags in one: all hold.
    let c = config(&ws, "--set optim.lr=3e-3 --set train.steps=5");
    assert_eq!((c.optim.lr, c.train.steps), (3e-3, 5));
}

#[test]
fn a_smoke_test_trains_on_random_bytes_and_keeps_nothing() {
    let ws = Workspace::new();
    fs::create_dir(ws.path("tmp")).expect("creates");
    let before = ws.snapshot();
    let line = "train --smoke_test --device cpu --data nowhere --out kept.pt";
    let mut command = ws.command(&line.split_whitespace().map(OsStr::new).collect::<Vec<_>>());
    command.env("TMPDIR", ws.path("tmp"));
    let done = Running::start(command).wait();
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    let last = "smoke test: 10 steps done; nothing was kept";
    assert!(done.stderr.contains("step 10/10") && done.stderr.contains(last), "{}", done.stderr);
    // An untrained model of random bytes: eight bits each, or more.
    let first = done.stderr.lines().find(|line| line.starts_with("step 1/10")).expect("a line");
    let bits: f64 = first.split_whitespace().nth(2).and_then(|bits| bits.parse().ok()).expect("bits");
    assert!((7.9..16.0).contains(&bits), "{first}");
    assert_eq!(ws.snapshot(), before);
    assert_eq!(ws.names("tmp"), [""; 0]);
    assert!(ws.ok("train --smoke_test --device cpu --steps 3").stderr.contains("smoke test: 3 steps done"));
}

#[test]
fn packing_takes_the_originals_flags_and_layout() {
    let ws = Workspace::new();
    ws.write("in/a.txt", "A");
    ws.write("in/b.MD", "B");
    ws.write("in/c.rs", "C");
    let done =
        ws.ok("pack --inputs in text.bin --out_dir shards --shard_size_gb 2.0 --buf_mb 8 --sep_byte 0 --exts txt md");
    assert!(done.stderr.contains("shards: 2 documents, 3 bytes, 1 shards"), "{}", done.stderr);
    assert_eq!(ws.names("shards"), ["manifest.json", "shard_00000.bin"]);
    assert_eq!(ws.read("shards/shard_00000.bin"), "A\0B");
    ws.ok("pack --exts --inputs in --out_dir none --sep_byte -1");
    assert_eq!(ws.read("none/shard_00000.bin"), "ABC");
    // 0.000004 GiB is 4294 bytes: text.bin has 16,800.
    ws.ok("pack --inputs text.bin --out_dir small --shard_size_gb 0.000004");
    assert!(ws.names("small").iter().filter(|name| name.starts_with("shard_")).count() >= 3);
    // As the original trains on it.
    ws.ok("train --config tiny.yaml --data small --steps 1");
    let done = ws.bbt("pack --inputs text.bin --out_dir held --val_frac 0.1");
    assert!(
        done.status == Some(2) && done.stderr.contains("val_frac") && done.stderr.contains("--out"),
        "{}",
        done.stderr
    );
    for line in [
        "pack --inputs text.bin --out a --out_dir b",
        "pack --out_dir b",
        "pack --inputs in --sep_byte 300 --out_dir b",
    ] {
        assert_eq!(ws.bbt(line).status, Some(2), "{line}");
    }
}

#[test]
fn generating_takes_the_originals_flags() {
    let ws = Workspace::new();
    let line = "generate --ckpt golden.pt --prompt abc --max_new_tokens 20 --device cpu --seed 3 --json";
    let bytes = |flags: &str| ws.ok(&format!("{line} {flags}")).json()["bytes"].clone();
    let all = bytes("");
    for off in ["--top_k 0", "--top_k 256", "--top_k 1000"] {
        assert_eq!(bytes(off), all, "{off}: no choice among bytes");
    }
    assert_ne!(bytes("--top_k 2"), all);
    let done = ws.ok(&format!("{line} --temperature 0.5 --metrics --metrics_json m.json"));
    let metrics: serde_json::Value = serde_json::from_str(&ws.read("m.json")).expect("JSON");
    assert_eq!(
        (&metrics["prompt_tokens"], &metrics["generated_tokens"], &metrics["total_tokens"]),
        (&3.into(), &20.into(), &23.into())
    );
    // 256·d + L(4d² + 3·d·f + 2d) + d
    assert_eq!(metrics["parameter_count"], 256 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 160 + 2 * 64) + 64);
    let number = |key: &str| metrics[key].as_f64().unwrap_or_else(|| panic!("{key} in {metrics}"));
    assert!((number("ms_per_token") * number("tokens_per_sec") / 1000.0 - 1.0).abs() < 1e-6, "{metrics}");
    assert!(number("model_load_time_s") > 0.0 && metrics["checkpoint"] == "golden.pt" && metrics["device"] == "cpu");
    for key in ["parameter_count: 110912", "tokens_per_sec: ", "temperature: 0.5", "top_k: 0"] {
        assert!(done.stderr.contains(key), "{key} in {}", done.stderr);
    }
    done.json();
}

#[test]
fn evaluation_tells_perplexity_and_an_interval() {
    let ws = Workspace::new();
    let eval = |flags: &str| ws.ok(&format!("eval --ckpt golden.pt --data text.bin --seq_len 48 --device cpu {flags}"));
    let plain = eval("--json").json();
    let loss = plain["loss"].as_f64().expect("a loss");
    assert!((plain["perplexity"].as_f64().expect("perplexity") - loss.exp()).abs() < 1e-12);
    assert!(plain.get("bootstrap").is_none());
    let with = eval("--json --bootstrap 400 --seed 7").json();
    assert_eq!(with["loss"], plain["loss"]);
    let interval = &with["bootstrap"];
    assert_eq!((&interval["resamples"], &interval["seed"]), (&400.into(), &7.into()));
    let ends = |key: &str| [0, 1].map(|end| interval[key][end].as_f64().unwrap_or_else(|| panic!("{interval}")));
    let [low, high] = ends("loss");
    assert!(low < loss && loss < high, "{with}");
    let [least, most] = ends("perplexity");
    assert!((least - low.exp()).abs() < 1e-9 && (most - high.exp()).abs() < 1e-9, "{with}");
    assert_eq!(eval("--json --bootstrap 400 --seed 7").json(), with, "seeded");
    assert_ne!(eval("--json --bootstrap 400 --seed 8").json()["bootstrap"]["loss"], interval["loss"]);
    let text = eval("--bootstrap 400 --seed 7").text();
    assert!(text.contains("perplexity ") && text.contains("95 % interval: "), "{text}");
    // validate_new.py's number of windows.
    let bytes = eval("--json --batches 20").json()["bytes"].as_u64().expect("bytes");
    assert!((20 * 48 - 32..=20 * 48).contains(&bytes), "{bytes}");
}
